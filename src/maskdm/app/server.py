"""The page's server: on this machine alone unless another address is named."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from maskdm.app.limits import Limits

if TYPE_CHECKING:
    import uvicorn

LOCAL = ("127.0.0.1", "localhost", "::1")
MOST_PORT = 65_535
LEAVE_SEC = 2  # for answers that are under way when the server ends
# What Gradio would otherwise send or offer; it reads these when it is imported.
QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_SHARE": "False",
    "GRADIO_MCP_SERVER": "False",
    "GRADIO_RUN_HISTORY": "False",  # on the page, of what was drawn before
}


def bound(host: str, port: int) -> socket.socket:
    """A listening socket at that address; port 0 = any free one.

    Raises ValueError where the port is taken or the address is not this machine's.
    """
    if not 0 <= port <= MOST_PORT:
        raise ValueError(f"--port {port}: from 0 to {MOST_PORT}")
    with contextlib.ExitStack() as on_failure:
        try:
            family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            found = on_failure.enter_context(socket.socket(family, socket.SOCK_STREAM))
            if os.name == "posix":  # elsewhere it would let two servers have one port
                found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(place)
            found.listen()  # so that whoever comes before the server is ready waits for it
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                way_out = f"--port {port + 1}, or --port 0 for any free one"
                raise ValueError(f"--port {port} is taken: use another, {way_out}") from None
            raise ValueError(f"--host {host} --port {port}: {error}") from None
        on_failure.pop_all()
    return found


def make_server(
    runs: Sequence[str],
    host: str,
    limits: Limits,
    folder: Path,
    note: Callable[[str], None],
) -> uvicorn.Server:
    """The server of a page that draws from models; `run(sockets=[...])` serves until a signal.

    Args:
        runs: as for `load_model`, one at least.
        host: the address under which it is reached; others are refused where it is local, so that
            no other web site can reach it by a name of its own.
        limits: how much may be asked for.
        folder: for uploads, pictures and files to download; nothing outside is served.
        note: is called with lines about damaged checkpoints.

    Raises ValueError where a model is not available.
    """
    os.environ.update(QUIET, GRADIO_TEMP_DIR=str(folder))

    from maskdm.app.models import Models

    models = Models(runs, note)

    import gradio as gr
    import uvicorn
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from maskdm.app.page import CSS, Page, build_page

    page = build_page(Page(models, limits, folder / "drawn"))
    undocumented = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app = FastAPI(**undocumented)
    if host in LOCAL:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL, "[::1]"])
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        server_name=host,
        app_kwargs=undocumented,
        footer_links=[],
        allowed_paths=[],
        show_error=False,
        max_file_size=limits.max_upload_mb * 10**6,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("monospace",)),
        css=CSS,
    )
    how = {"log_level": "warning", "timeout_graceful_shutdown": LEAVE_SEC}
    return uvicorn.Server(uvicorn.Config(app, **how))

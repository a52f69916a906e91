"""`maskdm app`."""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import tempfile
from pathlib import Path
from typing import Annotated

import tyro

from maskdm.app.limits import Limits
from maskdm.commands.common import DONE, NoPrefix, quiet, say_note

Runs = Annotated[tuple[str, ...], tyro.conf.Positional, quiet(metavar="RUN [RUN ...]")]
USUAL_LIMITS = Limits()


def app(
    runs: Runs,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    limits: Annotated[Limits, NoPrefix] = USUAL_LIMITS,
) -> int:
    """Serve a web page, on this machine alone, on which one draws from models.

    Samples by seed, sampler, guidance and class, watched while they are drawn; several models side
    by side; inpainting of what one paints over; marginals of models trained under masks; pictures
    and arrays to download. Ctrl-C ends it. It needs Gradio: pip install 'maskdm[app]'.

    Args:
        runs: run folders, RUN@STAGE, checkpoints, exported models, or Hub ids. The ends of their
            masked stages are shown, too.
        host: address to serve at; 0.0.0.0 = whoever reaches this machine, without a password.
        port: port to serve at; 0 = any free one.
    """
    if not runs:
        raise ValueError("name a run, or several: maskdm app RUN [RUN ...]")
    limits.refuse_impossible()
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the page needs Gradio: pip install 'maskdm[app]'")

    from maskdm.app.server import LOCAL, bound, make_server

    with (
        bound(host, port) as place,
        tempfile.TemporaryDirectory(prefix="maskdm-app-", ignore_cleanup_errors=True) as folder,
    ):
        server = make_server(runs, host, limits, Path(folder), say_note)
        if host not in LOCAL:
            say_note("whoever reaches this machine can draw here: there is no password")
        shown = f"[{host}]" if ":" in host else host
        print(f"page    http://{shown}:{place.getsockname()[1]}/    Ctrl-C ends it", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends as by Ctrl-C
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[place])
    print("ended")
    return DONE

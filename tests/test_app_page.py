"""The page's server and the page in a real browser: what it serves, and to whom."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_settings
from PIL import Image

from maskdm.cli import main
from maskdm.images.store import open_store
from maskdm.recipe import Recipe
from maskdm.training.trainer import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on digits: half of the blocks hidden, then whole images."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    train(Recipe(**tiny_settings()), folder, show=False)
    return folder


@dataclass(frozen=True)
class Served:
    """A page that a process of its own serves; `folder` is for its temporary files."""

    port: int
    folder: Path

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def answer(
        self, path: str, method: str = "GET", body: bytes = b"", **headers: str
    ) -> tuple[int, bytes]:
        """Status and content."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, 60)) as link:
            link.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
            got = link.getresponse()
            return got.status, got.read()


@pytest.fixture(scope="module")
def served(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The page of a run, by the command; in the end Ctrl-C stops it and it leaves nothing."""
    pytest.importorskip("gradio", reason="pip install 'maskdm[app]'")
    folder = tmp_path_factory.mktemp("temporary")
    command = [sys.executable, "-m", "maskdm", "app", str(run), f"{run}@hide", "--port", "0"]
    command += ["--max-upload-mb", "1", "--max-steps", "400"]
    own = {**os.environ, "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=run.parent, env=own) as process:
        line = process.stdout.readline().decode()
        assert line.startswith("page    http://127.0.0.1:"), line
        yield Served(int(line.split("/")[2].split(":")[1]), folder)
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read().decode()
        assert process.wait(20) == 0
        assert rest == "ended\n"
    assert list(folder.glob("maskdm-app-*")) == []


def upload(served: Served, content: bytes) -> tuple[int, bytes]:
    part = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body = part + content + b"\r\n--b--\r\n"
    kind = "multipart/form-data; boundary=b"
    return served.answer("/gradio_api/upload", "POST", body, Content_Type=kind)


def test_no_other_file_is_served(served, run):
    assert served.answer("/")[0] == 200
    status, answer = upload(served, b"mine")
    path = json.loads(answer)[0]
    own = next(served.folder.glob("maskdm-app-*"))  # not one that all pages share
    assert status == 200 and Path(path).is_relative_to(own)
    assert served.answer(f"/gradio_api/file={path}") == (200, b"mine")
    secret = served.folder / "secret.txt"  # beside the page's own folder
    secret.write_text("nobody else's")
    others = [secret, run / "recipe.yaml", "recipe.yaml", "digits/recipe.yaml", "/etc/passwd"]
    for other in [*others, f"{Path(path).parent}/../../../secret.txt", __file__]:
        status, answer = served.answer(f"/gradio_api/file={other}")
        assert status in (403, 404), other
        assert answer.startswith(b'{"detail":'), other
    assert served.answer("/gradio_api/file=http://127.0.0.1:1/x")[0] >= 400


def test_too_large_files_are_not_taken(served):
    status, answer = upload(served, b"x" * (10**6 + 1))
    assert status == 413 and b"exceeded" in answer


def test_other_web_sites_cannot_reach_it(served):
    assert served.answer("/", Host=f"localhost:{served.port}")[0] == 200
    assert served.answer("/", Host="evil.example")[0] == 400  # a name that leads to this machine
    for path in ("/docs", "/openapi.json", "/gradio_api/docs", "/gradio_api/mcp/"):
        assert served.answer(path)[0] in (404, 405), path


def opened(browser, served: Served, width: int, scheme: str, requests: list[str]):
    shown = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    shown.on("request", lambda request: requests.append(request.url))
    shown.on("pageerror", lambda error: requests.append(f"error: {error}"))
    shown.goto(served.address)
    shown.get_by_role("button", name="Draw", exact=True).first.wait_for()
    return shown


def downloaded(shown, number: int, folder: Path) -> dict[str, np.ndarray]:
    with shown.expect_download() as info:
        shown.get_by_text("Array (.npz)").nth(number).click()
    info.value.save_as(folder / "x.npz")
    return dict(np.load(folder / "x.npz"))


def test_sampling_in_a_browser(served, run, browser, tmp_path):
    requests = list[str]()
    shown = opened(browser, served, 1280, "light", requests)
    shown.get_by_label("Seed").first.fill("3")
    shown.get_by_label("Steps").first.fill("300")
    shown.get_by_role("button", name="Draw", exact=True).first.click()
    shown.get_by_text(" left").first.wait_for()  # it is watched
    shown.get_by_text("seed 3, 300 steps of ddim").nth(1).wait_for()
    out = tmp_path / "out.npz"
    for number, name in enumerate((run, f"{run}@hide")):
        how = "--num 16 --seed 3 --steps 300".split()
        assert main(["sample", str(name), "--out", str(out), *how]) == 0
        drawn = downloaded(shown, number, tmp_path)
        np.testing.assert_array_equal(drawn["arr_0"], np.load(out)["arr_0"])
    shown.get_by_label("Steps").first.fill("401")
    shown.get_by_role("button", name="Draw", exact=True).first.click()
    shown.get_by_text("401 steps: from 1 to 400").wait_for()
    assert all(url.startswith((served.address, "data:", "blob:")) for url in requests)


def test_inpainting_with_a_painted_mask_on_a_phone_in_the_dark(served, browser, tmp_path):
    requests = list[str]()
    shown = opened(browser, served, 390, "dark", requests)
    light = opened(browser, served, 390, "light", requests)
    grounds = {
        page.evaluate("getComputedStyle(document.body).backgroundColor") for page in (shown, light)
    }
    assert len(grounds) == 2
    shown.get_by_role("tab", name="Inpaint").click()
    assert shown.evaluate("document.documentElement.scrollWidth") == 390
    shown.get_by_label("Image number").fill("7")
    shown.get_by_role("button", name="Inpaint", exact=True).click()
    shown.get_by_text("there is no image yet").wait_for()
    with shown.expect_response(lambda answer: "file=" in answer.url):
        shown.get_by_role("button", name="Training image").click()
    canvas = shown.locator("canvas").first
    canvas.scroll_into_view_if_needed()
    shown.wait_for_timeout(1000)  # the picture comes in with a move
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    shown.mouse.move(x - 30, y)
    shown.mouse.down()
    shown.mouse.move(x + 30, y, steps=10)
    shown.mouse.up()
    shown.wait_for_timeout(500)
    shown.get_by_role("button", name="Inpaint", exact=True).click()
    shown.get_by_text("of ddpm x 5 resamplings").wait_for()
    drawn = downloaded(shown, 2, tmp_path)["arr_0"]
    image = open_store(Recipe(**tiny_settings()).data, progress=False).images[7]
    changed = (drawn != image).any((0, 3))
    assert drawn.shape == (4, 8, 8, 1) and changed[3:5, 3:5].any()
    assert not changed[[0, 1, -2, -1]].any() and changed.sum() <= 20
    assert all(url.startswith((served.address, "data:", "blob:")) for url in requests)


def test_an_upload_is_refused_or_shown(served, browser, tmp_path):
    shown = opened(browser, served, 1280, "light", [])
    shown.get_by_role("tab", name="Inpaint").click()
    (tmp_path / "text.png").write_text("no image")
    entry = shown.locator("input[type=file]").first
    entry.set_input_files(tmp_path / "text.png")
    shown.get_by_text("text.png cannot be used: not an image").wait_for()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "good.png")
    with shown.expect_response(lambda answer: "file=" in answer.url):
        entry.set_input_files(tmp_path / "good.png")


def test_stop_ends_a_drawing(served, browser):
    shown = opened(browser, served, 1280, "light", [])
    shown.get_by_label("Steps").first.fill("400")
    shown.get_by_label("Images").first.fill("64")
    shown.get_by_role("button", name="Draw", exact=True).first.click()
    shown.get_by_text(" left").first.wait_for()
    shown.get_by_role("button", name="Stop").first.click()
    shown.wait_for_timeout(1500)
    caption = shown.get_by_text(" left").first.inner_text()
    shown.wait_for_timeout(700)
    assert shown.get_by_text(" left").first.inner_text() == caption

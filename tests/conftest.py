"""Shared fixtures: a cache of its own for each test run, a recipe that trains in a second."""

from __future__ import annotations

import maskdm  # noqa: F401  # isort: skip (before torch: it sets how threads wait)

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from torch import nn

from maskdm.recipe import Recipe

settings.register_profile("maskdm", deadline=None, derandomize=True)  # nothing is timed or random
settings.load_profile("maskdm")


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASKDM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)  # for inputs that a test doesn't care about


@pytest.fixture
def browser():
    """A headless Chromium, where there are one and its client."""
    client = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with client.sync_playwright() as player:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = player.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


def tiny_settings() -> dict[str, Any]:
    stage = {"batch_size": 8, "lr": 1e-3, "betas": (0.9, 0.99), "warmup": 2, "clip": 1.0}
    return {
        "data": {"source": "digits", "size": 8, "channels": 1},
        "model": {"patch_size": 2, "embed_dim": 16, "depth": 3, "num_heads": 2},
        "diffusion": {"schedule": "cosine", "prediction": "x0", "weighting": {"kind": "min-snr"}},
        "stages": [
            {"name": "hide", "mask": {"kind": "block", "rate": 0.5}, "steps": 6, **stage},
            {"name": "show", "steps": 5, **stage},
        ],
        "sampling": {"steps": 4, "batch_size": 8},
        "evaluation": {"num": 16, "num_components": 4},
        "log_every": 2,
        "checkpoint_every": 3,  # not in step with log_every
        "preview_every": 100,
        "num_previews": 4,
        "evaluate_every": 0,
        "precision": "fp32",
    }


@pytest.fixture
def tiny() -> Recipe:
    """Digits, a 10,000-parameter U-ViT, 6 steps with half the blocks hidden, 5 without."""
    return Recipe(**tiny_settings())


@pytest.fixture
def changed(tiny: Recipe) -> Callable[..., Recipe]:
    """The tiny recipe with other top-level settings, given as keywords."""
    return lambda **changes: Recipe(**{**tiny.model_dump(), **changes})


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Six RGB PNGs in two class folders, of different sizes, with Mac litter beside them."""
    root = tmp_path / "images"
    generator = np.random.default_rng(0)
    for number, (name, size) in enumerate(
        [("cat/b.png", (9, 8)), ("cat/a.png", (8, 8)), ("cat/c.PNG", (20, 33)),
         ("dog/a.jpg", (16, 16)), ("dog/b.png", (8, 12)), ("dog/c.png", (64, 64))]
    ):  # fmt: skip
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        pixels[0, 0] = number
        Image.fromarray(pixels).save(path)
    (root / "cat" / ".DS_Store").write_bytes(b"litter")
    (root / "cat" / "._a.png").write_bytes(b"litter")
    (root / "notes.txt").write_text("not an image")
    return root


def as_array(pictures: list[Image.Image]) -> np.ndarray:
    """Pictures of one size and mode: uint8 (n, H, W, C)."""
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    return pixels if pixels.ndim == 4 else pixels[..., None]


def mean_network(folder: Path) -> str:
    """A file of a network whose features are the means of the quarters of grey 8x8 images."""

    class Quarters(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pooled = nn.functional.adaptive_avg_pool2d(x.float(), 2)
            return pooled.flatten(1)

    batch = torch.export.Dim("batch", min=1, max=4096)
    example = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    program = torch.export.export(Quarters(), (example,), dynamic_shapes=({0: batch},))
    torch.export.save(program, folder / "quarters.pt2")
    return str(folder / "quarters.pt2")

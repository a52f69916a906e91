"""Rectangles and alpha from a folder of pictures to samples, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import tiny_settings
from PIL import Image

from maskdm.cli import main

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


@pytest.mark.parametrize("channels", MODES)
def test_rectangles_go_from_a_folder_to_samples(channels, tmp_path: Path):
    """Training, previews, going on, sampling, evaluation, inpainting: images of 8x12 pixels."""
    generator = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(12):
        pixels = generator.integers(0, 256, (16, 24, 4), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    settings = json.loads(json.dumps(tiny_settings()))
    settings["data"] = {
        "source": str(tmp_path / "images"), "size": [8, 12], "channels": channels, "flip": True,
    }  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    run, out = tmp_path / "run", tmp_path / "out.npz"
    command = ["train", str(tmp_path / "tiny.yaml"), "--out", str(run)]
    assert main(command) == 0
    with Image.open(run / "samples" / "step-00000011.png") as sheet:
        width, height = sheet.size
        assert width == 2 * (96 + 4) + 4 and height > 2 * (64 + 4) + 4  # a caption stands below
    assert main(command) == 0  # the same recipe, read back from RUN/recipe.yaml
    assert main([*command, "--data.size", "8", "12"]) == 0
    for name in (str(run), f"{run}@hide"):
        assert main(["sample", name, "--num", "2", "--out", str(out)]) == 0
        assert np.load(out)["arr_0"].shape == (2, 8, 12, channels)
    assert main(["evaluate", str(run), "--num", "8"]) == 0
    (record,) = json.loads((run / "evaluation.json").read_text())
    assert record["reference"]["num"] == 12
    assert record["reference"]["shape"] == [8, 12, channels]

    image = generator.integers(0, 256, (8, 12, 4), dtype=np.uint8)
    unknown = np.zeros((8, 12), np.uint8)
    unknown[:, 8:] = 255
    Image.fromarray(image).convert(MODES[channels]).save(tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as picture:
        known = np.asarray(picture).reshape(8, 12, channels)
    Image.fromarray(unknown).save(tmp_path / "mask.png")
    inpaint = [
        "inpaint",
        str(run),
        str(tmp_path / "image.png"),
        "--mask",
        str(tmp_path / "mask.png"),
    ]
    assert main([*inpaint, "--num", "2", "--resamplings", "1", "--out", str(out)]) == 0
    results = np.load(out)["arr_0"]
    assert results.shape == (2, 8, 12, channels) and (results[:, :, :8] == known[:, :8]).all()
    assert main([*inpaint, "--resamplings", "1", "--out", str(tmp_path / "sheet.png")]) == 0

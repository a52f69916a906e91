"""Written images: sheets, folders of PNGs, arrays; one to four channels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import as_array
from PIL import Image

from maskdm.cli import main
from maskdm.export.pipeline import pipeline_of_run, save_pipeline
from maskdm.files import write_text, write_whole
from maskdm.images.output import image_grid, save_images, to_pil
from maskdm.models.build import build_model
from maskdm.sampling.inpaint import with_hole

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def noise(channels: int, num: int = 3) -> np.ndarray:
    generator = np.random.default_rng(channels)
    return generator.integers(0, 256, (num, 8, 12, channels), dtype=np.uint8)


def read_folder(folder: Path) -> list[Image.Image]:
    pictures = []
    for path in sorted(folder.iterdir()):
        with Image.open(path) as picture:
            picture.load()
        pictures.append(picture)
    return pictures


@pytest.mark.parametrize("channels", MODES)
def test_a_folder_of_pngs_and_an_array_keep_every_channel(channels, tmp_path):
    images = noise(channels)
    save_images(images, tmp_path / "folder")
    pictures = read_folder(tmp_path / "folder")
    assert [picture.mode for picture in pictures] == [MODES[channels]] * 3
    assert [picture.mode for picture in to_pil(images)] == [MODES[channels]] * 3
    back = np.stack([np.asarray(picture).reshape(8, 12, channels) for picture in pictures])
    assert np.array_equal(back, images)
    save_images(images, tmp_path / "a.npz")
    assert np.array_equal(np.load(tmp_path / "a.npz")["arr_0"], images)


@pytest.mark.parametrize("channels", MODES)
def test_a_model_of_any_channels_is_sampled_to_files(channels, tiny, changed, tmp_path):
    recipe = changed(data={"source": "digits", "size": 8, "channels": channels})
    pipeline = pipeline_of_run(build_model(recipe).eval(), recipe)
    save_pipeline(pipeline, tmp_path / "model")
    images = as_array(pipeline(3).images)
    assert images.shape == (3, 8, 8, channels)
    assert [picture.mode for picture in pipeline(2).images] == [MODES[channels]] * 2
    for name in ("folder", "a.npz", "sheet.png"):
        command = ["sample", str(tmp_path / "model"), "--num", "3", "--out", str(tmp_path / name)]
        assert main(command) == 0
    assert np.array_equal(np.load(tmp_path / "a.npz")["arr_0"], images)
    last = read_folder(tmp_path / "folder")[2]
    assert last.mode == MODES[channels]
    assert np.array_equal(np.asarray(last).reshape(8, 8, channels), images[2])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.mode == ("L" if channels < 3 else "RGB")


@pytest.mark.parametrize("channels", [2, 4])
def test_transparency_shows_as_a_checkerboard_on_a_sheet(channels):
    images = noise(channels, num=1).repeat(3, axis=0)
    images[0, ..., -1], images[1, ..., -1], images[2, ..., -1] = 0, 255, 128
    sheet = np.asarray(image_grid(images, min_side=16, gap=2)).reshape(38, 54, channels - 1)
    clear, opaque, half = sheet[2:18, 2:26], sheet[2:18, 28:52], sheet[20:36, 2:26]
    assert (clear[:8, :8] == 153).all() and (clear[:8, 8:16] == 102).all()
    assert (clear[8:, :8] == 102).all() and (clear[8:, 8:16] == 153).all()
    assert np.array_equal(opaque[::2, ::2], images[1, ..., :-1])
    expected = (128.0 * opaque + 127.0 * clear) / 255
    assert abs(half - expected).max() <= 0.5
    assert (sheet[:2] == 128).all() and (sheet[20:, 28:] == 128).all()  # the ground between


def test_a_sheet_of_rectangles_keeps_their_shape():
    sheet = np.asarray(image_grid(noise(3), min_side=8, gap=2))
    assert sheet.shape == (2 * 10 + 2, 2 * 14 + 2, 3)
    assert np.array_equal(sheet[2:10, 16:28], noise(3)[1])


@pytest.mark.parametrize("channels", MODES)
def test_a_hole_is_opaque_grey(channels):
    image, unknown = noise(channels)[0], np.zeros((8, 12), bool)
    unknown[2:4, 5:9] = True
    holed = with_hole(image, unknown)
    expected = {1: [128], 2: [128, 255], 3: [128] * 3, 4: [128, 128, 128, 255]}[channels]
    assert holed.dtype == np.uint8 and (holed[unknown] == expected).all()
    assert np.array_equal(holed[~unknown], image[~unknown])


@pytest.mark.parametrize("shape", [(2, 8, 8, 5), (2, 8, 8, 0), (2, 8, 8)])
def test_arrays_that_are_not_pictures_are_refused(shape, tmp_path):
    images = np.zeros(shape, np.uint8)
    for show in (to_pil, image_grid, lambda x: save_images(x, tmp_path / "folder")):
        with pytest.raises(ValueError, match=r"cannot be drawn, .* 4 \(RGBA\): save others as"):
            show(images)
    assert not (tmp_path / "folder").exists()
    save_images(images, tmp_path / "a.npz")
    assert np.load(tmp_path / "a.npz")["arr_0"].shape == shape


def test_a_grid_enlarges_small_images_without_smoothing():
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    sheet = np.asarray(image_grid(images, min_side=20, gap=2))
    assert sheet.shape == (2 * 26 + 2, 3 * 26 + 2, 3)
    assert np.array_equal(sheet[2:26:3, 28:52:3], images[1])
    assert np.array_equal(sheet[4:28:3, 30:54:3], images[1])
    assert np.asarray(image_grid(images[..., :1])).ndim == 2


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "new" / "file.json"
    write_text(path, "first é")
    assert path.read_text("utf-8") == "first é"

    def full_disk(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_whole(path, full_disk)
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]
    assert path.read_text("utf-8") == "first é"
    with pytest.raises(ValueError, match="cannot make the folder"):
        write_text(path / "below-a-file" / "x", "text")

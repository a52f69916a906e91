from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from maskdm.images.order import ImageOrder
from maskdm.images.output import image_grid
from maskdm.images.source import open_source
from maskdm.images.store import cache_dir, center_crop, open_store, prepare_image
from maskdm.recipe import Data


def zipped(folder: Path, prefix: str = "") -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.rglob("*"):
            if file.is_file():
                archive.write(file, prefix + file.relative_to(folder).as_posix())
    return path


def test_digits_are_scikit_learns_with_0_to_16_spread_over_0_to_255():
    store = open_store(Data(source="digits", size=8, channels=1), progress=False)
    digits = load_digits()
    assert store.images.shape == (1797, 8, 8, 1) and store.images.dtype == np.uint8
    assert np.array_equal(np.round(store.images[..., 0] * (16 / 255)), digits.images)
    assert np.array_equal(store.labels, digits.target)


def test_a_folder_and_its_zip_give_the_same_images_in_the_same_order(image_folder):
    names = ["cat/a.png", "cat/b.png", "cat/c.PNG", "dog/a.jpg", "dog/b.png", "dog/c.png"]
    folder = open_source(str(image_folder))
    archive = open_source(str(zipped(image_folder)))
    nested = open_source(str(zipped(image_folder, "top/train/")))
    assert folder.names == archive.names == names
    assert nested.names == [f"top/train/{name}" for name in names]
    for source in (folder, archive, nested):
        assert source.class_names == ["cat", "dog"]
        assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    data = dict(size=8, channels=3)
    one = open_store(Data(source=str(image_folder), **data), progress=False)
    two = open_store(Data(source=str(image_folder.with_suffix(".zip")), **data), progress=False)
    assert np.array_equal(one.images, two.images)


def test_images_beside_class_folders_mean_no_labels(image_folder):
    shutil.copy(image_folder / "cat" / "a.png", image_folder / "stray.png")
    source = open_source(str(image_folder))
    assert source.labels is None and source.class_names == []
    assert open_store(Data(source=str(image_folder)), progress=False).labels is None


def test_a_store_is_built_once_and_again_when_the_source_changes(image_folder):
    data = Data(source=str(image_folder), size=8)
    before = open_store(data, progress=False)
    stores = set(cache_dir().glob("store-*"))
    assert np.array_equal(open_store(data, progress=False).images, before.images)
    assert set(cache_dir().glob("store-*")) == stores
    (image_folder / "dog" / "b.png").unlink()
    after = open_store(data, progress=False)
    assert len(after) == 5 and len(before) == 6
    assert len(set(cache_dir().glob("store-*"))) == len(stores) + 1
    assert not list(cache_dir().glob("building-*"))


@pytest.mark.parametrize("damage", ["text", "truncated"])
def test_an_unreadable_image_stops_the_build_or_is_left_out_by_option(image_folder, damage):
    bad = image_folder / "cat" / "b.png"
    bad.write_bytes(b"no image" if damage == "text" else bad.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"cat/b.png cannot be read.*--data.on-bad skip"):
        open_store(Data(source=str(image_folder), size=8), progress=False)
    assert not list(cache_dir().glob("building-*"))
    store = open_store(Data(source=str(image_folder), size=8, on_bad="skip"), progress=False)
    assert len(store) == 5 and store.labels.tolist() == [0, 0, 1, 1, 1]
    assert store.manifest["skipped"] == ["cat/b.png"]
    assert store.manifest["sha256"] == hashlib.sha256(store.images.tobytes()).hexdigest()


def test_a_damaged_member_of_a_zip_is_an_unreadable_image(image_folder):
    path = image_folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a.png", "b.png"):
            archive.writestr(name, (image_folder / "cat" / name).read_bytes() * 2)
        offset = archive.getinfo("b.png").header_offset
    content = bytearray(path.read_bytes())
    content[offset + 40 : offset + 60] = b"\xff" * 20
    path.write_bytes(content)
    with pytest.raises(ValueError, match="b.png cannot be read"):
        open_store(Data(source=str(path), size=8), progress=False)
    store = open_store(Data(source=str(path), size=8, on_bad="skip"), progress=False)
    assert store.manifest["skipped"] == ["b.png"]


def test_links_are_followed_once_and_dangling_ones_are_unreadable_images(image_folder, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "cats").symlink_to(image_folder / "cat")
    (linked / "loop").symlink_to(linked)
    (linked / "gone.png").symlink_to(tmp_path / "nowhere.png")
    source = open_source(str(linked))
    assert source.names == ["cats/a.png", "cats/b.png", "cats/c.PNG", "gone.png"]
    store = open_store(Data(source=str(linked), size=8, on_bad="skip"), progress=False)
    assert len(store) == 3 and store.manifest["skipped"] == ["gone.png"]


def test_sixteen_bits_are_scaled_and_transparency_shows_white(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:, 4:] = (255, 0, 0, 255)
    Image.fromarray(clear).save(tmp_path / "b.png")
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "c.tif")
    store = open_store(Data(source=str(tmp_path), size=8, on_bad="skip"), progress=False)
    assert np.array_equal(store.images[0, ..., 1], np.round(ramp / 257))
    assert (store.images[1, :, :4] == 255).all()
    assert (store.images[1, :, 4:] == (255, 0, 0)).all()
    assert store.manifest["skipped"] == ["c.tif"]


def test_a_damaged_store_is_refused():
    data = Data(source="digits", size=4, channels=1)
    open_store(data, progress=False)
    shape = [1797, 4, 4, 1]
    (manifest,) = (
        path
        for path in cache_dir().glob("store-*/manifest.json")
        if json.loads(path.read_text())["shape"] == shape
    )
    images = manifest.with_name("images.bin")
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged: remove it"):
        open_store(data, progress=False)
    shutil.rmtree(manifest.parent)


def test_sources_without_images_are_refused(tmp_path):
    def refused(source: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            open_store(Data(source=str(source), size=8), progress=False)

    refused(tmp_path / "nowhere", "does not exist: name a folder or a zip of images, or digits")
    refused(tmp_path, r"no images in folder .*it is empty")
    (tmp_path / "a.txt").write_text("x")
    refused(tmp_path, r"no images in folder .*1 other files")
    refused(tmp_path / "a.txt", "is a file, but not a zip")
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of its 1 images can be read"):
        open_store(Data(source=str(tmp_path), size=8, on_bad="skip"), progress=False)


def test_center_crop_keeps_the_middle_square():
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 16:32] = 255
    assert np.asarray(center_crop(Image.fromarray(pixels), 16)).min() == 255
    halved = np.asarray(center_crop(Image.fromarray(pixels), 8))  # an exact box reduction
    assert halved.shape == (8, 8, 3) and halved.min() == 255


@pytest.mark.parametrize(("crop", "box"), [("celeba", (25, 57, 128)), ("celeba140", (19, 39, 140))])
def test_faces_are_cut_from_celebas_aligned_images(crop, box):
    left, top, side = box
    pixels = np.zeros((218, 178, 3), np.uint8)
    pixels[top : top + side, left : left + side] = 255
    data = Data(size=64, crop=crop)
    assert (prepare_image(Image.fromarray(pixels), data) == 255).all()
    outside = 255 - pixels  # a pixel more on any side would show
    assert (prepare_image(Image.fromarray(outside), data) == 0).all()
    if crop == "celeba":  # centred at x 89, y 121, halved by exact averages
        ramp = np.arange(218 * 178).reshape(218, 178) % 251
        image = Image.fromarray(ramp.astype(np.uint8))
        middle = prepare_image(image, Data(size=64, channels=1, crop=crop))[32, 32, 0]
        assert abs(int(middle) - ramp[121:123, 89:91].mean()) <= 1
    with pytest.raises(
        ValueError, match="aligned images of 178x218.*this one is 218x178: use crop"
    ):
        prepare_image(Image.fromarray(pixels.transpose(1, 0, 2)), data)


def test_images_of_the_exact_size_are_taken_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    data = Data(size=16, crop="none")
    assert np.array_equal(prepare_image(Image.fromarray(pixels), data), pixels)
    with pytest.raises(ValueError, match="wants images of 16x16 pixels, and this one is 16x8"):
        prepare_image(Image.fromarray(pixels[:8]), data)


@pytest.mark.parametrize("size", [(5, 7), (64, 48), (1000, 3), (33, 33)])
@pytest.mark.parametrize("crop", ["center", "resize"])
def test_every_shape_is_brought_to_the_square(size, crop):
    image = Image.fromarray(np.full((*size[::-1], 3), 77, np.uint8))
    for channels in (1, 3):
        prepared = prepare_image(image, Data(size=12, channels=channels, crop=crop))
        assert prepared.shape == (12, 12, channels)
        assert (prepared == 77).all()


def test_exif_rotation_is_applied(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[0] = 255  # a bright top row, to be turned by 90 degrees
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    store = open_store(Data(source=str(tmp_path), size=8), progress=False)
    assert (store.images[0, :, -1] == 255).all() and store.images[0, :, :-1].max() == 0


@given(st.integers(1, 40), st.integers(0, 10**6), st.integers(0, 100), st.integers(0, 60))
def test_the_order_is_a_pure_function_of_the_position(num, seed, position, count):
    order = ImageOrder(num, seed)
    straight = order.indices(0, position + count)[position:]
    assert np.array_equal(ImageOrder(num, seed).indices(position, count), straight)


def test_each_pass_shows_every_image_once_in_another_order():
    passes = ImageOrder(50, seed=3).indices(0, 150).reshape(3, 50)
    assert all(sorted(row) == list(range(50)) for row in passes)
    assert not np.array_equal(passes[0], passes[1])
    assert not np.array_equal(passes[0], ImageOrder(50, seed=4).indices(0, 50))


def test_ranks_take_disjoint_shares_that_join_to_the_batch():
    order = ImageOrder(50, seed=3)
    shares = [order.rank_indices(40, 12, rank, 4) for rank in range(4)]
    assert np.array_equal(np.concatenate(shares), order.indices(40, 12))


def test_a_grid_enlarges_small_images_without_smoothing():
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    sheet = np.asarray(image_grid(images, min_side=20, gap=2))
    assert sheet.shape == (2 * 26 + 2, 3 * 26 + 2, 3)
    assert np.array_equal(sheet[2:26:3, 28:52:3], images[1])
    assert np.array_equal(sheet[4:28:3, 30:54:3], images[1])
    assert np.asarray(image_grid(images[..., :1])).ndim == 2

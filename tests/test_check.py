from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_settings
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from maskdm.cli import main
from maskdm.images import check, duplicates
from maskdm.images.check import Samples, examine
from maskdm.images.diagnosis import Report
from maskdm.images.inspection import inspect_images
from maskdm.images.known import KNOWN
from maskdm.images.output import on_grey
from maskdm.images.prepare import reason
from maskdm.images.store import open_store
from maskdm.masks import effective_rate
from maskdm.recipe import Data, Mask, Recipe
from maskdm.report.sheets import HIDDEN, draw_sheet, hide


def texture(seed: int, size: tuple[int, int] = (32, 32), channels: int = 3) -> np.ndarray:
    """A random picture that is smooth at a scale of a few pixels, as photographs are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
    return smooth if channels == 3 else smooth[..., 0]


def picture(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.fromarray(texture(seed, size))


def png_chunk(kind: bytes, content: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + crc


def bomb() -> bytes:
    """A PNG file of a hundred bytes that claims 20000x20000 pixels."""
    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two classes with one of everything."""
    root = tmp_path_factory.mktemp("mixed") / "photos"
    cat, dog = root / "cat", root / "dog"
    cat.mkdir(parents=True)
    dog.mkdir()
    # Good ones, each special in its way.
    Image.fromarray(texture(0, channels=1)).save(cat / "grey.png")
    clear = np.concatenate([texture(1), np.full((32, 32, 1), 255, np.uint8)], axis=-1)
    Image.fromarray(clear).save(cat / "opaque.png")
    clear[:8, :, 3] = 0
    Image.fromarray(clear).save(cat / "clear.png")
    picture(2).quantize(16).save(cat / "palette.gif", transparency=0)
    Image.fromarray(texture(3, channels=1) * np.uint16(257)).save(cat / "deep.png")
    picture(4).convert("CMYK").save(dog / "print.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(5, (40, 24)).save(dog / "turned.jpg", exif=exif, quality=95)
    frames = [picture(seed).quantize(16) for seed in (6, 7, 8)]
    frames[0].save(dog / "moving.gif", save_all=True, append_images=frames[1:])
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    picture(9).save(dog / "profile.png", icc_profile=profile)
    picture(10, (400, 20)).save(dog / "panorama.png")
    picture(11, (4, 4)).save(dog / "tiny.png")
    picture(12).save(dog / "größe-猫.png")
    # Twice the same, and nearly so.
    picture(13).save(cat / "one.png")
    picture(13).save(dog / "one-again.bmp")
    picture(14).save(cat / "photo.jpg", quality=95)
    picture(14, (32, 32)).save(cat / "photo-small.jpg", quality=70)
    # Bad ones.
    whole = encoded(picture(15, (64, 64)), "JPEG")
    (dog / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (dog / "text.png").write_text("no image")
    (dog / "empty.jpg").write_bytes(b"")
    (dog / "bomb.png").write_bytes(bomb())
    (dog / "gone.png").symlink_to(root / "nowhere.png")
    (cat / os.fsdecode(b"latin-\xe9.png")).write_bytes(b"no image")
    # Not images.
    (root / ".DS_Store").write_bytes(b"litter")
    (root / "notes.txt").write_text("a note")
    (dog / "phone.jxl").write_bytes(b"no image")
    return root


BAD = {
    "cat/latin-\udce9.png": "not an image",
    "dog/bomb.png": "decompression bomb: 20000x20000 pixels",
    "dog/cut.jpg": "truncated: the file ends early",
    "dog/empty.jpg": "empty file",
    "dog/gone.png": "dangling link: its target does not exist",
    "dog/text.png": "not an image",
}


@pytest.fixture(scope="module")
def report(mixed: Path) -> Report:
    return examine(Data(source=str(mixed), size=16), progress=False)


def texts(report: Report, level: str) -> str:
    return " | ".join(finding.text for finding in report.findings if finding.level == level)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """What a check prints."""
    capsys.readouterr()
    assert main(["check", *arguments]) == code
    return capsys.readouterr().out


def test_the_report_counts_images_and_classes(report, mixed):
    assert report.source == str(mixed) and report.kind == "folder"
    assert (report.num_images, report.num_readable) == (22, 16)
    assert report.classes == {"cat": 8, "dog": 8} and report.no_classes is None


def test_the_report_has_sizes_after_rotation(report):
    assert report.width == (4, 32, 400) and report.height == (4, 32, 40)
    assert report.sizes[0] == (32, 32, 13)
    assert (24, 40, 1) in report.sizes  # turned
    assert report.enlarged == ["dog/tiny.png"]
    assert report.extreme == ["dog/panorama.png"]
    assert "1 image is smaller than 16x16 and will be enlarged" in (texts(report, "warning"))
    assert "crop center removes more than half of 1 image" in texts(report, "warning")


def test_the_report_has_formats_modes_and_special_traits(report):
    assert report.formats == {"PNG": 9, "JPEG": 4, "GIF": 2, "BMP": 1}
    assert report.modes == {"RGB": 9, "P": 2, "RGBA": 2, "CMYK": 1, "I;16": 1, "L": 1}
    assert report.traits == {
        "transparent": 2,  # the opaque one isn't
        "16-bit": 1,
        "CMYK": 1,
        "EXIF rotation": 1,
        "colour profile": 1,
        "several frames": 1,
    }
    notes = texts(report, "note")
    assert "2 images have transparent parts, drawn over white: --data.background" in notes
    assert "1 file has several frames, of which the first is used" in notes


def test_the_report_names_unreadable_images_with_the_reason(report):
    assert dict(report.unreadable) == BAD
    assert not report.usable
    assert texts(report, "error") == (
        "6 images of 22 cannot be read, but training skips up to 1% by default: fix or remove "
        "them, or skip them with --data.on-bad skip (here --on-bad skip)"
    )


def test_a_file_without_read_permission_has_a_reason_of_its_own():
    assert reason(PermissionError(13, "Permission denied", "a.png")) == "permission denied"


def test_the_report_counts_skipped_files_and_says_why(report):
    assert report.skipped == {".jxl": 1, ".txt": 1, "hidden": 1}
    assert "1 .jxl file is skipped, because Pillow cannot read JPEG XL: convert" in (
        texts(report, "warning")
    )


def test_the_report_names_equal_and_alike_images(report):
    assert report.duplicates == [["cat/one.png", "dog/one-again.bmp"]]
    assert report.near_duplicates == [["cat/photo-small.jpg", "cat/photo.jpg"]]
    assert report.near_duplicates_all
    assert "1 image is an exact copy of another" in texts(report, "warning")
    assert "1 image looks almost like another" in texts(report, "warning")


def test_the_report_estimates_the_store(report):
    assert report.store_bytes == 16 * 16 * 16 * 3
    assert report.build_sec > 0 and report.num_cores >= 1


def test_it_is_printed_in_lines_of_a_terminals_width(mixed, monkeypatch, capsys):
    monkeypatch.chdir(mixed.parent)
    text = printed(capsys, "photos", "--size", "16", code=2)
    assert all(len(line) <= 80 for line in text.splitlines())
    text = " ".join(text.split())
    assert text.startswith("photos: folder, 22 images, 16 readable prepared as 16x16, 3 channels")
    assert "on white, crop center; on-bad auto classes 2: cat (8), dog (8) sizes" in text
    assert "cat/latin-\\udce9.png: not an image" in text
    assert "dog/cut.jpg: truncated: the file ends early" in text
    assert "and 1 more; --json lists all" in text  # of six unreadable ones
    assert "skipped .jxl (1), .txt (1), hidden (1)" in text
    assert "equal cat/one.png, dog/one-again.bmp" in text
    assert text.endswith("not usable: 1 error")


def test_json_is_the_whole_report_and_nothing_else(mixed, report, capsys):
    found = json.loads(printed(capsys, str(mixed), "--size", "16", "--json", code=2))
    wanted = json.loads(json.dumps({**dataclasses.asdict(report), "usable": False}))
    assert found.pop("build_sec") > 0 and wanted.pop("build_sec") > 0
    assert found == wanted


def test_unreadable_images_make_a_source_unusable_by_on_bad(tmp_path, capsys):
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    assert "\nusable\nnext    maskdm train photos" in printed(capsys, str(tmp_path), "--size", "32")
    (tmp_path / "bad.png").write_bytes(b"no image")
    assert "1 image of 4 cannot be read, but training" in " ".join(
        printed(capsys, str(tmp_path), code=2).split()
    )
    text = printed(capsys, str(tmp_path), "--on-bad", "skip")
    assert "1 image of 4 cannot be read and will be skipped" in " ".join(text.split())
    assert " --data.on-bad skip --hours 8" in text
    assert "on-bad error allows none" in printed(capsys, str(tmp_path), "--on-bad", "error", code=2)
    for i in range(3):
        (tmp_path / f"{i}.png").unlink()
    text = printed(capsys, str(tmp_path), "--on-bad", "skip", "--sheet", "no.png", code=2)
    assert "none of the 1 images can be read" in text and "-> no.png" not in text


def test_settings_are_the_recipes_unless_flags_say_otherwise(tmp_path, capsys):
    picture(0).save(tmp_path / "a.png")
    settings = tiny_settings()
    settings["data"] |= {"crop": "resize", "on_bad": "skip", "background": "black"}
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(json.loads(json.dumps(settings))))
    shown = ("shape", "crop", "on_bad", "background")

    def asked(*flags: str) -> list[Any]:
        found = json.loads(printed(capsys, str(tmp_path), "--json", *flags))
        return [found[name] for name in shown]

    assert asked() == [[64, 64, 3], "center", "auto", "white"]
    assert asked("--recipe", str(recipe)) == [[8, 8, 1], "resize", "skip", "black"]
    flags = "--size 8 12 --channels 4 --crop auto --on-bad error --background #102030".split()
    assert asked("--recipe", str(recipe), *flags) == [[8, 12, 4], "center", "error", "#102030"]
    # Blocks of 2x2 patches do not tile 3x3 patches.
    assert main(["check", str(tmp_path), "--recipe", str(recipe), "--size", "6"]) == 2
    assert "blocks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nowhere", "nowhere does not exist"),
        ("images --recipe digts", "did you mean digits"),
        ("images --size 30 --recipe celeba64", "not a multiple of model.patch_size 4: use 28"),
        ("images --sheet x.jpg", "use the name of a file that ends in .png"),
        ("store", "store is a packed store: check the images that it was made from"),
        ("celeba", "get it from https://mmlab"),
    ],
)
def test_what_cannot_be_checked_is_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    picture(0).save(tmp_path / "images" / "a.png")
    capsys.readouterr()
    assert main(["pack", "images", "store", "--size", "4"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "next    maskdm train photos32 --data.source store --data.size 4"
    )
    capsys.readouterr()
    assert main(["check", *arguments.split()]) == 2
    assert message in capsys.readouterr().err


def test_without_classes_it_says_why(tmp_path):
    def why(source: Path) -> str | None:
        return examine(Data(source=str(source)), progress=False).no_classes

    picture(0).save(tmp_path / "a.png")
    assert why(tmp_path) == "all images are in one folder"
    (tmp_path / "cat").mkdir()
    picture(1).save(tmp_path / "cat" / "b.png")
    assert why(tmp_path) == "some images are outside the class folders, such as a.png"
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "label": "cat"}\n')
    assert why(tmp_path) == "some images have a label and some do not, such as cat/b.png"
    np.savez(tmp_path / "x.npz", texture(0)[None], np.array([-1]))
    report = examine(Data(source=str(tmp_path / "x.npz")), progress=False)
    assert "labels range from -1 to -1" in texts(report, "error") and not report.usable


def test_shards_and_arrays_are_checked_too(tmp_path):
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for i in range(4):
            for suffix, content in (
                ("jpg", encoded(picture(i), "JPEG")),
                ("cls", str(i % 2).encode()),
                ("txt", b"a caption"),
            ):
                info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    report = examine(Data(source=str(tmp_path / "shard.tar"), size=32), progress=False)
    assert report.kind == "tar archive" and report.num_images == 4 and report.usable
    assert report.classes == {"0": 2, "1": 2} and report.skipped == {".txt": 4}
    images = np.stack([texture(i, channels=1) for i in (0, 1, 0)])
    np.savez(tmp_path / "images.npz", arr_0=images, arr_1=np.array([0, 2, 0]))
    report = examine(Data(source=str(tmp_path / "images.npz"), size=32), progress=False)
    assert report.formats == {"array": 3} and report.modes == {"L": 3}
    assert report.classes == {"0": 2, "1": 0, "2": 1}
    assert report.duplicates == [["00000000", "00000002"]] and not report.near_duplicates
    assert "all images are grey: --data.channels 1" in texts(report, "note")


def test_an_archive_that_ends_early_is_reported_with_what_came_before(tmp_path):
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as archive:
        for i in range(6):
            content = encoded(picture(i), "PNG")
            info = tarfile.TarInfo(f"{i:04d}.png")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        end = archive.offset - 1000  # within the last image
    path.write_bytes(path.read_bytes()[:end])
    report = examine(Data(source=str(path), size=8), progress=False)
    assert report.num_images == 4 and not report.usable  # the last whole one may lack a label
    assert "the source cannot be read to its end" in texts(report, "error")
    assert "ends early, after 4 images" in texts(report, "error")
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match="damaged or ends early, after 0 images"):
        examine(Data(source=str(path), size=8), progress=False)


def test_a_known_set_is_compared_with_what_it_should_be(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKDM_DATA", str(tmp_path))
    (tmp_path / "celeba").mkdir()
    picture(0, (178, 218)).save(tmp_path / "celeba" / "000001.jpg")
    picture(1, (178, 200)).save(tmp_path / "celeba" / "000002.jpg")
    data = Data(source="celeba", size=64, crop="center")
    report = examine(data, progress=False)
    warnings = texts(report, "warning")
    assert f"but this copy has 2: get the rest from {KNOWN['celeba'].where}" in warnings
    assert "have 178x218 pixels, but some here have 178x200" in warnings
    assert "papers use crop celeba for CelebA, aligned and" in texts(report, "note")
    report = examine(Data(source="celeba", size=144, crop="auto"), progress=False)
    assert report.crop == "celeba" and report.enlarged == ["000001.jpg"]
    ((name, why),) = report.unreadable
    assert name == "000002.jpg" and "this one is 178x200: use crop center" in why


def test_a_store_that_does_not_fit_on_the_disk_is_reported(tmp_path, monkeypatch):
    picture(0).save(tmp_path / "a.png")
    full = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    report = examine(Data(source=str(tmp_path), size=64), progress=False)
    assert "the image store needs 12.3 kB" in texts(report, "error")
    assert "MASKDM_CACHE" in texts(report, "error")


def test_squeezed_images_are_extreme_where_nothing_is_cut(tmp_path):
    picture(0, (100, 20)).save(tmp_path / "wide.png")
    report = examine(Data(source=str(tmp_path), size=16, crop="resize"), progress=False)
    assert report.extreme == ["wide.png"]
    assert "squeezed to less than half in one direction" in texts(report, "warning")
    report = examine(Data(source=str(tmp_path), size=(16, 80)), progress=False)
    assert report.extreme == []  # the prepared images have that shape too
    assert report.enlarged == []
    report = examine(Data(source=str(tmp_path), size=24), progress=False)
    assert report.enlarged == ["wide.png"]  # in height only


def groups_of(contents: list[bytes], size: int = 32) -> list[list[int]]:
    """Near duplicates among encoded images, by their places."""
    facts, _, _ = inspect_images(contents, Data(size=size), with_images=False)
    hashes = np.array([fact.difference_hash for fact in facts], np.uint64)
    thumbnails = np.stack([np.frombuffer(fact.thumbnail, np.uint8) for fact in facts])
    groups, is_whole = duplicates.near_groups(hashes, thumbnails)
    assert is_whole
    return [group.tolist() for group in groups]


@pytest.mark.parametrize("side", [24, 32, 48])
@pytest.mark.parametrize("quality", [75, 90])
def test_nearly_all_new_encodings_are_found_and_no_other_pictures(quality, side):
    originals = [picture(seed) for seed in range(60)]
    copies = [image.resize((side, side)) for image in originals]
    contents = [encoded(image, "PNG") for image in originals]
    contents += [encoded(image, "JPEG", quality=quality) for image in copies]
    found = groups_of(contents)
    assert all(len(group) == 2 and group[1] == group[0] + 60 for group in found)
    assert len(found) >= 54


@given(st.integers(0, 10**6), st.integers(1, 10**6), st.booleans())
def test_different_pictures_are_never_alike(seed, step, is_grainy):
    images = [texture(seed), texture(seed + step)]
    if is_grainy:
        rng = np.random.default_rng(seed)
        images = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in images]
    assert groups_of([encoded(Image.fromarray(image), "PNG") for image in images]) == []


@given(st.lists(st.integers(0, 255), min_size=2, max_size=4), st.integers(0, 2))
def test_flat_images_do_not_match_because_their_hash_is_empty(levels, noise):
    contents = []
    for i, level in enumerate(levels):
        grain = np.random.default_rng(i).integers(-noise, noise + 1, (32, 32, 3))
        flat = np.clip(level + grain, 0, 255).astype(np.uint8)
        contents.append(encoded(Image.fromarray(flat), "PNG"))
    assert groups_of(contents) == []


def test_faint_images_must_be_nearer_to_be_alike():
    rng = np.random.default_rng(0)
    signs = rng.choice([-1, 1], 256)
    other = signs * rng.choice([1, -1], 256, p=[0.8, 0.2])  # a fifth of the pixels differs
    hashes = np.zeros(2, np.uint64)
    faint = np.stack([128 + 4 * signs, 128 + 4 * other])  # by 1.6 levels in the mean
    assert duplicates.near_groups(hashes, faint.astype(np.uint8)) == ([], True)
    strong = np.stack([128 + 60 * signs, 128 + 60 * signs + 2])
    groups, _ = duplicates.near_groups(hashes, strong.astype(np.uint8))
    assert [group.tolist() for group in groups] == [[0, 1]]


@given(st.integers(0, 2**64 - 1), st.sets(st.integers(0, 63), max_size=5))
def test_hashes_meet_exactly_where_they_differ_in_at_most_three_bits(number, bits):
    other = number
    for bit in bits:
        other ^= 1 << bit
    thumbnail = texture(0, (16, 16), channels=1).reshape(1, -1)
    # Many others between them, in every band, of the same brightness.
    others = np.random.default_rng(0).integers(0, 2**63, 50, dtype=np.uint64)
    hashes = np.concatenate([np.array([number, other], np.uint64), others])
    groups, _ = duplicates.near_groups(hashes, thumbnail.repeat(52, axis=0))
    assert [group.tolist() for group in groups] == ([[0, 1]] if len(bits) <= 3 else [])


def test_where_too_many_images_look_alike_it_says_so(tmp_path, monkeypatch):
    thumbnails = np.stack([texture(i, (16, 16), channels=1).reshape(-1) for i in range(30)])
    hashes = np.zeros(30, np.uint64)
    assert duplicates.near_groups(hashes, thumbnails) == ([], True)
    level = thumbnails[:1].repeat(30, axis=0)
    monkeypatch.setattr(duplicates, "MAX_NEIGHBOURS", 3)
    assert not duplicates.near_groups(hashes, level)[1]
    monkeypatch.undo()
    monkeypatch.setattr(duplicates, "MAX_VERIFIED", 20)
    assert not duplicates.near_groups(hashes, level)[1]
    monkeypatch.setattr(check, "MAX_IMAGES", 1)
    for i in (0, 1, 2):
        picture(i // 2).save(tmp_path / f"{i}.png")
    report = examine(Data(source=str(tmp_path), size=8), progress=False)
    assert report.duplicates == [["0.png", "1.png"]]
    assert not report.near_duplicates_all and "too many images" in texts(report, "note")


def test_equal_pixels_are_equal_whatever_the_palette(tmp_path):
    for name, colours, places in (("a", [9, 200], [0, 1]), ("b", [200, 9], [1, 0])):
        image = Image.fromarray(np.array([places] * 2, np.uint8)).convert("P")
        image.putpalette([level for colour in colours for level in [colour] * 3])
        image.save(tmp_path / f"{name}.png")
    Image.fromarray(np.array([[9, 200]] * 2, np.uint8)).convert("RGB").save(tmp_path / "c.png")
    report = examine(Data(source=str(tmp_path), size=8), progress=False)
    assert report.duplicates == [["a.png", "b.png", "c.png"]]


def test_transparent_parts_show_mid_grey_on_the_sheet():
    pixels = np.array([[[10, 20, 30, 0], [10, 20, 30, 255]]], np.uint8)
    assert on_grey(pixels[None]).tolist() == [[[[128, 128, 128], [10, 20, 30]]]]
    grey = np.array([[[10, 0], [10, 255]]], np.uint8)
    assert on_grey(grey[None]).tolist() == [[[[128] * 3, [10] * 3]]]


@given(st.integers(0, 300), st.integers(1, 20), st.integers(1, 9))
def test_samples_are_spread_evenly_over_a_source_of_any_length(num, most, at_once):
    samples = Samples(most)
    numbers = np.arange(num, dtype=np.int64).reshape(-1, 1, 1, 1)
    for start in range(0, num, at_once):
        samples.add(numbers[start : start + at_once])
    chosen = [int(image.item()) for image in samples.images()]
    assert len(chosen) == min(num, most) and chosen == sorted(set(chosen))
    if num <= most:
        assert chosen == list(range(num))
    elif most > 1:
        gaps = np.diff([*chosen, num])
        assert chosen[0] == 0 and gaps.max() <= 2 * num / most + 2


def test_a_hidden_share_of_each_image_is_hidden():
    images = np.stack([texture(i, (24, 32)) for i in range(3)])  # (3, 32, 24, 3)
    images[..., 0][images[..., 0] == HIDDEN[0]] += 1
    generator = torch.Generator().manual_seed(0)
    for mask in (Mask(kind="block", block=2, rate=0.5), Mask(kind="patch", rate=0.7)):
        masked = hide(images, mask, 4, generator)
        is_hidden = (masked == HIDDEN).all(axis=-1)
        assert np.allclose(is_hidden.mean(axis=(1, 2)), effective_rate(mask, (8, 6)))
        assert np.array_equal(masked[~is_hidden], images[~is_hidden])
        cells = is_hidden.reshape(3, 8, 4, 6, 4)  # of 4x4 pixels: hidden as a whole or not at all
        assert np.array_equal(cells.any(axis=(2, 4)), cells.all(axis=(2, 4)))


def test_the_sheet_shows_images_plain_and_under_each_mask(mixed, tmp_path, capsys):
    path = tmp_path / "out" / "sheet.png"
    flags = ["--size", "16", "--on-bad", "skip", "--sheet", str(path)]
    assert f"-> {path}\n" in printed(capsys, str(mixed), *flags)
    first = path.read_bytes()
    with Image.open(path) as image:
        sheet = np.asarray(image)
    # 16 images in 3 rows of 6, 12 of them masked in 2 rows, 3 captions; tiles of 96 pixels.
    assert sheet.shape == (3 * 32 + 5 * 100 + 4, 6 * 100 + 4, 3)
    samples = Samples(36)
    examine(Data(source=str(mixed), size=16), False, samples)
    images = samples.images()
    assert len(images) == 16
    for i in (0, 5, 6, 15):
        top, left = 32 + i // 6 * 100, 4 + i % 6 * 100
        assert np.array_equal(sheet[top : top + 96 : 6, left : left + 96 : 6], images[i])
    top, left = 32 + 300 + 32, 4
    masked = sheet[top : top + 96 : 6, left : left + 96 : 6]
    assert (masked == HIDDEN).all(axis=-1).mean() >= 0.5  # celeba64 hides a half
    assert (masked == images[0]).all(axis=-1).mean() >= 0.5
    assert printed(capsys, str(mixed), *flags) and path.read_bytes() == first


@pytest.mark.parametrize(("shape", "side"), [((8, 8, 1), 96), ((300, 200, 4), 100)])
def test_a_sheet_can_be_looked_at_whatever_the_size(shape, side):
    recipe = Recipe(**tiny_settings() | {"data": {"size": shape[:2], "channels": shape[2]}})
    sheet = draw_sheet([np.full(shape, 255, np.uint8)], recipe)
    assert sheet.width == 6 * (side + 4) + 4


def test_four_channels_keep_transparency(mixed):
    report = examine(Data(source=str(mixed), size=16, channels=4), progress=False)
    assert "kept in 4 channels: --data.channels 3 removes them" in texts(report, "note")


@pytest.mark.parametrize(("channels", "background"), [(3, "navy"), (4, "white")])
def test_a_folder_of_everything_trains(mixed, tmp_path, capsys, channels, background):
    settings = json.loads(json.dumps(tiny_settings()))
    settings["data"] = {
        "source": str(mixed), "size": 16, "channels": channels, "background": background,
        "on_bad": "skip", "flip": True,
    }  # fmt: skip
    settings["model"]["num_classes"] = 2
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    run = tmp_path / "run"
    assert main(["train", str(tmp_path / "recipe.yaml"), "--out", str(run)]) == 0
    printed = capsys.readouterr().out
    assert f"data    16 images 16x16x{channels}" in printed and "6 unreadable" in printed
    assert "skipped: cat/latin-\\udce9.png (not an image), dog/bomb.png" in printed
    assert re.search(r"to read them again, remove \S+/store-\w+\n", printed)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines) and lines[-1]["step"] == 11
    out = tmp_path / "cats.npz"
    assert main(["sample", str(run), "--num", "2", "--label", "cat", "--out", str(out)]) == 0
    assert np.load(out)["arr_0"].shape == (2, 16, 16, channels)
    strict = ["train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "no")]
    assert main([*strict, "--data.on-bad", "auto"]) == 2
    assert "6 of 22 images cannot be read" in capsys.readouterr().err


def test_large_jpegs_that_training_reduces_are_checked_reduced_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("maskdm.images.decode.MAX_PIXELS", 200 * 100)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0, (400, 160)).save(tmp_path / "a.jpg", exif=exif, quality=95)
    picture(1, (200, 100)).save(tmp_path / "b.jpg", quality=95)
    for flags, code in (((), 0), (("--crop", "none"), 2)):  # which reduces nothing
        printed(capsys, str(tmp_path), "--size", "32", *flags, code=code)
    report = examine(Data(source=str(tmp_path), size=32), progress=False)
    assert sorted(report.sizes) == [(160, 400, 1), (200, 100, 1)]
    assert not report.unreadable and report.traits == {"EXIF rotation": 1}
    with pytest.raises(ValueError, match="a.jpg .decompression bomb: 400x160 pixels"):
        open_store(Data(source=str(tmp_path), size=32, draft=False), progress=False)
    assert len(open_store(Data(source=str(tmp_path), size=32), progress=False)) == 2


def test_wholly_transparent_and_nearly_black_images_are_reported(tmp_path):
    clear = np.dstack([texture(0), np.zeros((32, 32), np.uint8)])
    Image.fromarray(clear).save(tmp_path / "clear.png")
    levels = texture(1, channels=1)
    Image.fromarray(levels * np.uint16(16)).save(tmp_path / "twelve-bits.png")
    Image.fromarray(levels * np.uint16(257)).save(tmp_path / "sixteen-bits.png")
    Image.fromarray(levels // 16).save(tmp_path / "dark.png")
    report = examine(Data(source=str(tmp_path), size=16), progress=False)
    assert report.traits == {
        "16-bit": 2, "nearly black": 1, "nearly black, of 16 bits": 1, "wholly transparent": 1,
    }  # fmt: skip
    warnings = texts(report, "warning")
    assert "1 image is wholly transparent, so nothing but the background shows" in warnings
    assert "nearly black (no level above 16 of 255): do their 16 bits hold 12?" in warnings
    assert "1 image is nearly black (no level above 16 of 255): look at" in warnings


def test_damaged_exif_data_do_not_stop_the_doctor(tmp_path):
    entry = struct.pack("<HHHI", 1, 0x112, 2, 2) + b"6\0\0\0" + bytes(4)  # a text
    text = b"Exif\0\0II*\0\x08\0\0\0" + entry
    for i, exif in enumerate((text, b"Exif\0\0garbage!")):
        picture(i, (40, 24)).save(tmp_path / f"{i}.jpg", exif=exif)
        picture(i, (40, 24)).save(tmp_path / f"{i}.png", exif=exif)
    report = examine(Data(source=str(tmp_path), size=16), progress=False)
    assert report.num_readable == 4 and report.sizes == [(40, 24, 4)] and not report.traits


def test_a_png_that_is_damaged_within_is_unreadable_for_the_doctor_as_for_training(tmp_path):
    """Pillow decodes a PNG when it is asked for its EXIF data: an error then must not be lost."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    content = bytearray(file.getvalue())
    start = content.index(b"IDAT")
    (num,) = struct.unpack(">I", content[start - 4 : start])
    content[start + num // 2 : start + num // 2 + 64] = bytes(64)
    content[start + 4 + num : start + 8 + num] = struct.pack(
        ">I", zlib.crc32(content[start : start + 4 + num])
    )
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(content)
    Image.fromarray(pixels).save(tmp_path / "in" / "b.png")
    data = Data(source=str(tmp_path / "in"), size=8, on_bad="skip")
    left_out = open_store(data).manifest["left_out"]
    assert [name for name, _ in left_out] == ["a.png"]
    assert [name for name, _ in examine(data).unreadable] == ["a.png"]

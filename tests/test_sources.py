from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import http.server
import io
import json
import ntpath
import os
import re
import shutil
import tarfile
import threading
import tracemalloc
import unicodedata
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from maskdm.cli import main
from maskdm.images import huggingface
from maskdm.images.open import open_source
from maskdm.images.prepare import open_image
from maskdm.images.store import open_store
from maskdm.recipe import Data
from maskdm.training.start import refuse_recipe

NAMES = ["cat/a.png", "cat/b.png", "cat/c.PNG", "dog/a.jpg", "dog/b.png", "dog/c.png"]


def opened(source: Path | str, **data: object):
    return open_store(Data(source=str(source), **{"size": 8, **data}), progress=False)


def zipped(folder: Path, prefix: str = "") -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.rglob("*"):
            if file.is_file():
                archive.write(file, prefix + file.relative_to(folder).as_posix())
    return path


def tarred(folder: Path, mode: str = "w", suffix: str = ".tar") -> Path:
    path = folder.with_suffix(suffix)
    with tarfile.open(path, mode) as archive:
        for name in sorted(file for file in folder.rglob("*") if file.is_file()):
            archive.add(name, name.relative_to(folder).as_posix())
    return path


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def shown(store) -> list[int]:
    """The grey levels of a store of flat images."""
    return store.images[:][:, 0, 0, 0].tolist()


def test_digits_are_scikit_learns_with_0_to_16_spread_over_0_to_255():
    store, digits = opened("digits", channels=1), load_digits()
    assert store.images.shape == (1797, 8, 8, 1) and store.images.dtype == np.uint8
    assert np.array_equal(np.round(store.images[..., 0] * (16 / 255)), digits.images)
    assert np.array_equal(store.labels, digits.target)


def test_a_folder_its_zip_and_its_tars_give_the_same_images_in_the_same_order(image_folder):
    folder = opened(image_folder)
    assert [item.name for item in open_source(str(image_folder)).items()] == NAMES
    assert folder.manifest["passed_over"] == {".txt": 1, "hidden": 2}
    archives = [
        zipped(image_folder),
        tarred(image_folder),
        tarred(image_folder, "w:gz", ".tar.gz"),
        tarred(image_folder, "w:xz", ".tar.xz"),
    ]
    for path in archives:
        assert [item.name for item in open_source(str(path)).items()] == NAMES
        store = opened(path)
        assert np.array_equal(store.images, folder.images)
        assert store.labels.tolist() == folder.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert store.manifest["class_names"] == folder.manifest["class_names"] == ["cat", "dog"]
        assert store.manifest["passed_over"] == folder.manifest["passed_over"]


def test_folders_that_all_images_share_are_not_classes(image_folder):
    store = opened(zipped(image_folder, "top/train/"))
    assert store.manifest["class_names"] == ["cat", "dog"]
    flat = opened(image_folder / "cat")
    assert flat.labels is None and flat.manifest["class_names"] == []


def test_images_beside_class_folders_mean_no_labels(image_folder):
    shutil.copy(image_folder / "cat" / "a.png", image_folder / "stray.png")
    store = opened(image_folder)
    assert store.labels is None and store.manifest["class_names"] == []


@pytest.mark.parametrize("packed", [False, True])
def test_label_files_come_before_folders(image_folder, packed):
    def source() -> Path:
        return zipped(image_folder) if packed else image_folder

    lines = [{"file_name": name, "label": name[4]} for name in NAMES]
    (image_folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    store = opened(source())
    assert store.manifest["class_names"] == ["a", "b", "c"]
    assert store.labels.tolist() == [0, 1, 2, 0, 1, 2]
    (image_folder / "metadata.jsonl").unlink()

    below = [{"file_name": name[4:], "label": "low"} for name in NAMES[:3]]  # relative to itself
    (image_folder / "cat" / "metadata.jsonl").write_text("\n".join(map(json.dumps, below)))
    assert opened(source()).labels is None  # the dogs have none
    (image_folder / "cat" / "metadata.jsonl").unlink()

    numbers = {"labels": [[name, 5 - i] for i, name in enumerate(NAMES)]}
    (image_folder / "dataset.json").write_text(json.dumps(numbers))
    store = opened(source())
    assert store.labels.tolist() == [5, 4, 3, 2, 1, 0]
    assert store.manifest["class_names"] == ["0", "1", "2", "3", "4", "5"]

    (image_folder / "dataset.json").write_text('{"labels": null}')
    assert opened(source()).manifest["class_names"] == ["cat", "dog"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.jsonl", '{"name": "a.png"}', "'file_name' is missing; expected lines like"),
        ("metadata.jsonl", '{"file_name": "a.png", "label": [1]}', "neither a name nor a number"),
        ("metadata.jsonl", "no json", "metadata.jsonl: Expecting value"),
        ("dataset.json", '{"labels": [["cat/a.png"]]}', "dataset.json: not enough values"),
        ("dataset.json", "[]", r'expected \{"labels": \[\["x.png", 0\]'),
    ],
)
def test_label_files_of_another_form_are_refused(image_folder, name, text, message):
    (image_folder / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        opened(image_folder)


def test_class_numbers_must_be_class_numbers(image_folder):
    for number, span in ((-1, "-1 to 0"), (10**9, "0 to 10000")):
        labels = [[name, 0] for name in NAMES[1:]] + [[NAMES[0], number]]
        (image_folder / "dataset.json").write_text(json.dumps({"labels": labels}))
        with pytest.raises(ValueError, match=f"labels range from {span}"):
            opened(image_folder)


def test_links_are_followed_once_and_dangling_ones_are_unreadable_images(image_folder, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "cats").symlink_to(image_folder / "cat")
    (linked / "loop").symlink_to(linked)
    (linked / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (linked / "round.png").symlink_to(linked / "round.png")
    os.mkfifo(linked / "pipe.png")  # would be waited for, for ever
    store = opened(linked, on_bad="skip")
    assert len(store) == 3
    assert store.manifest["left_out"] == [
        ["gone.png", "dangling link: its target does not exist"],
        ["pipe.png", "not a regular file"],
        ["round.png", "too many levels of symbolic links"],
    ]


@contextlib.contextmanager
def without_rights(*folders: Path):
    """As a user who may read no more than the files' modes say, where the tests run as root."""
    if os.geteuid():
        yield
        return
    for folder in folders:
        for path in (folder, *folder.parents):
            path.chmod(path.stat().st_mode | 0o055)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_files_without_read_permission_are_reported(tmp_path, monkeypatch):
    folder, cache = tmp_path / "images", tmp_path / "cache"
    for path in (folder, cache):
        path.mkdir()
        path.chmod(0o777)
    monkeypatch.setenv("MASKDM_CACHE", str(cache))
    for i in range(2):
        (folder / f"{i}.png").write_bytes(png(i))
    (folder / "1.png").chmod(0)
    with without_rights(folder):
        store = opened(folder, on_bad="skip")
    assert shown(store) == [0] and store.manifest["left_out"] == [["1.png", "permission denied"]]
    (folder / "closed").mkdir(mode=0)
    with (
        pytest.raises(ValueError, match="cannot read folder .*closed: Permission denied"),
        without_rights(folder),
    ):
        opened(folder, on_bad="skip")


def test_names_may_hold_any_bytes(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    names = ["ä ö.png", "日本語.png", "a\nb.png", "🙂.png", os.fsdecode(b"\xff\xfe.png")]
    for i, name in enumerate(names):
        (folder / name).write_bytes(png(i))
    (folder / os.fsdecode(b"bad\xff.png")).write_text("no image")
    store = opened(folder, on_bad="skip")
    assert sorted(shown(store)) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"bad\\udcff.png \(not an image\)") as caught:
        opened(folder, on_bad="error")
    str(caught.value).encode("utf-8")  # can be printed anywhere


def test_shards_are_read_in_order_with_their_labels(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / ".DS_Store").write_bytes(b"litter")
    for shard in range(3):
        files = {}
        for i in range(2):
            key = f"{shard:03d}{i}"
            files |= {f"{key}.cls": str(1 - i).encode(), f"{key}.png": png(10 * shard + i)}
            files |= {f"{key}.mask.png": png(200), f"{key}.txt": b"caption"}
        write_tar(folder / f"train-{shard:02d}.tar", files)
    order, labels = [0, 1, 10, 11, 20, 21], [1, 0, 1, 0, 1, 0]
    for name in (folder, f"{folder}/train-*.tar", f"{folder}/train-{{00..02}}.tar"):
        store = opened(name)
        assert shown(store) == order and store.labels.tolist() == labels
        assert store.manifest["passed_over"] == {".mask.png": 6, ".txt": 6}
    assert shown(opened(f"{folder}/train-{{00,02}}.tar")) == [0, 1, 20, 21]
    with pytest.raises(ValueError, match=r"no such file: .*train-03.tar"):
        opened(f"{folder}/train-{{00..03}}.tar")
    assert shown(opened(f"{folder}/train-{{02,00}}.tar")) == [
        20,
        21,
        0,
        1,
    ]
    with pytest.raises(ValueError, match=r"no\*.tar: no such file"):
        opened(f"{folder}/no*.tar")
    (folder / "a.png").write_bytes(png(1))
    with pytest.raises(ValueError, match="pattern must match tars only, but .*a.png is not one"):
        opened(f"{folder}/*.png")
    with pytest.raises(ValueError, match="more than 1,000,000 files"):
        opened(f"{folder}/{{0..9999999}}.tar")


def test_labels_in_samples_are_names_numbers_or_json(tmp_path):
    files = {"a.png": png(1), "a.json": b'{"label": "zebra"}', "b.json": b'{"label": "ape"}'}
    store = opened(write_tar(tmp_path / "named.tar", {**files, "b.png": png(2)}))
    assert store.labels.tolist() == [1, 0] and store.manifest["class_names"] == ["ape", "zebra"]
    plain = write_tar(tmp_path / "plain.tar", {"x/a.one.png": png(1), "x/a.two.png": png(2)})
    assert shown(opened(plain)) == [1, 2]
    with pytest.raises(ValueError, match=r"b.json is not a label"):
        opened(write_tar(tmp_path / "bad.tar", {"b.png": png(1), "b.json": b"{"}))


@contextlib.contextmanager
def served(folder: Path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            return

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_shards_at_urls_are_read_without_a_copy(tmp_path):
    for i in range(2):
        write_tar(tmp_path / f"s-{i}.tar", {f"{i}.png": png(i), f"{i}.cls": b"7"})
    with served(tmp_path) as url:
        store = opened(url + "/s-{0..1}.tar")
        assert shown(store) == [0, 1] and store.labels.tolist() == [7, 7]
        with pytest.raises(ValueError, match="cannot reach .*s-2.tar: "):
            opened(url + "/s-{0..2}.tar")
    with pytest.raises(ValueError, match="nosuch://x.tar.*[Pp]rotocol"):
        opened("nosuch://x.tar")


@pytest.mark.parametrize("keys", [("arr_0", "arr_1"), ("images", "labels"), ("x", "y")])
def test_arrays_as_samplers_write_them(tmp_path, keys):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", **dict(zip(keys, (images, np.arange(5)), strict=True)))
    np.savez_compressed(tmp_path / "b.npz", **{keys[0]: images})
    np.save(tmp_path / "c.npy", images)
    stores = [opened(tmp_path / name, crop="none") for name in ("a.npz", "b.npz", "c.npy")]
    assert all(np.array_equal(store.images, images) for store in stores)
    assert stores[0].labels.tolist() == [0, 1, 2, 3, 4]
    assert stores[1].labels is None


def test_arrays_of_every_number_of_channels(tmp_path):
    generator = np.random.default_rng(0)
    for channels in (1, 2, 3, 4):
        images = generator.integers(0, 256, (3, 8, 8, channels), dtype=np.uint8)
        if channels in (2, 4):
            images[..., -1] = 255
        np.save(tmp_path / f"{channels}.npy", images)
        store = opened(tmp_path / f"{channels}.npy", channels=channels, crop="none")
        assert np.array_equal(store.images, images)
    deep = generator.integers(0, 65536, (3, 8, 8), dtype=np.uint16)
    np.save(tmp_path / "deep.npy", deep)
    store = opened(tmp_path / "deep.npy", channels=1, crop="none")
    assert np.array_equal(store.images[..., 0], np.round(deep / 257))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), "its type is float32: save uint8"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"is \(N, C, H, W\): transpose it"),
        (np.zeros((8, 8), np.uint8), r"its shape is \(8, 8\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), "it is empty"),
        (np.zeros((2, 8, 8, 3), np.uint16), "16-bit images must be grey"),
        (np.asfortranarray(np.zeros((2, 8, 8, 3), np.uint8)), "Fortran order"),
        (np.array([{}, {}]), "its type is object"),
    ],
)
def test_other_arrays_are_refused(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    np.savez(tmp_path / "b.npz", arr_0=array, allow_pickle=True)
    for name in ("a.npy", "b.npz"):
        with pytest.raises(ValueError, match=f"{name} is not an array of images: .*{message}"):
            opened(tmp_path / name)


def test_files_that_are_not_arrays_or_end_early_are_refused(tmp_path):
    images = np.zeros((4, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "keys.npz", pictures=images)
    np.savez(tmp_path / "labels.npz", arr_0=images, arr_1=np.zeros(3, np.int64))
    np.save(tmp_path / "short.npy", images)
    content = (tmp_path / "short.npy").read_bytes()
    (tmp_path / "short.npy").write_bytes(content[:-100])
    (tmp_path / "text.npy").write_text("text")
    (tmp_path / "text.npz").write_text("text")
    for name, message in (
        ("keys.npz", "it has pictures, not arr_0 or images or x"),
        ("labels.npz", r"its labels are int64 \(3,\), not integers \(4,\)"),
        ("short.npy", "ends early"),
        ("text.npy", "is not an array of images"),
        ("text.npz", "is not an array of images"),
    ):
        with pytest.raises(ValueError, match=f"{name} {message}|{name} is not an array.*{message}"):
            opened(tmp_path / name)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Hugging Face's library, with a cache of its own and no network."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return datasets


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_hugging_face_data_sets_of_a_folder(image_folder, tmp_path, offline):
    folder = opened(image_folder)
    (image_folder / "cat" / "._a.png").unlink()  # which they take for an image
    streamed = opened(f"hf:{image_folder}")
    assert np.array_equal(streamed.images[:], folder.images)
    assert streamed.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert streamed.manifest["class_names"] == ["cat", "dog"]

    loaded = offline.load_dataset(str(image_folder), split="train")
    loaded.to_parquet(str(tmp_path / "parquet" / "test-0.parquet"))
    loaded.save_to_disk(str(tmp_path / "saved"))
    offline.DatasetDict(test=loaded).save_to_disk(str(tmp_path / "splits"))
    for name in (f"hf:{tmp_path}/parquet:test", f"hf:{tmp_path}/saved", f"{tmp_path}/saved",
                 f"hf:{tmp_path}/splits:test"):  # fmt: skip
        store = opened(name)
        assert np.array_equal(store.images, streamed.images)
        assert store.manifest["class_names"] == ["cat", "dog"]
    with pytest.raises(ValueError, match="it has no split train: use one of test"):
        opened(f"hf:{tmp_path}/splits")
    with pytest.raises(ValueError, match=r"Bad split: nope. Available splits: \['test'\]"):
        opened(f"hf:{tmp_path}/parquet:nope")
    with pytest.raises(ValueError, match="cannot open data.source .*nothing: .*nobody/nothing"):
        opened("hf:nobody/nothing")
    with pytest.raises(ValueError, match="expected hf:NAME"):
        opened("hf:a:b:c:d")
    numbers = offline.Dataset.from_dict({"number": [1, 2]})
    numbers.save_to_disk(str(tmp_path / "numbers"))
    with pytest.raises(ValueError, match="has no images among number"):
        opened(tmp_path / "numbers")


def test_hugging_face_folders_may_have_a_windows_drive(monkeypatch):
    opened_as, columns = [], ("image", None)
    monkeypatch.setattr(huggingface.os.path, "splitdrive", ntpath.splitdrive)
    monkeypatch.setattr(huggingface, "_open", lambda *names: opened_as.append(names) or (None, ""))
    monkeypatch.setattr(huggingface.HuggingFaceSource, "_columns", lambda self, name: columns)
    for name in (r"hf:C:\photos", r"hf:C:\photos:test", "hf:owner/name:config:test"):
        open_source(name)
    assert opened_as == [
        (r"C:\photos", None, "train"),
        (r"C:\photos", None, "test"),
        ("owner/name", "config", "test"),
    ]


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_a_changed_data_set_is_another(image_folder, offline):
    (image_folder / "cat" / "._a.png").unlink()
    before = opened(f"hf:{image_folder}")
    (image_folder / "dog" / "b.png").write_bytes(png(5))
    os.utime(image_folder / "dog" / "b.png", (1, 1))
    after = opened(f"hf:{image_folder}")
    assert before.manifest["fingerprint"] != after.manifest["fingerprint"]
    assert (after.images[4] == 5).all()


def test_a_changed_data_set_is_another_whose_readme_names_its_files(image_folder, offline):
    """The library's own hash then leaves out the files' states."""
    (image_folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: '**/*.png'\n---\n"
    )
    before = opened(f"hf:{image_folder}").manifest["fingerprint"]
    assert opened(f"hf:{image_folder}").manifest["fingerprint"] == before
    os.utime(image_folder / "dog" / "b.png", (1, 1))
    assert opened(f"hf:{image_folder}").manifest["fingerprint"] != before


def test_label_files_of_a_recycle_bin_are_no_matter(image_folder):
    (image_folder / "#recycle").mkdir()
    row = {"file_name": "old.png", "label": 3}
    (image_folder / "#recycle" / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    assert opened(image_folder).manifest["class_names"] == ["cat", "dog"]


@pytest.mark.parametrize("name", ["digits", "faces"])
def test_a_folder_with_the_name_of_a_set_is_pointed_out(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    with pytest.warns(UserWarning, match=f"not the folder here: ./{name} is that"):
        open_source(name)
    (tmp_path / name / "recipe.yaml").touch()  # a run
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_source(name)


def test_sources_without_images_are_refused(tmp_path):
    def refused(source: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            opened(source, on_bad="skip")

    for empty in ("", " "):
        with pytest.raises(ValueError, match="the name is empty"):
            opened(empty)
    refused(tmp_path / "nowhere", "does not exist: use a folder, zip, tar, .npz or .npy")
    refused(tmp_path, r"no images in folder .*it is empty")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.jxl").write_text("x")
    refused(tmp_path, r"no images in folder .*other files: 1 .txt, 1 .jxl")
    refused(tmp_path / "a.txt", "is a file, but not a zip, tar")
    refused(write_tar(tmp_path / "c.tar", {"a.txt": b"x"}), "no images in .*c.tar")
    (tmp_path / "b.png").write_bytes(b"no image")
    (tmp_path / "e.png").write_bytes(b"")
    refused(tmp_path, r"none of its 2 images can be read: b.png \(not an image\), e.png")


def test_a_missing_known_set_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKDM_DATA", str(tmp_path))
    with pytest.raises(ValueError) as caught:
        opened("celeba")
    message = str(caught.value)
    assert "mmlab.ie.cuhk.edu.hk" in message and f"not at {tmp_path}/celeba" in message
    assert "202,599 images" in message and "--data.source FOLDER" in message
    pixels = np.zeros((218, 178, 3), np.uint8)
    pixels[121 - 64 : 121 + 64, 89 - 64 : 89 + 64] = 255
    with zipfile.ZipFile(tmp_path / "celeba.zip", "w") as archive:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        archive.writestr("img_align_celeba/000001.png", file.getvalue())
    store = opened("celeba", size=64)
    assert store.manifest["crop"] == "celeba" and (store.images[:] == 255).all()
    assert (opened("celeba", size=64, crop="center").images[:] == 0).any()


@pytest.mark.parametrize("cut", [0.2, 0.5, 0.7])
def test_archives_that_end_early_are_refused(image_folder, cut):
    for path in (zipped(image_folder), tarred(image_folder), tarred(image_folder, "w:gz", ".tgz")):
        content = path.read_bytes()
        path.write_bytes(content[: int(cut * len(content))])
        with pytest.raises(ValueError, match="is damaged or ends early"):
            opened(path, on_bad="skip")


def test_a_tar_cut_between_two_files_is_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.png": png(1), "b.png": png(2)})
    with tarfile.open(path) as archive:
        start = archive.getmembers()[1].offset
    path.write_bytes(path.read_bytes()[:start])
    with pytest.raises(ValueError, match=r"ends early, after [01] images: empty header"):
        opened(path)


def test_nothing_is_written_outside_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path / "cache"))
    files = {"../../up.png": png(1), "/abs.png": png(2), "ok/../../x.png": png(3), "a.png": png(4)}
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    write_tar(tmp_path / "evil.tar", files)
    before = {path for path in tmp_path.parent.rglob("*") if "cache" not in path.parts}
    for name in ("evil.zip", "evil.tar"):
        store = opened(tmp_path / name)
        assert set(shown(store)) <= {1, 2, 3, 4} and 4 in shown(store)
    after = {path for path in tmp_path.parent.rglob("*") if "cache" not in path.parts}
    assert after - before <= {tmp_path / "cache"} | set((tmp_path / "cache").rglob("*"))
    assert not Path("/abs.png").exists()


def test_files_that_unpack_to_too_much_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr("maskdm.images.archives.MAX_FILE_BYTES", 10_000)
    files = {"a.png": png(1), "bomb.png": bytes(20_000)}
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    write_tar(tmp_path / "a.tar", files)
    for name in ("a.zip", "a.tar"):
        store = opened(tmp_path / name, on_bad="skip")
        bomb = ["bomb.png", "decompression bomb: 20,000 bytes unpacked"]
        assert shown(store) == [1] and store.manifest["left_out"] == [bomb]


def test_a_damaged_file_in_a_zip_is_a_bad_image(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", png(1))
        archive.writestr("b.png", png(2))
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[content.find(png(2)) + 50] ^= 255
    (tmp_path / "a.zip").write_bytes(content)
    store = opened(tmp_path / "a.zip", on_bad="skip")
    assert shown(store) == [1] and "Bad CRC-32" in store.manifest["left_out"][0][1]


def test_items_hold_what_can_be_decoded(image_folder):
    (item, *_) = open_source(str(zipped(image_folder))).items()
    assert open_image(item.content, Data()).size == (8, 8)


def test_a_tar_that_holds_a_zip_is_read_as_a_tar(tmp_path):
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("inner.png", png(9))
    path = write_tar(tmp_path / "a.tar", {"a.png": png(1), "extra.zip": inner.getvalue()})
    assert shown(opened(path)) == [1]
    assert shown(opened(path.rename(tmp_path / "nameless"))) == [1]


def test_names_that_begin_alike_are_not_a_sample(tmp_path):
    names = ["cat.png", "cat.2.png", *(f"film.{i:04d}.png" for i in range(200))]
    path = write_tar(tmp_path / "a.tar", {name: png(i) for i, name in enumerate(names)})
    assert shown(opened(path)) == list(range(202))


def test_numbers_and_names_are_not_mixed(tmp_path):
    files = {"a.png": png(1), "a.cls": b"1", "b.png": png(2), "b.cls": b"unknown"}
    with pytest.raises(ValueError, match=r"numbers \(1\) and some are names \(unknown\): use"):
        opened(write_tar(tmp_path / "a.tar", files))
    files |= {"a.cls": b"01", "b.cls": b"1x"}  # 01 is a name
    assert opened(write_tar(tmp_path / "b.tar", files)).manifest["class_names"] == ["01", "1x"]


def test_folders_come_before_links_to_them(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(png(1))
    (tmp_path / "a").symlink_to(tmp_path / "x")
    (tmp_path / "z").symlink_to(tmp_path / "x")
    assert [item.name for item in open_source(str(tmp_path)).items()] == ["x/a.png", "y/a.png"]


def test_damaged_files_are_errors_in_a_line_never_a_crash(tmp_path):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    files = {f"{i}.png": png(i) for i in range(3)}
    whole = {}
    for suffix, method in (("zip", zipfile.ZIP_LZMA), ("ZIP", zipfile.ZIP_BZIP2)):
        with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
            archive.writestr("metadata.jsonl", '{"file_name": "0.png", "label": "x"}')
            for name, content in files.items():
                archive.writestr(name, content)
        whole[f"{suffix}.zip"] = (tmp_path / "a.zip").read_bytes()
    np.savez_compressed(tmp_path / "a.npz", arr_0=images, arr_1=np.arange(3))
    np.save(tmp_path / "a.npy", images)
    write_tar(tmp_path / "a.tar", files)
    whole |= {name: (tmp_path / name).read_bytes() for name in ("a.npz", "a.npy", "a.tar")}
    refused = 0
    for turn in range(60):
        for name, content in whole.items():
            damaged = bytearray(content)
            for place in generator.integers(0, len(damaged), 1 + turn % 4):
                damaged[place] = generator.integers(256)
            (tmp_path / name).write_bytes(damaged)
            try:
                for item in open_source(str(tmp_path / name)).items():
                    assert isinstance(item.content, bytes | np.ndarray | Exception)
            except ValueError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 20


def test_label_files_that_do_not_fit_are_reported(image_folder, capsys):
    def notes() -> list[str]:
        return opened(image_folder).manifest["notes"]

    file = image_folder / "metadata.jsonl"
    assert notes() == []
    file.write_text('{"file_name": "cat/a.png", "text": "a cat"}')
    assert notes() == ["metadata.jsonl has no labels, so class folders are used"]
    lines = [{"file_name": name, "label": "x"} for name in [*NAMES[1:], "cat/zz.png"]]
    file.write_text("\n".join(map(json.dumps, lines)))
    some, absent = notes()
    assert some == "metadata.jsonl labels 5 of 6 images, not cat/a.png, so there are no classes"
    assert absent == "metadata.jsonl names 1 missing image, such as cat/zz.png"
    assert ".jsonl" not in opened(image_folder).manifest["passed_over"]
    main(["check", str(image_folder), "--size", "8"])
    assert "warning  metadata.jsonl labels 5 of 6 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.tar", r"use a pattern in quotes, 'FOLDER/\*.tar'"),
        ("a.zip", "use the zip itself"),
        ("a.parquet", "use hf:FOLDER"),
        ("sub/data-0.arrow", "use the folder that save_to_disk wrote"),
    ],
)
def test_folders_of_something_else_say_what_to_use(tmp_path, name, message):
    (tmp_path / "sub").mkdir()
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / "README.md").write_text("x")
    with pytest.raises(ValueError, match=f"no images in folder.*{message}"):
        opened(tmp_path)


def test_files_of_something_else_say_what_to_use(tmp_path):
    for name, message in {
        "a.png": f"use its folder, {tmp_path}",
        "a.parquet": f"use hf:{tmp_path}",
        "a.mp4": "use one of these, or a folder",
    }.items():
        (tmp_path / name).write_bytes(b"x" * 600)
        with pytest.raises(ValueError, match=f"is a file, but not a zip, tar.*{message}"):
            opened(tmp_path / name)


def test_runs_do_not_lie_among_the_images_of_a_known_set(changed, tmp_path, monkeypatch):
    monkeypatch.setenv("MASKDM_DATA", str(tmp_path))
    (tmp_path / "ffhq" / "00000").mkdir(parents=True)
    recipe = changed(data={"source": "ffhq", "size": 8, "channels": 1})
    with pytest.raises(ValueError, match="lies in the image folder ffhq"):
        refuse_recipe(recipe, tmp_path / "ffhq" / "run", 1)
    refuse_recipe(recipe, tmp_path / "run", 1)


def test_labels_without_an_image_are_skipped(tmp_path):
    files = {"notes.json": b"{broken", "7.cls": b"1", "a.png": png(3)}
    store = opened(write_tar(tmp_path / "a.tar", files))
    assert shown(store) == [3] and store.labels is None
    assert store.manifest["passed_over"] == {".cls": 1, ".json": 1}


LABELS = [{"file_name": "0.png", "label": "cat"}, {"file_name": "1.png", "label": "dog"}]


def two_images(folder: Path, lines: str | bytes, name: str = "metadata.jsonl") -> Path:
    """A folder of 0.png and 1.png with a label file."""
    folder.mkdir(exist_ok=True)
    for i in range(2):
        (folder / f"{i}.png").write_bytes(png(i))
    (folder / name).write_bytes(lines.encode() if isinstance(lines, str) else lines)
    return folder


def jsonl(*records: dict) -> str:
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_label_files_of_other_editors_are_read(tmp_path, encoding, end):
    captions = "one\u2028two", "one\u2029two\x85three"  # which end lines for Python alone
    records = [{**one, "text": text} for one, text in zip(LABELS, captions, strict=True)]
    text = jsonl(*records).replace("\n", end)
    store = opened(two_images(tmp_path, text.encode(encoding)))
    assert store.labels.tolist() == [0, 1] and store.manifest["class_names"] == ["cat", "dog"]
    bom = "\ufeffcat".encode()
    tar = write_tar(tmp_path / "a.tar", {"0.png": png(0), "0.cls": bom})
    assert opened(tar).manifest["class_names"] == ["cat"]


def test_an_image_with_two_labels_is_refused(tmp_path):
    folder = two_images(tmp_path, jsonl(*LABELS, {"file_name": "0.png", "label": "dog"}))
    with pytest.raises(ValueError, match="metadata.jsonl: 0.png has two labels, cat and dog"):
        opened(folder)
    again = [{"file_name": "0.png", "label": "cat"}, {"file_name": "0.png", "text": "a caption"}]
    store = opened(two_images(tmp_path, jsonl(*LABELS, *again)))
    assert store.manifest["class_names"] == ["cat", "dog"] and store.labels.tolist() == [0, 1]
    (folder / "dataset.json").write_text('{"labels": [["0.png", 3]]}')
    with pytest.raises(ValueError, match="label of 0.png is cat, but 3 in another label file"):
        opened(folder)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_metadata_csv_gives_labels(tmp_path, delimiter):
    rows = ["file_name,text,label", '0.png,"one\ntwo",dog', "1.png,,cat"]
    text = "\r\n".join(row.replace(",", delimiter) for row in rows)
    folder = two_images(tmp_path, text.encode("utf-8-sig"), "metadata.csv")
    store = opened(folder)
    assert store.labels.tolist() == [1, 0] and store.manifest["class_names"] == ["cat", "dog"]
    (folder / "metadata.csv").write_text("label,file_name\n5,0.png\n7,1.png\n")
    assert opened(folder).labels.tolist() == [5, 7]
    store = opened(two_images(folder, jsonl(*LABELS)))  # metadata.jsonl beside it
    assert store.labels.tolist() == [0, 1]
    assert store.manifest["notes"] == ["metadata.csv is ignored: metadata.jsonl beside it is used"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dataset.json", b'{"name": "BRATS", "labels": {"background": 0, "tumor": 1}}'),
        ("dataset.json", b'{"name": "BRATS"}'),
        ("metadata.csv", b"id,price\n1,2\n"),
        ("metadata.csv", b"caf\xe9,label\n"),
        ("metadata.csv", b"file_name,label\ncat/a.png,x\ncat/a.png,y\n"),
    ],
)
def test_another_programs_label_file_is_ignored_with_a_note(image_folder, name, content):
    before = open_source(str(image_folder)).fingerprint
    (image_folder / name).write_bytes(content)
    store = opened(image_folder)
    assert store.manifest["class_names"] == ["cat", "dog"]
    assert [note.partition(":")[0] for note in store.manifest["notes"]] == [f"{name} is ignored"]
    assert store.manifest["fingerprint"] == before


def test_a_malformed_label_file_says_how_to_go_on(image_folder):
    (image_folder / "metadata.jsonl").write_text("no json")
    with pytest.raises(ValueError, match="Fix it, or rename it if it is another program's"):
        opened(image_folder)


def test_names_in_label_files_match_in_the_forms_of_other_systems(tmp_path):
    (tmp_path / "sub").mkdir()
    names = {"sub/caf\u00e9.png": "NFD", "sub/th\u00e9.png": "NFC", "sub/plain.png": "NFC"}
    for i, (name, form) in enumerate(names.items()):
        (tmp_path / unicodedata.normalize(form, name)).write_bytes(png(i))
    other = ["sub/caf\u00e9.png", unicodedata.normalize("NFD", "sub/th\u00e9.png")]
    records = [{"file_name": name, "label": name[4]} for name in [*other, r"sub\plain.png"]]
    (tmp_path / "metadata.jsonl").write_text(jsonl(*records), encoding="utf-8")
    store = opened(tmp_path)
    assert store.manifest["notes"] == []
    by_level = dict(zip(shown(store), store.labels.tolist(), strict=True))
    assert store.manifest["class_names"] == ["c", "p", "t"] and by_level == {0: 0, 1: 2, 2: 1}


def test_class_folders_that_are_no_utf_8_are_classes(tmp_path, capsys):
    for i, folder in enumerate((b"dog", b"caf\xe9")):
        path = tmp_path / "images" / os.fsdecode(folder)
        path.mkdir(parents=True)
        (path / "a.png").write_bytes(png(i))
    for source in (tmp_path / "images", tarred(tmp_path / "images")):
        store = opened(source)
        assert store.manifest["class_names"] == [r"caf\udce9", "dog"]
        assert dict(zip(shown(store), store.labels.tolist(), strict=True)) == {0: 1, 1: 0}
    settings = ["--data.size=8", "--data.channels=1", "--model.num-classes=2", "--num-previews=0"]
    stages = [
        f"--stages.{i}.{one}" for i in (0, 1) for one in ("steps=1", "batch-size=2", "warmup=0")
    ]
    out = str(tmp_path / "run")
    source = f"--data.source={tmp_path}/images"
    assert main(["train", "digits", source, *settings, *stages, "--out", out]) == 0
    assert main(["sample", out, "--num", "1", "--label", r"caf\udce9", "--out", f"{out}.png"]) == 0


LITTER = [
    "cat/@eaDir/1.png/SYNOPHOTO_THUMB_M.png", "#recycle/2.png", "$RECYCLE.BIN/S-1/3.png",
    "@Recycle/4.png", "dog/.thumbnails/5.png", ".Trash-1000/files/6.png", "__MACOSX/._7.png",
    "System Volume Information/8.png", "lost+found/9.png",
]  # fmt: skip


def test_thumbnails_and_recycle_bins_of_other_systems_are_skipped(
    image_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path / "cache"))
    before = open_source(str(image_folder)).fingerprint
    for name in LITTER:
        (image_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (image_folder / name).write_bytes(png(9))
    for source in (image_folder, zipped(image_folder), tarred(image_folder)):
        store = opened(source)
        assert len(store) == 6 and store.manifest["class_names"] == ["cat", "dog"]
        assert store.manifest["notes"] == []
        assert store.manifest["passed_over"] == {
            ".txt": 1, "hidden": 5, "@eaDir": 1, "#recycle": 1, "$RECYCLE.BIN": 1, "@Recycle": 1,
            "System Volume Information": 1, "lost+found": 1,
        }  # fmt: skip
    assert open_source(str(image_folder)).fingerprint == before
    shards = image_folder.parent / "shards"
    (shards / "@eaDir").mkdir(parents=True)
    write_tar(shards / "a.tar", {"a.png": png(1)})
    assert shown(opened(shards)) == [1]


def test_folders_of_thumbnails_and_empty_class_folders_are_noted(image_folder):
    def notes() -> list[str]:
        return open_source(str(image_folder)).notes

    before = open_source(str(image_folder)).fingerprint
    (image_folder / "bird" / "young").mkdir(parents=True)
    (image_folder / "fish").mkdir()
    (image_folder / "fish" / "list.txt").write_text("")
    assert notes() == ["2 folders have no images, so no class (bird, fish)"]
    assert opened(image_folder).manifest["notes"] == notes()
    assert open_source(str(image_folder)).fingerprint == before
    with zipfile.ZipFile(zipped(image_folder), "a") as archive:
        archive.mkdir("horse")
    assert open_source(archive.filename).notes == [
        "2 folders have no images, so no class (fish, horse)"
    ]
    shutil.rmtree(image_folder / "dog")
    assert notes() == ["1 folder has no images, so no class (bird)"]
    shutil.rmtree(image_folder / "bird")
    (image_folder / "cat" / "Thumbs").mkdir()
    (image_folder / "cat" / "Thumbs" / "a.png").write_bytes(png(1))
    assert notes() == ["1 of 4 images lie in folders of thumbnails (cat/Thumbs)"]


def test_a_jpeg_that_is_heic_by_name_alone_is_an_image(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("L", (8, 8), 90).save(folder / "a.HEIC", "JPEG")
    (folder / "b.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    (folder / "c.png").write_bytes(png(1))
    for source in (folder, zipped(folder), tarred(folder)):
        store = opened(source, on_bad="skip")
        assert shown(store) == [90, 1]
        seen = [*store.manifest["passed_over"], *dict(store.manifest["left_out"])]
        assert seen in ([".heic"], ["b.heic"])  # the latter with pillow-heif


def test_an_archive_in_an_archive_is_to_be_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "inner.zip", "w") as archive:
        archive.writestr("a.png", png(1))
    inner = (tmp_path / "inner.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as archive:
        archive.writestr("b/inner.ZIP", inner)
    write_tar(tmp_path / "outer.tar", {"b/inner.ZIP": inner})
    for name in ("outer.zip", "outer.tar"):
        with pytest.raises(ValueError, match=f"{name}.*holds b/inner.ZIP: unpack it first"):
            opened(tmp_path / name)


def test_endings_may_be_in_capitals(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    with (tmp_path / "A.NPZ").open("wb") as file:
        np.savez(file, arr_0=images, arr_1=np.arange(4))
    with (tmp_path / "B.NPY").open("wb") as file:
        np.save(file, images)
    for name in ("A.NPZ", "B.NPY"):
        assert np.array_equal(opened(tmp_path / name, crop="none").images, images)
    files = {"A.PNG": png(1), "A.CLS": b"7", "B.PNG": png(2), "B.JSON": b'{"label": 3}'}
    (tmp_path / "shards").mkdir()
    tar = write_tar(tmp_path / "shards" / "C.TAR", files)
    for source in (tar, tar.parent, f"{tmp_path}/shards/*.TAR"):
        store = opened(source)
        assert shown(store) == [1, 2] and store.labels.tolist() == [7, 3]
    names = {"file_name": "0.PNG", "label": "cat"}
    with zipfile.ZipFile(tmp_path / "D.ZIP", "w") as archive:
        archive.writestr("0.PNG", png(1))
        archive.writestr("METADATA.JSONL", jsonl(names))
    assert opened(tmp_path / "D.ZIP").manifest["class_names"] == ["cat"]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_an_array_of_one_image_is_refused(tmp_path, channels):
    np.save(tmp_path / "one.npy", np.zeros((64, 48, channels), np.uint8))
    with pytest.raises(ValueError, match="looks like that of a single image.*add an axis"):
        opened(tmp_path / "one.npy")
    np.save(tmp_path / "small.npy", np.zeros((64, 4, channels), np.uint8))  # 64 of 4 rows
    assert len(opened(tmp_path / "small.npy", channels=1)) == 64


def test_links_in_a_tar_are_reported(tmp_path, capsys):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("cat/0.png", "dog/1.png"):
            info = tarfile.TarInfo(name)
            info.size = len(png(1))
            archive.addfile(info, io.BytesIO(png(1)))
        for name, kind in (("dog/2.png", tarfile.LNKTYPE), ("dog/3.png", tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "cat/0.png"
            archive.addfile(link)
    store = opened(path)
    note = "2 links in the tar cannot be followed (dog/2.png, dog/3.png): pack the files themselves"
    assert len(store) == 2 and store.manifest["notes"][0].startswith(note)
    main(["check", str(path), "--size", "8"])
    assert note in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("num_files", [2, 3])
def test_names_with_dots_in_a_tar_have_their_own_labels(tmp_path, num_files):
    files = {}
    for i in range(100):
        extra = {f"img.{i}.txt": b"caption"} if num_files == 3 else {}
        files |= {f"img.{i}.png": png(i), **extra, f"img.{i}.cls": b"%d" % i}
    store = opened(write_tar(tmp_path / "a.tar", files))
    assert shown(store) == store.labels.tolist() == list(range(100))
    shared = {"x.one.png": png(1), "x.two.png": png(2), "x.cls": b"5"}
    assert opened(write_tar(tmp_path / "b.tar", shared)).labels.tolist() == [5, 5]
    some = {"x.one.png": png(1), "x.two.png": png(2), "x.one.cls": b"5"}
    assert opened(write_tar(tmp_path / "c.tar", some)).labels is None  # x.two has none


def test_archives_of_windows_keep_their_class_folders(tmp_path):
    files = {r"cat\1.png": png(1), r"dog\2.png": png(2)}
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, content in {"bird\\": b"", **files}.items():
            info = zipfile.ZipInfo("x")
            info.filename = name
            archive.writestr(info, content)
    for source in (tmp_path / "a.zip", write_tar(tmp_path / "a.tar", files)):
        store = opened(source)
        assert shown(store) == [1, 2] and store.labels.tolist() == [0, 1]
        assert store.manifest["class_names"] == ["cat", "dog"]


def test_splits_taken_for_classes_are_noted_in_training_too(image_folder, tmp_path, capsys):
    for split in ("Train", "test"):
        shutil.copytree(image_folder, tmp_path / "set" / split)
    note = "the classes Train, test look like the splits of a data set"
    for source in (tmp_path / "set", tarred(tmp_path / "set")):
        (said,) = opened(source).manifest["notes"]
        assert note in said
        main(["check", str(source), "--size", "8"])
        assert f"warning {note}" in " ".join(capsys.readouterr().out.split())
    assert opened(image_folder).manifest["notes"] == []


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.npz", "a.npy"])
def test_archives_that_were_never_downloaded_say_what_they_are(tmp_path, name):
    for head, what in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html>404", "a web page"),
        (b'<?xml version="1.0"?><Error>', "an XML file"),
    ):
        (tmp_path / name).write_bytes(head)
        with pytest.raises(ValueError, match=f"{name} is {what}"):
            opened(tmp_path / name)


@pytest.mark.parametrize("key", ["GNU.sparse.map", "size", "GNU.sparse.size"])
def test_a_tar_with_damaged_fields_before_a_file_is_refused_in_a_line(tmp_path, capsys, key):
    with tarfile.open(tmp_path / "in.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("a.png")
        info.pax_headers = {key: "1,x"}
        archive.addfile(info)
    shutil.copy(tmp_path / "in.tar", tmp_path / "in")  # its content shows what it is
    for name in ("in.tar", "in"):
        assert main(["check", str(tmp_path / name)]) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1 if text else key == "size"  # which is a number in the end


@pytest.mark.parametrize("opener", [gzip.open, bz2.open])  # bzip2 packs 45 MB in a kilobyte
@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_tar_with_a_huge_header_is_refused_before_it_is_read(tmp_path, kind, opener):
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, 100_000_000
    header = info.tobuf(tarfile.GNU_FORMAT)
    path = tmp_path / ("in.tar.gz" if opener is gzip.open else "in.tar.bz2")
    with opener(path, "wb", 1) as file:
        file.write(header + bytes(info.size))
    tracemalloc.start()
    with pytest.raises(ValueError, match="a header of 100,000,000 bytes"):
        list(open_source(str(path)).items())
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


def test_a_tar_whose_file_claims_to_be_endless_is_refused(tmp_path):
    for number, suffix in enumerate(("", ".gz", ".xz")):
        path = tmp_path / f"in{number}.tar{suffix}"
        with tarfile.open(path, f"w:{suffix[1:]}", format=tarfile.PAX_FORMAT) as archive:
            archive.addfile(_info("a.png", png(1)), io.BytesIO(png(1)))
            info = tarfile.TarInfo("notes.txt")
            info.pax_headers = {"size": "9" * 30}
            archive.addfile(info)
        with pytest.raises(ValueError, match="a file of 999,999,.* bytes"):
            list(open_source(str(path)).items())


@pytest.mark.parametrize("name", ["BZh9/a.png", "]"])
def test_a_tar_whose_first_name_looks_like_a_compression_is_read(tmp_path, name):
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        for one in (name, "b.png"):
            archive.addfile(_info(one, png(1)), io.BytesIO(png(1)))
    assert "b.png" in [item.name for item in open_source(str(tmp_path / "in.tar")).items()]


def _info(name: str, content: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info


def test_control_characters_of_names_do_not_reach_the_terminal(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for name in ("\x1b[31mcat/1.png", "dog\n/2.png", "dog\n/3\x07.png"):
            file = io.BytesIO()
            Image.new("RGB", (8, 8)).save(file, "PNG")
            archive.writestr(name, file.getvalue() if "1" in name else b"damaged \x1b")
    assert main(["check", str(tmp_path / "in.zip"), "--on-bad", "skip"]) == 0
    text = capsys.readouterr().out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    assert "\\x1b[31mcat" in text and "dog\\n/2.png" in text
    (tmp_path / "bad").write_text("a: [\x1b")
    assert main(["train", str(tmp_path / "bad")]) == 2
    assert "\x1b" not in capsys.readouterr().err

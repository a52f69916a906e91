from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskdm import cli
from maskdm.images import build, open, store, workers
from maskdm.images.source import Item
from maskdm.images.store import cache_dir, open_store, pack
from maskdm.recipe import Data


def opened(source: Path | str, **data: object):
    return open_store(Data(source=str(source), **{"size": 8, **data}), progress=False)


def stores() -> set[Path]:
    return set(cache_dir().glob("store-*"))


def textures(folder: Path, num: int, size: int = 8) -> Path:
    """A folder of so many random images in two classes."""
    generator = np.random.default_rng(0)
    for i in range(num):
        path = folder / "ab"[i % 2] / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_store_is_built_once_and_again_when_the_source_changes(image_folder, own_cache):
    before = opened(image_folder)
    assert np.array_equal(opened(image_folder).images, before.images)
    assert len(stores()) == 1
    (image_folder / "dog" / "b.png").unlink()
    after = opened(image_folder)
    assert len(after) == 5 and len(before) == 6 and len(stores()) == 2
    os.utime(image_folder / "cat" / "a.png", (1, 1))
    assert np.array_equal(opened(image_folder).images, after.images)
    assert len(stores()) == 3
    (image_folder / "metadata.jsonl").write_text('{"file_name": "cat/a.png", "label": "x"}')
    assert opened(image_folder).labels is None
    assert {path.name[:6] for path in own_cache.iterdir()} == {"store-"}  # no lock, no litter


@pytest.mark.parametrize(
    "other",
    [{"size": 4}, {"size": (8, 4)}, {"channels": 1}, {"crop": "resize"}, {"background": "red"},
     {"draft": False}],
)  # fmt: skip
def test_other_settings_make_another_store(image_folder, own_cache, other):
    opened(image_folder)
    opened(image_folder, flip=True, on_bad="skip", fraction=0.5, resident="on")  # the same
    assert len(stores()) == 1
    assert opened(image_folder, **other).images.shape[1:] == Data(**{"size": 8, **other}).shape
    assert len(stores()) == 2


@pytest.mark.parametrize(
    ("labels", "keys"),
    [
        ([], ("8638c4df8e92057ed17b", "4b990a518aea3e9ccb32")),
        ([{}], ("a6c0d211141c151c3773", "6051b5d47524701941e0")),
        ([{"label": "x"}, "c.png"], ("0092b88f87e0fc177811", "6473246614e834884181")),
        ([{"label": "x"}, "c.png", "d.png"], ("f6abd17ad453424723a1", "374fea9227c8adc9d4e9")),
    ],
)
def test_stores_keep_the_names_that_version_0_1_gave_them(tmp_path, labels, keys):
    """Also where label files do not fit: notes of that are part of the fingerprint."""
    lines = [{"file_name": "cat/a.png", **own} for own in labels[:1]]
    lines += [{"file_name": name, "label": "y"} for name in labels[1:]]
    files = {"cat/a.png": "x" * 10, "dog/b.jpg": "x" * 20}
    if lines:
        files["metadata.jsonl"] = "\n".join(map(json.dumps, lines))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        os.utime(tmp_path / name, (1, 1))
    source = open.open_source(str(tmp_path))
    other = Data(size=(8, 12), channels=4, crop="resize", background="red", draft=False)
    assert store.store_key(source, other) == keys[0]
    assert store.store_key(source, Data(size=8), (1, 3)) == keys[1]


def test_the_manifest_describes_the_images(image_folder):
    (image_folder / "dog" / "z.png").write_text("no image")
    made = opened(image_folder, on_bad="skip", size=(8, 12), channels=1)
    folder = max(stores(), key=lambda path: path.stat().st_mtime)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest == made.manifest
    content = (folder / "images.bin").read_bytes()
    assert content == made.images.tobytes()
    expected = {
        "source": str(image_folder),
        "kind": "folder",
        "shape": [6, 8, 12, 1],
        "crop": "center",
        "class_names": ["cat", "dog"],
        "num_seen": 7,
        "left_out": [["dog/z.png", "not an image"]],
        "passed_over": {".txt": 1, "hidden": 2},
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    assert expected.items() <= manifest.items()


def test_bad_images_are_skipped_up_to_one_in_a_hundred(tmp_path, own_cache):
    folder = textures(tmp_path / "images", 199)
    (folder / "a" / "00000.png").write_text("no image")  # 1 of 199
    made = opened(folder)
    assert len(made) == 198 and made.labels.tolist()[:2] == [0, 0]
    with pytest.raises(ValueError, match=r"1 of 199 .* a/00000.png \(not an image\)\. Fix"):
        opened(folder, on_bad="error")  # also of the store that is there
    (folder / "b" / "00001.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"at least 2 of 199 .*check lists all\), or .*skip"):
        opened(folder)
    made = opened(folder, on_bad="skip")
    assert len(made) == 197 and len(made.manifest["left_out"]) == 2
    with pytest.raises(ValueError, match="2 of 199 images cannot be read"):
        opened(folder)  # the store that skip has built helps no one else
    assert len(made.labels) == 197


def test_all_images_bad_is_an_error_always(tmp_path):
    (tmp_path / "a.png").write_text("x")
    with pytest.raises(ValueError, match="none of its 1 images can be read"):
        opened(tmp_path, on_bad="skip")


def digest_of(made) -> tuple[str, list[int], list[str]]:
    return made.manifest["sha256"], made.labels.tolist(), made.manifest["class_names"]


def test_the_same_source_gives_the_same_bytes_everywhere(tmp_path, monkeypatch):
    folder = textures(tmp_path / "one", 400)
    (folder / "a" / "00002.png").write_text("no image")
    files = [path for path in folder.rglob("*") if path.is_file()]
    random.Random(0).shuffle(files)
    for path in files:  # another order on disk, other times, other inodes
        other = tmp_path / "two" / path.relative_to(folder)
        other.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, other)
    results, walk = [], os.walk

    def backwards(*args: object, **kwargs: object):
        for top, folders, names in walk(*args, **kwargs):
            folders.reverse()
            yield top, folders, names[::-1]

    for number, name in ((1, "one"), (2, "two"), (3, "two")):
        monkeypatch.setenv("MASKDM_CACHE", str(tmp_path / f"cache-{number}"))
        monkeypatch.setattr(workers, "num_cores", lambda number=number: number)
        monkeypatch.setattr(os, "walk", backwards if name == "two" else walk)
        results.append(digest_of(opened(tmp_path / name)))
    assert results[0] == results[1] == results[2]
    labels = [0] * 199 + [1] * 200
    assert results[0][1] == labels and results[0][2] == ["a", "b"]


def test_workers_give_results_in_order_and_hold_few_at_a_time(tmp_path, monkeypatch):
    read = []
    source = open.open_source(str(textures(tmp_path, 40)))

    def watched():
        for item in source.items():
            read.append(item.name)
            yield item

    monkeypatch.setattr(workers, "CHUNK_IMAGES", 2)
    monkeypatch.setattr(workers, "num_cores", lambda: 2)
    names, ahead = [], []
    for items, lengths in workers.map_chunks(_lengths, watched(), 1):
        names += [item.name for item in items]
        ahead.append(len(read) - len(names))
        assert lengths == [len(str(tmp_path / item.name)) for item in items]
        assert all(item.content == b"" for item in items)
    assert names == read and len(names) == 40
    assert max(ahead) <= 2 * (2 * 2 + 1)


def _lengths(contents: list) -> list[int]:
    return [len(str(content)) for content in contents]


def _die(contents: list) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_decoder_that_crashes_is_an_error_not_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "CHUNK_IMAGES", 2)
    monkeypatch.setattr(workers, "num_cores", lambda: 2)
    source = open.open_source(str(textures(tmp_path, 20)))
    with pytest.raises(ValueError, match=r"a worker process died .* from a/00000.png on"):
        list(workers.map_chunks(_die, source.items(), 1))


def test_where_several_processes_need_a_store_one_builds_it(tmp_path, own_cache, monkeypatch):
    folder, built, messages = textures(tmp_path / "images", 30), [], []
    write, waiting = build._write_images, threading.Semaphore(0)

    def write_when_others_wait(*args: object):
        built.append(1)
        assert all(waiting.acquire(timeout=60) for _ in range(3))
        return write(*args)

    def listen(text: str, **_: object) -> None:
        messages.append(text)
        waiting.release()

    monkeypatch.setattr(build, "_write_images", write_when_others_wait)
    monkeypatch.setattr(build, "print", listen, raising=False)
    with ThreadPoolExecutor(4) as pool:  # each opens the lock file itself, as a process does
        made = list(pool.map(opened, [folder] * 4))
    assert len(built) == 1 and len({digest_of(one)[0] for one in made}) == 1
    assert len(messages) == 3 and all("another process is packing" in text for text in messages)
    assert {path.name[:6] for path in own_cache.iterdir()} == {"store-"}


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_warned_of(image_folder, own_cache, monkeypatch, code):
    fcntl = pytest.importorskip("fcntl")
    flock = fcntl.flock

    def unlockable(file: int, operation: int) -> None:
        if not operation & fcntl.LOCK_UN:
            raise OSError(code, os.strerror(code))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", unlockable)
    with pytest.warns(UserWarning, match=f"{own_cache} does not support locks: build only one"):
        assert len(opened(image_folder)) == 6
    assert {path.name[:6] for path in own_cache.iterdir()} == {"store-"}


BUILD = """
import sys, time
from pathlib import Path
from maskdm.images import build, workers
from maskdm.images.store import open_store
from maskdm.recipe import Data

source, moment, cores = sys.argv[1], sys.argv[2], int(sys.argv[3])
workers.num_cores, workers.CHUNK_IMAGES = lambda: cores, 16

def wait_at(name):
    if name == moment:
        print("waiting", flush=True)
        time.sleep(600)

def paused(function, before="", after=""):
    def call(*args, **kwargs):
        wait_at(before)
        result = function(*args, **kwargs)
        wait_at(after)
        return result
    return call

def chunks(*args):
    for i, chunk in enumerate(map_chunks(*args)):
        wait_at(f"chunk {i}")
        yield chunk

map_chunks, build.map_chunks = build.map_chunks, chunks
build.write_whole = paused(build.write_whole, "labels")
build.write_text = paused(build.write_text, "manifest")
Path.rename = paused(Path.rename, "rename", "renamed")
open_store(Data(source=source, size=32), progress=False)
"""
MOMENTS = {"chunk 0": 1, "chunk 9": 1, "chunk 10": 2, "labels": 1, "manifest": 1, "rename": 2,
           "renamed": 1}  # fmt: skip


def test_builds_killed_at_any_moment_leave_no_wrong_store(tmp_path, monkeypatch):
    folder = textures(tmp_path / "images", 300, size=64)
    monkeypatch.setattr(workers, "num_cores", lambda: 1)

    def files_of_a_build(cache: Path) -> dict[str, bytes]:
        monkeypatch.setenv("MASKDM_CACHE", str(cache))
        opened(folder, size=32)
        (made,) = cache.glob("[!.]*")  # and nothing else, except for a lock file
        return {path.name: path.read_bytes() for path in made.iterdir()}

    expected, processes = files_of_a_build(tmp_path / "whole"), {}
    with contextlib.ExitStack() as stack:
        for moment, cores in MOMENTS.items():
            process = subprocess.Popen(
                [sys.executable, "-c", BUILD, str(folder), moment, str(cores)],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "MASKDM_CACHE": str(tmp_path / moment)},
            )
            processes[moment] = stack.enter_context(process)
            stack.callback(process.kill)
        for moment, process in processes.items():
            assert process.stdout.readline() == "waiting\n"
            process.kill()
            process.communicate()  # until its workers, which hold its output, have left too
            (left,) = (tmp_path / moment).glob("[!.]*")
            assert left.name.startswith("store-" if moment == "renamed" else "building-")
            assert files_of_a_build(tmp_path / moment) == expected


def test_what_a_killed_build_left_is_removed_but_not_another_builds(image_folder, own_cache):
    made = opened(image_folder)
    (folder,) = stores()
    shutil.rmtree(folder)
    gone = subprocess.Popen(["true"])
    gone.wait()
    here, dead, mine = socket.gethostname(), gone.pid, os.getpid()
    left = [own_cache / f"building-{dead}@{here}@{name}" for name in (folder.name, "store-old")]
    others = [own_cache / f"building-{mine}@{here}@x", own_cache / f"building-{dead}@elsewhere@x"]
    for path in (*left, *others):
        path.mkdir()
        (path / "images.bin").write_bytes(b"half")
    assert np.array_equal(opened(image_folder).images, made.images)
    assert not any(path.exists() for path in left) and all(path.exists() for path in others)
    shutil.rmtree(folder)
    for path in (others[1], others[1] / "images.bin"):
        os.utime(path, (1, 1))  # another machine's, untouched for years
    opened(image_folder)
    assert not others[1].exists() and others[0].exists()


def test_a_store_may_be_packed_into_an_empty_folder(image_folder, tmp_path, monkeypatch):
    rename, out = Path.rename, tmp_path / "out"

    def as_on_windows(path: Path, target: Path) -> Path:
        if target.exists():
            raise FileExistsError(17, "File exists", str(target))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", as_on_windows)
    out.mkdir()
    assert len(pack(Data(source=str(image_folder), size=8), out, progress=False)) == 6


def test_a_failed_build_leaves_nothing(tmp_path, own_cache):
    folder = textures(tmp_path / "images", 20)
    (folder / "a" / "00000.png").write_text("no image")
    with pytest.raises(ValueError, match="cannot be read"):
        opened(folder)
    assert not stores() and not list(own_cache.glob("building-*"))


def test_a_full_disk_is_reported_before_the_work(image_folder, monkeypatch):
    usage = shutil.disk_usage(image_folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"needs 1.15 kB, but .* has 1 kB free.*MASKDM_CA"):
        opened(image_folder)


def test_a_damaged_or_older_store_is_refused(image_folder, own_cache):
    opened(image_folder)
    (folder,) = stores()
    images, manifest = folder / "images.bin", folder / "manifest.json"
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged: remove it and build it again"):
        opened(image_folder)
    images.unlink()
    with pytest.raises(ValueError, match="is damaged: remove it and build it again"):
        opened(image_folder)
    manifest.write_text(manifest.read_text()[:-50])
    with pytest.raises(ValueError, match="is damaged"):
        opened(image_folder)
    shutil.rmtree(folder)
    opened(image_folder)
    for content in (b"", b"nonsense", None):
        (folder / "labels.npy").unlink()
        if content is not None:
            (folder / "labels.npy").write_bytes(content)
        with pytest.raises(ValueError, match="is damaged"):
            opened(image_folder)
        (folder / "labels.npy").write_bytes(b"")
    np.save(folder / "labels.npy", np.zeros(5, np.int64))
    with pytest.raises(ValueError, match="is damaged"):
        opened(image_folder)
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 1}))
    with pytest.raises(ValueError, match="has another format: remove it, build it again"):
        opened(image_folder)


def run(*arguments: object) -> int:
    return cli.main(["pack", *map(str, arguments)])


def test_a_packed_store_is_a_source(image_folder, tmp_path, capsys):
    out = tmp_path / "packed"
    assert run(image_folder, out, "--size", 8, 12, "--crop", "resize") == 0
    assert "6 images 8x12x3" in capsys.readouterr().out
    made = opened(out, size=(8, 12))
    direct = opened(image_folder, size=(8, 12), crop="resize")
    assert np.array_equal(made.images, direct.images) and digest_of(made) == digest_of(direct)
    changed = (out / "images.bin").stat().st_mtime_ns
    assert run(image_folder, out, "--size", 8, 12, "--crop", "resize", "--json") == 0
    assert json.loads(capsys.readouterr().out) == made.manifest
    assert (out / "images.bin").stat().st_mtime_ns == changed  # left as it was
    for other in ({"size": 8}, {"size": (8, 12), "channels": 1}):
        with pytest.raises(ValueError, match="use --data.size 8 12 --data.channels 3"):
            opened(out, **other)
    with pytest.raises(ValueError, match="packed with crop resize, .* use --data.crop auto"):
        opened(out, size=(8, 12), crop="center")


def test_what_was_packed_without_many_images_is_used_as_it_is(tmp_path):
    folder, out = textures(tmp_path / "images", 9), tmp_path / "packed"
    (folder / "a" / "00004.png").write_text("no image")
    assert run(folder, out, "--size", 8) == 2
    assert run(folder, out, "--size", 8, "--on-bad", "skip") == 0
    assert len(opened(out)) == 8
    with pytest.raises(ValueError, match="1 of 9 images cannot be read"):
        opened(out, on_bad="error")


def test_parts_that_are_packed_apart_make_the_whole(tmp_path, capsys):
    folder = textures(tmp_path / "images", 23)
    (folder / "a" / "00004.png").write_text("no image")
    whole = opened(folder, on_bad="skip")
    out = tmp_path / "parts"
    for i in (3, 0, 2, 1):
        assert run(folder, out, "--size", 8, "--on-bad", "skip", "--shard", f"{i}/4") == 0
    made = opened(out, on_bad="skip")
    assert np.array_equal(made.images[:], whole.images) and len(made) == 22
    assert digest_of(made)[1:] == digest_of(whole)[1:]
    assert made.manifest["left_out"] == [["a/00004.png", "not an image"]]
    some = np.array([21, 0, 5, 5, 17, 11])
    assert np.array_equal(made.images[some], whole.images[some])
    assert np.array_equal(made.images[3], whole.images[3])
    assert np.array_equal(made.images[-5:], whole.images[-5:])
    shutil.rmtree(out / "part-00002-of-00004")
    with pytest.raises(ValueError, match="lacks part-00002-of-00004: pack the missing parts"):
        opened(out)
    assert run(folder, out, "--size", 4, "--on-bad", "skip", "--shard", "2/4") == 0
    with pytest.raises(ValueError, match="differ in source or settings"):
        opened(out)
    assert run(folder, out, "--size", 4, "--on-bad", "skip", "--shard", "2/3") == 0
    with pytest.raises(
        ValueError, match="has 4 parts, but also holds part-00002-of-00003: remove it"
    ):
        opened(out)


def test_parts_of_shards_number_their_classes_together(tmp_path):
    from test_sources import png, write_tar

    shards = tmp_path / "shards"
    shards.mkdir()
    names = [b"owl", b"ape", b"ape", b"cow"]
    for i, name in enumerate(names):
        write_tar(shards / f"{i}.tar", {f"{i}.png": png(i), f"{i}.cls": name})
    for i in range(2):
        pack(Data(source=str(shards), size=8), tmp_path / "out", (i, 2), progress=False)
    made, whole = opened(tmp_path / "out"), opened(shards)
    assert made.labels.tolist() == whole.labels.tolist() == [2, 0, 0, 1]
    assert made.manifest["class_names"] == ["ape", "cow", "owl"]
    write_tar(shards / "3.tar", {"3.txt": b"no image"})
    for i in range(4):
        pack(Data(source=str(shards), size=8), tmp_path / "four", (i, 4), progress=False)
    assert opened(tmp_path / "four").labels.tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="4 tar archives cannot be split into 5 parts"):
        pack(Data(source=str(shards), size=8), tmp_path / "more", (0, 5), progress=False)


def test_parts_may_be_empty_or_bad_and_the_whole_is_judged(tmp_path):
    few = textures(tmp_path / "few", 2)
    for i in range(4):
        pack(Data(source=str(few), size=8), tmp_path / "out", (i, 4), progress=False)
    assert np.array_equal(opened(tmp_path / "out").images[:], opened(few).images)
    pack(Data(source=str(few), size=8), tmp_path / "one", (0, 1), progress=False)
    assert opened(tmp_path / "one").labels.tolist() == [0, 1]
    many = textures(tmp_path / "many", 200)
    (many / "a" / "00000.png").write_text("no image")
    for i in range(8):  # 1 of 25 in the first
        pack(Data(source=str(many), size=8), tmp_path / "parts", (i, 8), progress=False)
    assert len(opened(tmp_path / "parts")) == 199
    with pytest.raises(ValueError, match="1 of 200 images cannot be read"):
        opened(tmp_path / "parts", on_bad="error")
    (few / "b" / "00001.png").write_text("no image")
    with pytest.raises(ValueError, match="at least 1 of 2"):
        opened(few)


def test_encoded_images_are_read_ahead_by_bytes_too(monkeypatch):
    ahead, done = [0], [0]

    def large():
        for i in range(20):
            ahead[0] = max(ahead[0], i - done[0])
            yield Item(f"{i}", bytes(2**22))

    monkeypatch.setattr(workers, "PENDING_BYTES", 3 * 2**22)
    monkeypatch.setattr(workers, "num_cores", lambda: 3)
    for items, _ in workers.map_chunks(_lengths, large(), 1):
        done[0] += len(items)
    assert done == [20] and ahead[0] <= 5  # not the 7 that would keep 3 workers busy


def test_packing_refuses_what_would_mix_or_overwrite(image_folder, tmp_path, capsys):
    def refused(*arguments: object) -> str:
        assert run(*arguments) == 2
        return capsys.readouterr().err

    out = tmp_path / "out"
    assert run(image_folder, out, "--size", 8) == 0
    assert "of another source or of other settings" in refused(image_folder, out, "--size", 4)
    assert "is a packed store: pack the images" in refused(out, tmp_path / "again", "--size", 8)
    for more in ([], ["--shard", "0/2"]):
        assert "exists and is not a store" in refused(
            image_folder, image_folder, "--size", 8, *more
        )
        file = image_folder / "notes.txt"
        assert "exists and is not a store" in refused(image_folder, file, "--size", 8, *more)
    (tmp_path / "link").symlink_to(tmp_path / "linked")
    (tmp_path / "linked").mkdir()
    assert run(image_folder, tmp_path / "link", "--size", 8) == 0
    assert store.is_store(tmp_path / "linked")
    for shard in ("4/4", "1", "-1/4", "a/b"):
        error = refused(image_folder, tmp_path / "x", "--size", 8, f"--shard={shard}")
        assert "expected I/N with I from 0 to N - 1" in error
    assert "--size" in refused(image_folder, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_stores_are_known_by_their_files(image_folder, tmp_path):
    assert not store.is_store(image_folder) and not store.is_store(tmp_path / "nowhere")
    pack(Data(source=str(image_folder), size=8), tmp_path / "out", progress=False)
    assert store.is_store(tmp_path / "out")

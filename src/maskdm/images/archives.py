"""Images in zip archives and in tars, WebDataset shards among them; never unpacked to disk."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import lzma
import posixpath
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from maskdm.images.labels import Label
from maskdm.images.source import (
    IMAGE_SUFFIXES,
    Item,
    ListedSource,
    Source,
    file_state,
    is_hidden,
    is_image,
    part_of,
)
from maskdm.words import listed, one_line

MAX_FILE_BYTES = 2**27  # a larger file in an archive, once unpacked, counts as a bomb
MAX_SAMPLE = 64  # files of one sample: more are not a sample, but names that begin alike
MAX_CHOICES = 1_000_000  # files that a pair of braces in a pattern may stand for
# What reading a damaged, encrypted or foreign archive may raise.
ARCHIVE_ERRORS = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
READ_ERRORS = (*ARCHIVE_ERRORS, OSError, EOFError, RuntimeError, LookupError, MemoryError)
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
EDGE_BYTES = 2**20  # at each end of a file, for its fingerprint
File = tuple[str, bytes | Exception | None]  # name and content; None for one that is not used


class ZipSource(ListedSource):
    """All images in a zip archive."""

    kind = "zip archive"

    def __init__(self, path: Path):
        try:
            self._archive = zipfile.ZipFile(path)
        except READ_ERRORS as error:
            raise ValueError(f"zip {path} is damaged or ends early: {error}") from None
        infos = [info for info in self._archive.infolist() if info.filename]
        super().__init__({info.filename for info in infos if not info.is_dir()}, f"zip {path}")

    def _content(self, name: str) -> bytes | Exception:
        if (size := self._archive.getinfo(name).file_size) > MAX_FILE_BYTES:
            return ValueError(f"decompression bomb: {size:,} bytes unpacked")
        try:
            return self._archive.read(name)
        except READ_ERRORS as error:
            return error

    def _state(self, name: str) -> bytes:
        info = self._archive.getinfo(name)
        return f"\0{info.file_size}\0{info.CRC}\n".encode()


class TarSource(Source):
    """All images in tars, read from front to back: local or remote, compressed or not.

    Images keep the order of the archive. Consecutive files that share a name up to its first dot
    are one sample, as in WebDataset's shards: `.cls` (a number or a name) or the "label" in
    `.json` is the image's class. Without those, class folders give labels.
    """

    has_folders = True

    def __init__(self, paths: list[str]):
        super().__init__()
        self.kind = "tar archive" if len(paths) == 1 else f"{len(paths):,} tar archives"
        self._paths = paths
        self.fingerprint = hashlib.sha256(b"".join(map(_tar_state, paths))).hexdigest()

    def items(self, part: tuple[int, int] = (0, 1)) -> Iterator[Item]:
        if part[1] > len(self._paths):
            raise ValueError(
                f"{self.kind} cannot be split into {part[1]} parts: each part needs a tar of its "
                f"own, so use at most {len(self._paths)}"
            )
        is_empty = True
        for path in part_of(self._paths, part):
            for item in self._items_of(path):
                is_empty = False
                yield item
        if is_empty and part == (0, 1):
            raise ValueError(
                f"no images in {listed(self._paths, 3)}: expected "
                f"{' '.join(sorted(IMAGE_SUFFIXES))}"
            )

    def _items_of(self, path: str) -> Iterator[Item]:
        num_images = 0
        try:
            for _, files in itertools.groupby(self._files(path), lambda file: _sample(file[0])):
                while sample := list(itertools.islice(files, MAX_SAMPLE)):
                    for item in self._images_of(sample):
                        num_images += 1
                        yield item
        except READ_ERRORS as error:
            raise ValueError(
                f"{path} is damaged or ends early, after {num_images:,} images: {one_line(error)}"
            ) from None

    def _images_of(self, sample: list[File]) -> Iterator[Item]:
        """The images of a sample, with its label; counts the files that are skipped.

        Among x.jpg, x.mask.png and x.cls only the first is an image. Without `.cls` or `.json`
        these are not a sample, but names that begin alike.
        """
        unused = [name for name, content in sample if content is None]
        used = {name: content for name, content in sample if content is not None}
        images = [name for name in used if is_image(name)]
        plain = [name for name in images if posixpath.basename(name).count(".") == 1]
        if not images:  # labels of no image
            unused, used = [*unused, *used], {}
        elif plain and len(images) < len(used):
            unused += [name for name in images if name not in plain]
            images = plain
        for name in unused:
            suffix = posixpath.basename(name).partition(".")[2]
            self.skipped[f".{suffix}" if suffix else "no suffix"] += 1
        labels = (_label(*file) for file in used.items())
        label = next((label for label in labels if label is not None), None)
        for name in images:
            yield Item(name, used[name], label)

    def _files(self, path: str) -> Iterator[File]:
        with (
            fsspec.open(path, "rb") if "://" in path else Path(path).open("rb") as file,
            tarfile.open(fileobj=file, mode="r|*", tarinfo=_StrictTarInfo) as archive,
        ):
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # else it keeps them all
                name = posixpath.normpath(member.name)
                if not member.isfile():
                    continue
                if is_hidden(name.lstrip("/")):
                    self.skipped["hidden"] += 1
                elif not is_image(name) and not name.endswith((".cls", ".json")):
                    yield name, None
                elif member.size > MAX_FILE_BYTES:
                    yield name, ValueError(f"decompression bomb: {member.size:,} bytes unpacked")
                else:
                    content = archive.extractfile(member)
                    assert content is not None  # it is a file
                    yield name, content.read()


class _StrictTarInfo(tarfile.TarInfo):
    """Raises for a truncated or damaged header, which tarfile takes for the archive's end."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> Any:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


def _sample(name: str) -> str:
    """What the files of a sample share: their path up to the first dot of the name."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _label(name: str, content: bytes | Exception) -> Label:
    if isinstance(content, Exception) or not name.endswith((".cls", ".json")):
        return None
    try:
        text = content.decode("utf-8").strip()
        if name.endswith(".cls"):
            return int(text) if re.fullmatch(r"0|[1-9]\d{0,17}", text) else text
        record = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is not a label: {error}") from None
    label = record.get("label") if isinstance(record, dict) else None
    return label if isinstance(label, str | int) and not isinstance(label, bool) else None


def _tar_state(path: str) -> bytes:
    """Bytes that change when a tar does, without reading all of it."""
    if "://" not in path:
        return edges_and_state(Path(path))
    try:
        system, inner = fsspec.core.url_to_fs(path)
        return f"{path}\0{system.info(inner).get('size')}\0{system.ukey(inner)}\n".encode()
    except Exception as error:  # each file system has its own
        text = f"{type(error).__name__}, {one_line(error)}"
        raise ValueError(f"cannot reach {path}: {text}") from None


def edges_and_state(path: Path) -> bytes:
    """A digest of a file's beginning and end, with its size and time of change."""
    with path.open("rb") as file:
        start = file.read(EDGE_BYTES)
        file.seek(max(0, path.stat().st_size - EDGE_BYTES))
        return hashlib.sha256(start + file.read()).digest() + file_state(path)


def expand_pattern(pattern: str) -> list[str]:
    """Paths or URLs of tars: `{000..063}` and `{a,b}` in their order, matches of `*?[]` sorted.

    Raises ValueError where a file is missing or is not a tar.
    """
    paths = [path for one in _expand_braces(pattern) for path in _expand_stars(one)]
    local = [path for path in paths if "://" not in path]
    if others := [path for path in local if not path.endswith(TAR_SUFFIXES)]:
        raise ValueError(
            f"data.source {pattern}: a pattern must match tars only, but {others[0]} is not one: "
            "use its folder"
        )
    missing = [path for path in local if not Path(path).is_file()]
    if missing or not paths:
        raise ValueError(f"data.source {pattern}: no such file: {(missing or [pattern])[0]}")
    return paths


def _expand_stars(path: str) -> list[str]:
    if "://" not in path:
        path = str(Path(path).expanduser())
        return sorted(glob.glob(path)) if glob.has_magic(path) else [path]
    if not glob.has_magic(path.split("?")[0] if path.startswith("http") else path):
        return [path]
    try:
        return [file.full_name for file in fsspec.open_files(path)]
    except Exception as error:  # each file system has its own
        raise ValueError(f"cannot list {path}: {one_line(error)}") from None


def _expand_braces(pattern: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    before, inside, after = pattern[: match.start()], match[1], pattern[match.end() :]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = numbers.groups()
        width = len(first) if first.startswith("0") else 0
        if int(last) - int(first) >= MAX_CHOICES:
            raise ValueError(f"data.source {pattern}: more than {MAX_CHOICES:,} files")
        choices = [f"{i:0{width}d}" for i in range(int(first), int(last) + 1)]
    else:
        choices = inside.split(",")
    return [before + choice + rest for choice in choices for rest in _expand_braces(after)]

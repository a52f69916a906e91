"""Images in zip archives and in tars, WebDataset shards among them; never unpacked to disk."""

from __future__ import annotations

import glob
import hashlib
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

from maskdm.images.labels import Label, labels_of
from maskdm.images.source import (
    IMAGE_SUFFIXES,
    Item,
    Source,
    file_state,
    images_among,
    piece,
)

MAX_FILE_BYTES = 2**27  # a file in an archive that is larger unpacked is taken for a bomb
MAX_SAMPLE = 64  # files of one sample: more are no sample, but names that begin alike
MAX_CHOICES = 1_000_000  # that a pattern's braces may stand for
DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    OSError,
    EOFError,
    RuntimeError,
    NotImplementedError,
    KeyError,
    IndexError,
    MemoryError,
)  # what reading a damaged, encrypted or foreign archive may raise
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
EDGE_BYTES = 2**20  # of a tar's beginning and end that go into its fingerprint


class ZipSource(Source):
    """All images in a zip archive. Class folders inside, or a label file, give labels."""

    kind = "zip archive"
    has_folders = True

    def __init__(self, path: Path):
        super().__init__()
        try:
            self._archive = zipfile.ZipFile(path)
        except DAMAGED as error:
            raise ValueError(f"zip {path} is damaged or ends early: {error}") from None
        self._infos = {info.filename: info for info in self._archive.infolist() if info.filename}
        files = [name for name, info in self._infos.items() if not info.is_dir()]
        self._names = images_among(files, f"zip {path}", self.passed_over)
        self._labels, self.notes = labels_of(self._names, files, self._text)
        self.num_images = len(self._names)
        digest = hashlib.sha256(repr(self.notes).encode("utf-8", "surrogatepass"))
        for name, label in zip(self._names, self._labels, strict=True):
            info = self._infos[name]
            facts = f"{name}\0{label}\0{info.file_size}\0{info.CRC}\n"
            digest.update(facts.encode("utf-8", "replace"))
        self.fingerprint = digest.hexdigest()

    def items(self, part: tuple[int, int] = (0, 1)) -> Iterator[Item]:
        for i in piece(range(len(self._names)), part):
            yield Item(self._names[i], self._read(self._names[i]), self._labels[i])

    def _read(self, name: str) -> bytes | Exception:
        if (size := self._infos[name].file_size) > MAX_FILE_BYTES:
            return ValueError(f"decompression bomb: {size:,} bytes unpacked")
        try:
            return self._archive.read(name)
        except DAMAGED as bad:
            return bad

    def _text(self, name: str) -> str:
        content = self._read(name)
        if isinstance(content, Exception):
            raise ValueError(f"it can't be read: {content}")
        return content.decode("utf-8")


class TarSource(Source):
    """All images in tars, read from front to back: local or remote, packed or not.

    Images keep the order of the archive. Files that share a name up to its first dot and follow
    one another are one sample, as in WebDataset's shards: `.cls` (a number or a name) or the
    "label" in `.json` is the image's class. Without those, class folders give labels.
    """

    has_folders = True

    def __init__(self, paths: list[str]):
        super().__init__()
        self.kind = "tar archive" if len(paths) == 1 else f"{len(paths):,} tar archives"
        self._paths = paths
        digest = hashlib.sha256()
        for path in paths:
            digest.update(_tar_state(path))
        self.fingerprint = digest.hexdigest()

    def items(self, part: tuple[int, int] = (0, 1)) -> Iterator[Item]:
        if part[1] > len(self._paths):
            raise ValueError(
                f"{self.kind} can't be cut into {part[1]} parts: tars are not split, use at most "
                f"{len(self._paths)}"
            )
        num_images = 0
        for path in piece(self._paths, part):
            for item in self._items_of(path):
                num_images += 1
                yield item
        if not num_images and part == (0, 1):
            raise ValueError(
                f"no images in {', '.join(self._paths[:3])}: expected "
                f"{' '.join(sorted(IMAGE_SUFFIXES))}"
            )

    def _items_of(self, path: str) -> Iterator[Item]:
        sample: dict[str, bytes | Exception] = {}
        key, num_images = "", 0
        try:
            for name, content in self._files(path):
                folder, _, base = name.rpartition("/")
                stem = base.partition(".")[0]
                if sample and (key != f"{folder}/{stem}" or len(sample) == MAX_SAMPLE):
                    yield from (found := list(self._images_of(sample)))
                    num_images, sample = num_images + len(found), {}
                key = f"{folder}/{stem}"
                if content is None:
                    self._pass_over([name])
                else:
                    sample[name] = content
            yield from self._images_of(sample)
        except DAMAGED as error:
            text = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"{path} is damaged or ends early, after {num_images:,} images: {text}"
            ) from None

    def _images_of(self, sample: dict[str, bytes | Exception]) -> Iterator[Item]:
        """The images of a sample, with its label.

        Of x.jpg, x.mask.png and x.cls only the first is one. Without `.cls` or `.json` it is no
        sample, but names that begin alike.
        """
        images = [name for name in sample if _is_image(name)]
        if not images:  # labels of nothing
            self._pass_over(list(sample))
            return
        label = next((found for found in map(_label, sample.items()) if found is not None), None)
        plain = [name for name in images if posixpath.basename(name).count(".") == 1]
        if plain and len(images) < len(sample):
            self._pass_over([name for name in images if name not in plain])
            images = plain
        for name in images:
            yield Item(name, sample[name], label)

    def _pass_over(self, names: list[str]) -> None:
        """Counts files that are of no use, by all that follows their first dot."""
        for name in names:
            suffix = posixpath.basename(name).partition(".")[2]
            self.passed_over[f".{suffix}" if suffix else "no suffix"] += 1

    def _files(self, path: str) -> Iterator[tuple[str, bytes | Exception | None]]:
        """Name and content of each file, None for one that is of no use."""
        with (
            _opened(path) as file,
            tarfile.open(fileobj=file, mode="r|*", tarinfo=_StrictTarInfo) as archive,
        ):
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # else it keeps them all
                name = posixpath.normpath(member.name)
                hidden = any(
                    part.startswith((".", "__MACOSX")) for part in name.lstrip("/").split("/")
                )
                if not member.isfile():
                    continue
                if hidden:
                    self.passed_over["hidden"] += 1
                elif not _is_image(name) and not name.endswith((".cls", ".json")):
                    yield name, None
                elif member.size > MAX_FILE_BYTES:
                    yield name, ValueError(f"decompression bomb: {member.size:,} bytes unpacked")
                else:
                    content = archive.extractfile(member)
                    assert content is not None  # it is a file
                    yield name, content.read()


class _StrictTarInfo(tarfile.TarInfo):
    """Takes a header that is cut off or damaged for what it is, not for the archive's end."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> Any:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


def _opened(path: str) -> Any:
    """A local or remote file, to be read from front to back."""
    if "://" not in path:
        return Path(path).open("rb")
    import fsspec

    return fsspec.open(path, "rb")


def _is_image(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _label(file: tuple[str, bytes | Exception]) -> Label:
    name, content = file
    if isinstance(content, Exception) or not name.endswith((".cls", ".json")):
        return None
    try:
        text = content.decode("utf-8").strip()
        if name.endswith(".cls"):
            return int(text) if re.fullmatch(r"0|[1-9]\d{0,17}", text) else text
        found = json.loads(text)
        label = found.get("label") if isinstance(found, dict) else None
    except ValueError as error:
        raise ValueError(f"{name} is no label: {error}") from None
    return label if isinstance(label, str | int) and not isinstance(label, bool) else None


def _tar_state(path: str) -> bytes:
    """What tells whether a tar has changed, without reading all of it."""
    if "://" not in path:
        return edges_and_state(Path(path))
    import fsspec

    try:
        system, inner = fsspec.core.url_to_fs(path)
        return f"{path}\0{system.info(inner).get('size')}\0{system.ukey(inner)}\n".encode()
    except ImportError as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # each file system has its own
        text = f"{type(error).__name__}, {' '.join(str(error).split())}"
        raise ValueError(f"{path} can't be reached: {text}") from None


def edges_and_state(path: Path) -> bytes:
    """A digest of a file's beginning and end, with its size and time of change."""
    with path.open("rb") as file:
        start = file.read(EDGE_BYTES)
        file.seek(max(0, path.stat().st_size - EDGE_BYTES))
        return hashlib.sha256(start + file.read()).digest() + file_state(path)


def expand_pattern(pattern: str) -> list[str]:
    """Paths or URLs of tars that a pattern names: `{000..063}`, `{a,b}` in their order, `*?[]`
    sorted.

    Raises ValueError where there is none, or none that is a tar.
    """
    found = []
    for path in _expand_braces(pattern):
        if "://" in path:
            found += _expand_remote(path)
        elif glob.has_magic(path):
            found += sorted(glob.glob(str(Path(path).expanduser())))
        else:
            found.append(str(Path(path).expanduser()))
    local = [path for path in found if "://" not in path]
    if others := [path for path in local if not path.endswith(TAR_SUFFIXES)]:
        raise ValueError(
            f"data.source {pattern}: patterns name tars, and {others[0]} is none: name the folder"
        )
    missing = [path for path in local if not Path(path).is_file()]
    if missing or not found:
        raise ValueError(f"data.source {pattern}: there is no file {(missing or [pattern])[0]}")
    return found


def _expand_remote(url: str) -> list[str]:
    if not glob.has_magic(url.split("?")[0] if url.startswith("http") else url):
        return [url]
    import fsspec

    try:
        return [file.full_name for file in fsspec.open_files(url)]
    except Exception as error:  # each file system has its own
        text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{url} can't be listed: {text}") from None


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

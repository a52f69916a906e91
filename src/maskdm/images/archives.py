"""Images in zip archives and in tars, WebDataset shards among them; never unpacked to disk."""

from __future__ import annotations

import bz2
import contextlib
import glob
import gzip
import hashlib
import io
import itertools
import lzma
import posixpath
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import fsspec

from maskdm.files import parsed_json
from maskdm.images.decode import is_common_image
from maskdm.images.labels import Label, number_or_name, text_of
from maskdm.images.source import (
    Item,
    ListedSource,
    Source,
    file_state,
    is_heif,
    is_image,
    litter_of,
    part_of,
    without_images,
)
from maskdm.words import counted, listed, one_line

MAX_FILE_BYTES = 2**27  # a larger file in an archive, once unpacked, counts as a bomb
MAX_HEADER_BYTES = 2**20  # of a long name or of other facts before a file of a tar
MAX_MEMBER_BYTES = 2**40  # of a file in a tar that is passed over: more is a damaged header
BLOCK_BYTES = 2**20  # of a tar that are read, or passed over, at a time
MAX_SAMPLE = 64  # files of one sample: more are not a sample, but names that begin alike
MAX_CHOICES = 1_000_000  # files that a pair of braces in a pattern may stand for
# What reading a damaged, encrypted or foreign archive may raise.
ARCHIVE_ERRORS = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
READ_ERRORS = (*ARCHIVE_ERRORS, OSError, EOFError, RuntimeError, LookupError, MemoryError)
UNPACKERS: dict[bytes, Callable[[Any], Any]] = {  # by how a file begins
    rb"\x1f\x8b\x08": gzip.open,
    rb"BZh.1AY&SY": bz2.open,
    rb"\xfd7zXZ|\]\0\0\x80": lzma.open,
}
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
EDGE_BYTES = 2**20  # at each end of a file, for its fingerprint
HEADER_TYPES = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip
File = tuple[str, bytes | Exception | None]  # name and content; None for one that is not used


class ZipSource(ListedSource):
    """All images in a zip archive."""

    kind = "zip archive"

    def __init__(self, path: Path):
        try:
            self._archive = zipfile.ZipFile(path)
        except Exception as error:  # damaged fields make zipfile raise nearly anything
            raise ValueError(f"zip {path} is damaged or ends early: {error}") from None
        infos = [info for info in self._archive.infolist() if info.filename]
        if not any("/" in info.filename for info in infos):  # some programs of Windows write \
            self._infos = {info.filename.replace("\\", "/"): info for info in infos}
        else:
            self._infos = {info.filename: info for info in infos}
        folders = {name[:-1] for name in self._infos if name.endswith("/")}
        files = {name for name in self._infos if not name.endswith("/")}
        super().__init__(files, folders, f"zip {path}")

    def _content(self, name: str) -> bytes | Exception:
        if (size := self._infos[name].file_size) > MAX_FILE_BYTES:
            return ValueError(f"decompression bomb: {size:,} bytes unpacked")
        try:
            return self._archive.read(self._infos[name])
        except Exception as error:  # as above
            return error

    def _state(self, name: str) -> bytes:
        info = self._infos[name]
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
        self._links, self._inner = list[str](), list[str]()  # images that are links; other files
        self.fingerprint = hashlib.sha256(b"".join(map(_tar_state, paths))).hexdigest()

    def items(self, part: tuple[int, int] = (0, 1)) -> Iterator[Item]:
        if part[1] > len(self._paths):
            raise ValueError(
                f"{self.kind} cannot be split into {part[1]} parts: each part needs a tar of its "
                f"own, so use at most {len(self._paths)}"
            )
        self._links, is_empty = [], True
        for path in part_of(self._paths, part):
            for item in self._items_of(path):
                is_empty = False
                yield item
        if is_empty and part == (0, 1):
            where = f"tar {listed(self._paths, 3)}"
            raise ValueError(without_images(where, self._inner, self.skipped))
        if self._links:
            links = counted(len(self._links), "link")
            self.notes = [
                f"{links} in the tar cannot be followed ({listed(self._links, 3)}): pack the files "
                "themselves (tar --dereference --hard-dereference)"
            ]

    def _items_of(self, path: str) -> Iterator[Item]:
        num_images = 0
        try:
            for _, files in itertools.groupby(self._files(path), lambda file: _sample(file[0])):
                for sample in _samples(files):
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
        these are not a sample, but names that begin alike. An image whose whole name a label file
        shares, x.1.jpg and x.1.cls, has that label and no other.
        """
        unused = [name for name, content in sample if content is None]
        used = {name: content for name, content in sample if content is not None}
        labels = [name for name in used if is_label(name)]
        images = [name for name in used if name not in labels]
        plain = [name for name in images if posixpath.basename(name).count(".") == 1]
        if not images:  # labels of no image
            unused, used = [*unused, *used], {}
        elif plain and labels:
            unused += [name for name in images if name not in plain]
            images = plain
        for name in unused:
            suffix = posixpath.basename(name).partition(".")[2]
            self.skipped[f".{suffix}" if suffix else "no suffix"] += 1
        stems = {_stem(name) for name in images}
        shared = [name for name in labels if _stem(name) not in stems]
        for name in images:
            own = [label for label in labels if _stem(label) == _stem(name)]
            found = (_label(label, used[label]) for label in own + shared)
            yield Item(name, used[name], next((one for one in found if one is not None), None))

    def _files(self, path: str) -> Iterator[File]:
        with (
            fsspec.open(path, "rb") if "://" in path else Path(path).open("rb") as file,
            _damage_as_read_error(),
            tarfile.open(
                fileobj=_unpacked(file), mode="r|", bufsize=BLOCK_BYTES, tarinfo=_StrictTarInfo
            ) as archive,
        ):
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # else it keeps them all
                if member.size > MAX_MEMBER_BYTES:  # of which each block would be passed over
                    raise tarfile.ReadError(f"a file of {member.size:,} bytes")
                name = posixpath.normpath(_with_slashes(member.name))
                litter, is_used = litter_of(name.lstrip("/")), is_image(name) or is_label(name)
                if not member.isfile():
                    if is_used and not litter and (member.islnk() or member.issym()):
                        self._links.append(name)
                elif litter:
                    self.skipped[litter] += 1
                elif not (is_used or is_heif(name)):
                    self._inner += [name] if len(self._inner) < MAX_SAMPLE else []
                    yield name, None
                elif member.size > MAX_FILE_BYTES:
                    yield name, ValueError(f"decompression bomb: {member.size:,} bytes unpacked")
                else:
                    reader = archive.extractfile(member)
                    assert reader is not None  # it is a file
                    content = reader.read()
                    yield name, content if is_used or is_common_image(content) else None


def _unpacked(file: IO[bytes]) -> IO[bytes]:
    """The bytes of a tar, compressed or not, of which only what is asked for is unpacked at a time.

    tarfile itself unpacks whole blocks, however much they hold.
    """
    reader = io.BufferedReader(cast(io.RawIOBase, file))  # to look at its first bytes
    head = reader.peek(10)
    ways = (way for start, way in UNPACKERS.items() if re.match(start, head, re.DOTALL))
    unpack = next(ways, None)
    return unpack(reader) if unpack else reader


@contextlib.contextmanager
def _damage_as_read_error() -> Iterator[None]:
    """Makes whatever a damaged archive raises one of READ_ERRORS."""
    try:
        yield
    except (*READ_ERRORS, GeneratorExit):
        raise
    except Exception as error:  # damaged fields before a file make tarfile raise nearly anything
        raise tarfile.ReadError(one_line(error)) from None


class _StrictTarInfo(tarfile.TarInfo):
    """Raises for a truncated or damaged header, which tarfile takes for the archive's end.

    Also for a name or other facts of many bytes, which tarfile would read into memory.
    """

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> Any:
        try:
            info = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None
        if info.type in HEADER_TYPES and info.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {info.size:,} bytes")
        return info


def _with_slashes(name: str) -> str:
    """A name with `/` between its parts: some programs of Windows write `\\`."""
    return name if "/" in name else name.replace("\\", "/")


def _sample(name: str) -> str:
    """What the files of a sample share: their path up to the first dot of the name."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _stem(name: str) -> str:
    """A file's path without its suffix, in the form of `_sample`."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{posixpath.splitext(base)[0]}"


def _samples(files: Iterator[File]) -> Iterator[list[File]]:
    """Slices of at most MAX_SAMPLE files, or a few more, so that no name is torn from its label."""
    sample: list[File] = []
    for file in files:
        if len(sample) >= MAX_SAMPLE and _stem(file[0]) != _stem(sample[-1][0]):
            yield sample
            sample = []
        sample.append(file)
    if sample:
        yield sample


def is_label(name: str) -> bool:
    """Whether a file of a tar holds the label of an image, by its suffix."""
    return name.lower().endswith((".cls", ".json"))


def _label(name: str, content: bytes | Exception) -> Label:
    if isinstance(content, Exception):
        return None
    try:
        text = text_of(content).strip()
        if name.lower().endswith(".cls"):
            return number_or_name(text)
        record = parsed_json(text)
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
    if others := [path for path in local if not path.lower().endswith(TAR_SUFFIXES)]:
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

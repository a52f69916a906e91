"""Zips, tars and arrays: valid ones, strange ones, and damage that knows their structure."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import warnings
import zipfile
from random import Random

import numpy as np

from fuzz.damage import EXTREMES, damaged
from fuzz.pictures import damaged_picture, sound_picture

Members = list[tuple[str, bytes]]
STRANGE_NAMES = (
    "../../outside.png", "/outside/x.png", "..\\..\\x.png", "C:\\x\\y.png", "a//b.png", "./x.png",
    "cat/./x.png", "cat/../../../x.png", "~/x.png", "a\nb.png", "\x1b[31mred\x1b[0m.png", "x.png/",
    "é/ü.png", "e\u0301/x.png", "日本/写真.png", "caf\udce9/x.png", "\u202egnp.x", " .png", ".png",
    "x" * 300 + ".png", "/".join("d" * 150) + "/x.png", "-rf.png", "cat/$(id).png", "con.png",
    "cat/a.png", "metadata.jsonl", "dataset.json", "x.cls", "x.json", "", "/", "..", "\0.png",
)  # fmt: skip
KINDS_OF_LINK = (
    tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, b"S",
    tarfile.CONTTYPE, b"Q",
)  # fmt: skip
PAX_KEYS = (
    "path", "size", "linkpath", "mtime", "hdrcharset", "charset", "GNU.sparse.map",
    "GNU.sparse.size", "GNU.sparse.major",
)  # fmt: skip
PAX_VALUES = ("", "-1", "x", "9" * 40, "0,1,2", "../../x.png", "BINARY")
# Fields of a tar's header: where they begin and end.
FIELDS = (
    (0, 100), (100, 108), (124, 136), (136, 148), (156, 157), (157, 257), (257, 265), (345, 500),
)  # fmt: skip
FIELD_VALUES = (
    b"77777777777\0", b"00000000001\0", b"\x80" + b"\xff" * 11, b"x", b"", b"\xff" * 12,
    b"00000000777\0", b"g", b"x", b"L", b"K", b"S", b"1",
)  # fmt: skip
ARRAY_SHAPES = (
    "(5, 8, 8)", "(99999999999, 8, 8)", "(5, 9000, 9000)", "(5, 10**9, 8)", "(-1, 8, 8)", "()",
    "(5, True, 8)", "(1.5, 2, 2)", "5", "None", "(5, 8, 8, 99)", "(0, 8, 8)", "(2, 9400, 9400, 4)",
)  # fmt: skip
ARRAY_TYPES = (
    "'|u1'", "'<u2'", "'|O'", "'<f8'", "[('a', '|u1')]", "'x'", "None", "'<U999999999'",
)  # fmt: skip
PACKED = {".tar": bytes, ".tar.gz": gzip.compress, ".tgz": gzip.compress, ".tar.bz2": bz2.compress,
          ".tar.xz": lzma.compress}  # fmt: skip


def members(random: Random, num: int = 3) -> Members:
    """Images of two classes, in folders."""
    result: Members = []
    for name in ("cat", "dog"):
        for number in range(num):
            suffix, content = sound_picture(random)
            result.append((f"{name}/{number}.{suffix}", content))
    return result


def strange_members(random: Random) -> Members:
    """Members some of which have a strange name, or a damaged, foreign or huge content."""
    result = members(random, random.choice((1, 3)))
    for _ in range(random.choice((0, 1, 3))):
        number = random.randrange(len(result))
        name, content = result[number]
        how = random.random()
        if how < 0.6:
            name = random.choice(STRANGE_NAMES)
        elif how < 0.8:
            suffix, content = damaged_picture(random)
            name = f"{name.partition('.')[0]}.{suffix}"
        elif how < 0.9:
            inner = random.choice((zipped, tarred))(members(random, 1), random)
            name = random.choice((name, "inner.zip", "inner.tar"))
            content = inner
        else:
            content = bytes(random.choice((2**20, 2**25, 2**27 + 1)))
        result.insert(random.randrange(len(result) + 1), (name, content))
    return result


def zipped(files: Members, random: Random, is_strange: bool = False) -> bytes:
    """A zip of files."""
    file = io.BytesIO()
    ways = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED]
    ways += [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA] if is_strange else []
    with (
        warnings.catch_warnings(),
        zipfile.ZipFile(file, "w", random.choice(ways)) as archive,
    ):
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, content in files:
            if is_strange and random.random() < 0.2:
                archive.mkdir(f"empty{random.randrange(99)}")
            info = zipfile.ZipInfo(name.encode("utf-8", "replace").decode() or "x")
            info.compress_type = archive.compression
            if is_strange and random.random() < 0.2:
                info.external_attr = random.choice(EXTREMES)  # modes: links, devices
            archive.writestr(info, content)
    return file.getvalue()


def damaged_zip(content: bytes, random: Random) -> bytes:
    """A zip with a damaged entry of its directory or header of a file, or other damage."""
    starts = [
        place
        for mark in (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06")
        for place in _places(content, mark)
    ]
    how = random.random()
    if how < 0.6 and starts:
        changed = bytearray(content)
        for _ in range(random.choice((1, 1, 3))):
            place = min(random.choice(starts) + random.randrange(4, 46, 2), len(content) - 4)
            if random.random() < 0.5:
                struct.pack_into("<I", changed, place, random.choice(EXTREMES))
            else:
                struct.pack_into("<H", changed, place, random.choice(EXTREMES) & 0xFFFF)
        return bytes(changed)
    return damaged(content, random)


def _places(content: bytes, mark: bytes) -> list[int]:
    places, place = list[int](), content.find(mark)
    while place >= 0:
        places.append(place)
        place = content.find(mark, place + 1)
    return places


def tarred(files: Members, random: Random, is_strange: bool = False) -> bytes:
    """A tar of files, with links and devices among them if it is to be strange."""
    file = io.BytesIO()
    form = random.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)) if is_strange else None
    with tarfile.open(fileobj=file, mode="w", format=form, errors="surrogateescape") as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if is_strange and random.random() < 0.25:
                info.type = random.choice(KINDS_OF_LINK)
                info.linkname = random.choice((*STRANGE_NAMES, name, files[0][0]))
                info.size = 0 if info.type != tarfile.CONTTYPE else len(content)
            if is_strange and archive.format == tarfile.PAX_FORMAT and random.random() < 0.2:
                info.pax_headers = {random.choice(PAX_KEYS): random.choice(PAX_VALUES)}
            try:
                archive.addfile(info, io.BytesIO(content))
            except ValueError:  # a name or number that the format cannot hold
                continue
    return file.getvalue()


def damaged_tar(content: bytes, random: Random) -> bytes:
    """A tar with a changed field of a header, whose checksum is right again, or other damage."""
    blocks = [
        place
        for place in range(0, len(content) - 511, 512)
        if content[place + 257 : place + 262] == b"ustar"
    ]
    how = random.random()
    if how < 0.6 and blocks:
        changed = bytearray(content)
        for _ in range(random.choice((1, 1, 3))):
            place = random.choice(blocks)
            header = changed[place : place + 512]
            (start, stop), by = random.choice(FIELDS), random.choice(FIELD_VALUES)
            header[start:stop] = by[: stop - start].ljust(stop - start, b"\0")
            header[148:156] = b"        "
            header[148:156] = f"{sum(header):06o}\0 ".encode()
            changed[place : place + 512] = header
        return bytes(changed)
    if how < 0.65:  # a header for the next file that unpacks to very much
        info = tarfile.TarInfo("x")
        info.type, info.size = random.choice((tarfile.XHDTYPE, b"L", b"K", b"g")), 2**28
        return info.tobuf() + bytes(2**28) + content
    return damaged(content, random)


def arrays(random: Random) -> tuple[str, bytes, int]:
    """A .npy or .npz of 5 images with labels: its suffix, its content, and pixels of an image."""
    numbers = np.random.default_rng(random.getrandbits(32))
    shape = random.choice(((5, 8, 8), (5, 8, 9, 3), (5, 16, 8, 1), (5, 8, 8, 4)))
    images = numbers.integers(0, 256, shape, np.uint8)
    if len(shape) == 3 and random.random() < 0.3:
        images = images.astype(np.uint16) * 257
    file = io.BytesIO()
    if random.random() < 0.4:
        np.save(file, images)
        return ".npy", file.getvalue(), shape[1] * shape[2]
    save = random.choice((np.savez, np.savez_compressed))
    save(
        file,
        **{random.choice(("arr_0", "images", "x")): images, "labels": numbers.integers(0, 2, 5)},
    )
    return ".npz", file.getvalue(), shape[1] * shape[2]


def damaged_arrays(random: Random) -> tuple[str, bytes, int]:
    """An array with damaged bytes, or with a strange header of its own."""
    suffix, content, pixels = arrays(random)
    if random.random() < 0.6:
        if suffix == ".npz" and random.random() < 0.5:
            return suffix, damaged_zip(content, random), pixels
        return suffix, damaged(content, random), pixels
    shape, kind = random.choice(ARRAY_SHAPES), random.choice(ARRAY_TYPES)
    order = random.choice(("False", "True", "0"))
    text = f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': {shape}, }}"
    text = (
        random.choice((text, text, text[:-3], "(" * 500, "x" * 20_000, "__import__('os')")) + "\n"
    )
    header = b"\x93NUMPY\x01\0" + struct.pack("<H", min(len(text), 65535)) + text.encode()
    member = header + random.randbytes(5 * 64)
    if suffix == ".npy":
        return suffix, member, 9400**2
    names = random.choice((("arr_0.npy",), ("arr_0.npy", "labels.npy"), ("x.npy", "y.npy"), ("z",)))
    return suffix, zipped([(name, member) for name in names], random), 9400**2

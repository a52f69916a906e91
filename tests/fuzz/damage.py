"""Damage to files: to their bytes, and to the values of JSON and YAML."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

EXTREMES = (0, 1, 2, 127, 255, 32767, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
SMALL: list[Any] = [
    None, True, False, 0, -1, 1.5, 1e-300, float("nan"), float("inf"), "", " ", "x", "a\nb", "null",
    "\x1b[31m", "\udcff", "é" * 9, [], {}, [[]], [None], {"": None}, {"kind": "none"}, "2026-02-30",
]  # fmt: skip
LARGE = [*SMALL, 100_000, 2**31, 2**63, 10**30, 1e308, -(10**30), "9" * 5000, "x" * 100_000]


def flipped(content: bytes, random: Random) -> bytes:
    """Some bits are flipped."""
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8, 64))):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def overwritten(content: bytes, random: Random) -> bytes:
    """A stretch is overwritten with zeros, ones or random bytes."""
    start = random.randrange(len(content))
    num = min(random.choice((1, 4, 16, 512)), len(content) - start)
    by = random.choice((b"\0" * num, b"\xff" * num, random.randbytes(num)))
    return content[:start] + by + content[start + num :]


def numbered(content: bytes, random: Random) -> bytes:
    """A number of two or four bytes becomes an extreme one, mostly near the beginning."""
    start = random.randrange(min(len(content), random.choice((32, 128, len(content)))))
    order, form = random.choice("<>"), random.choice("HI")
    number = random.choice(EXTREMES) & (0xFFFF if form == "H" else 0xFFFFFFFF)
    by = struct.pack(order + form, number)
    return content[:start] + by + content[start + len(by) :]


def cut(content: bytes, random: Random) -> bytes:
    """The end is missing."""
    return content[: random.randrange(len(content))]


def removed(content: bytes, random: Random) -> bytes:
    """A stretch is missing."""
    start = random.randrange(len(content))
    return content[:start] + content[start + random.choice((1, 2, 7, 64, 512)) :]


def repeated(content: bytes, random: Random) -> bytes:
    """A stretch is there more than once."""
    start = random.randrange(len(content))
    part = content[start : start + random.choice((1, 4, 64, 512))]
    return content[:start] + part * random.choice((2, 3, 40)) + content[start + len(part) :]


def swapped(content: bytes, random: Random) -> bytes:
    """Two neighbouring stretches change places."""
    a, b, c = sorted(random.randrange(len(content) + 1) for _ in range(3))
    return content[:a] + content[b:c] + content[a:b] + content[c:]


def emptied(content: bytes, random: Random) -> bytes:
    """Nothing is left, or something else."""
    others = (b"", b"\0" * len(content), random.randbytes(100), b"\xff\xfe", b"[" * 100_000)
    return random.choice(others)


DAMAGES: tuple[Callable[[bytes, Random], bytes], ...] = (
    flipped, flipped, overwritten, numbered, numbered, cut, removed, repeated, swapped, emptied,
)  # fmt: skip


def damaged(content: bytes, random: Random, most: int = 3) -> bytes:
    """A file's content after one or a few kinds of damage."""
    for _ in range(random.randint(1, most)):
        if content:
            content = random.choice(DAMAGES)(content, random)
    return content


def strange(value: Any, random: Random, values: list[Any] = LARGE) -> Any:
    """JSON-like data in which one value is replaced, removed, renamed or doubled."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []

    def visit(container: Any) -> None:
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            places.append((container, key))
            if isinstance(container[key], dict | list):
                visit(container[key])

    if isinstance(value, dict | list):
        visit(value)
    if not places or random.random() < 0.02:
        return random.choice(values)
    container, key = random.choice(places)
    how = random.random()
    if how < 0.7:
        container[key] = copy.deepcopy(random.choice(values))
    elif how < 0.9:
        del container[key]
    elif isinstance(container, dict):
        container[random.choice(("x", "", "base", "kind", "label", "file_name"))] = container[key]
    else:
        container.insert(key, container[key])
    return value


def strange_json(content: bytes, random: Random, values: list[Any] = LARGE) -> bytes:
    """A JSON file, or one of JSON lines, with one strange value; else damaged bytes."""
    if random.random() < 0.3:
        return damaged(content, random)
    lines = [content] if content.lstrip().startswith((b"[", b"{\n")) else content.splitlines()
    number = random.randrange(len(lines))
    try:
        value = strange(json.loads(lines[number]), random, values)
    except ValueError:  # it is damaged already
        return damaged(content, random)
    lines[number] = json.dumps(value, indent=1 if len(lines) == 1 else None).encode()
    return b"\n".join(lines) + b"\n"

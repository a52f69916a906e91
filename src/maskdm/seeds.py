"""Randomness is an argument: every random stream is named by the numbers that it depends on."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, stream: str, *counters: int) -> int:
    """A 63-bit seed that depends on all its arguments and on nothing else.

    `stream` keeps uses apart (`"order"`, `"step"`, `"sample"`), counters are what the stream is
    indexed by (rank, step, image number). The same on every machine and in every version of the
    libraries, since it is a hash of the arguments' text.
    """
    text = ":".join([str(seed), stream, *map(str, counters)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1

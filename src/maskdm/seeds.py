"""Randomness is an argument: every random stream is named by the numbers that it depends on."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

STATE_WORDS = slice(24, 24 + 624 * 8)  # of torch's CPU generator: the Mersenne Twister's own


def derive_seed(seed: int, stream: str, *counters: int) -> int:
    """A 63-bit seed that depends on all its arguments and on nothing else.

    `stream` keeps uses apart (`"order"`, `"step"`, `"sample"`), counters are what the stream is
    indexed by (rank, step, image number). The same on every machine and in every version of the
    libraries, since it is a hash of the arguments' text.
    """
    text = ":".join([str(seed), stream, *map(str, counters)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def image_generator(seed: int, stream: str, index: int) -> torch.Generator:
    """A CPU generator for an image's random numbers, which depends on all bits of its seed.

    `manual_seed` of a CPU generator takes the low 32 bits alone, and of 100,000 seeds two agree in
    those more often than not. So numpy, which takes all of them, fills the Mersenne Twister's 624
    words, the same in both libraries.
    """
    import numpy as np
    import torch

    words = np.random.MT19937(derive_seed(seed, stream, index)).state["state"]["key"]
    generator = torch.Generator()
    generator.manual_seed(0)
    state = generator.get_state()
    state[STATE_WORDS] = torch.from_numpy(words.astype("<u8").view(np.uint8))
    generator.set_state(state)
    return generator

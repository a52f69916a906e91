"""From one image to another: the way between their initial noises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from maskdm.sampling.generate import Randomness, initial_noise
from maskdm.seeds import image_generator


@dataclass(frozen=True)
class Between(Randomness):
    """Images 0..num-1 on the way from the first image of one seed to that of another.

    The noises in between are standard normal too: they lie on the great circle through both ends
    (Shoemake 1985; for diffusion Song et al. 2020a, Appendix D.5). What samplers add on the way is
    the same for all images, the first seed's.

    Attributes:
        first, second: the seeds, which differ.
        num: images, both ends among them; at least 2.
    """

    first: int
    second: int
    num: int

    def noise(self, indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        start, end = (initial_noise(seed, [0], shape)[0] for seed in (self.first, self.second))
        return torch.stack([slerp(start, end, index / (self.num - 1)) for index in indices])

    def generators(self, stream: str, indices: Sequence[int]) -> list[Generator]:
        return [image_generator(self.first, stream, 0) for _ in indices]


def slerp(start: Tensor, end: Tensor, part: float) -> Tensor:
    """Spherical interpolation between two tensors of one shape; part 0 = start, 1 = end."""
    unit_start, unit_end = (one.double() / one.double().norm() for one in (start, end))
    angle = (unit_start * unit_end).sum().clamp(-1, 1).acos()
    weights = ((1 - part) * angle).sin() / angle.sin(), (part * angle).sin() / angle.sin()
    return (weights[0] * start + weights[1] * end).to(start.dtype)

"""The dense path round a masked middle: some patches pass the blocks in the middle by.

After TREAD (Krause et al. 2025) and SPRINT (Park et al. 2025): the blocks at both ends see every
patch, those in the middle a part of them; what passed by meets what was worked on at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskdm.tokens import gather_patches


def num_ends(depth: int) -> int:
    """Blocks at each end of `depth` that see every patch: a sixth of them, at least one.

    A network of fewer than three blocks has no middle (recipes refuse it).
    """
    return max(1, depth // 6)


class Route:
    """Takes tokens into the middle, and back to their places.

    Args:
        middle: patches that the middle works on, int64 (B, M), indices into the given ones.
        num_extras: tokens before the patches, which always go through.
    """

    def __init__(self, middle: Tensor, num_extras: int):
        extras = torch.arange(num_extras, device=middle.device).expand(len(middle), num_extras)
        self._chosen = torch.cat([extras, middle + num_extras], dim=1)  # (B, E + M)
        self._outside: Tensor | None = None

    def enter(self, x: Tensor) -> Tensor:
        """Keeps all tokens, and takes those of the middle: (B, E + V, D) -> (B, E + M, D)."""
        self._outside = x
        return self.taken(x)

    def taken(self, x: Tensor) -> Tensor:
        """The middle's rows of what belongs to all tokens: (B, E + V, D) -> (B, E + M, D)."""
        return gather_patches(x, self._chosen)

    def leave(self, x: Tensor) -> Tensor:
        """Puts the middle's tokens back among those that passed by: -> (B, E + V, D)."""
        assert self._outside is not None
        # Under autocast the middle may have left them in another dtype.
        worked_on = x.to(self._outside.dtype)
        return self._outside.scatter(1, self._chosen[..., None].expand_as(x), worked_on)

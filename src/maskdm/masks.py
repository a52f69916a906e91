"""The paper's masks, as indices of the patches that stay VISIBLE (Section 3.2, Figure 3a).

All functions of the family draw `visible`: int64 (B, V), sorted along V, where V depends on the
settings alone. Every image of the batch gets its own mask. Drawn on the generator's device,
without a look from the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from maskdm.recipe import Mask

Grid = tuple[int, int]  # rows, columns of patches


def draw_visible(mask: Mask, grid: Grid, batch_size: int, generator: Generator) -> Tensor:
    """Draws one mask per image: int64 (B, V), sorted indices into the row-major patch grid.

    V = `num_visible(mask, grid)`; rate 0 gives every index by the same path.
    Raises ValueError for a mask that the grid cannot have.
    """
    count = num_visible(mask, grid)
    if count == grid[0] * grid[1]:
        indices = torch.arange(count, device=generator.device)
        return indices.expand(batch_size, count)
    return MASKS[mask.kind](mask, grid, batch_size, generator)


def num_visible(mask: Mask, grid: Grid) -> int:
    """Number V of visible patches under a mask, the same for every image.

    Raises ValueError where the rate, rounded to what the mask can hide, hides everything or
    (though above zero) nothing, and where blocks do not tile the grid.
    """
    rows, columns = grid
    if mask.rate == 0:
        return rows * columns
    if mask.kind == "crop":
        rates = [1 - side * side / (rows * columns) for side in range(1, min(grid) + 1)]
        side = _crop_side(mask.rate, grid)
        _refuse_extremes(mask, [r for r in rates if r > 0], side * side < rows * columns)
        return side * side
    block = mask.block if mask.kind == "block" else 1
    if rows % block or columns % block:
        fitting = [n for n in range(1, min(grid) + 1) if rows % n == 0 and columns % n == 0]
        raise ValueError(
            f"blocks of {block}x{block} patches do not tile a grid of {rows}x{columns}: "
            f"use block {', '.join(map(str, fitting))}"
        )
    num_blocks = (rows // block) * (columns // block)
    num_hidden = _round(mask.rate * num_blocks)
    rates = [hidden / num_blocks for hidden in range(1, num_blocks)]
    _refuse_extremes(mask, rates, 0 < num_hidden < num_blocks)
    return (num_blocks - num_hidden) * block * block


def effective_rate(mask: Mask, grid: Grid) -> float:
    """The fraction really hidden, after rounding to whole patches, blocks or squares."""
    return 1 - num_visible(mask, grid) / (grid[0] * grid[1])


def _round(value: float) -> int:
    """Nearest integer, halves up (Python's round takes them to the even neighbour)."""
    return math.floor(value + 0.5)


def _crop_side(rate: float, grid: Grid) -> int:
    """Side, in patches, of the visible square whose area is nearest to what the rate leaves."""
    side = _round(math.sqrt((1 - rate) * grid[0] * grid[1]))
    return min(max(side, 1), *grid)


def _refuse_extremes(mask: Mask, possible_rates: list[float], is_possible: bool) -> None:
    if is_possible:
        return
    nearest = sorted(possible_rates, key=lambda rate: abs(rate - mask.rate))[:2]
    raise ValueError(
        f"mask rate {mask.rate:g} ({mask.kind}) would hide everything or nothing on this grid: "
        + (
            f"the nearest possible are {', '.join(f'{rate:.4g}' for rate in sorted(nearest))}"
            if nearest
            else "it is too coarse for any mask of this kind"
        )
    )


def _random_subset(batch_size: int, size: int, count: int, generator: Generator) -> Tensor:
    """Uniform subsets of range(size): int64 (B, count), in no order (argsort of noise)."""
    noise = torch.rand(batch_size, size, generator=generator, device=generator.device)
    return noise.argsort(dim=1)[:, :count]


def _visible_patches(mask: Mask, grid: Grid, batch_size: int, generator: Generator) -> Tensor:
    count = num_visible(mask, grid)
    return _random_subset(batch_size, grid[0] * grid[1], count, generator).sort(dim=1).values


def _visible_blocks(mask: Mask, grid: Grid, batch_size: int, generator: Generator) -> Tensor:
    block, (rows, columns) = mask.block, grid
    block_columns = columns // block
    num_blocks = (rows // block) * block_columns
    count = num_visible(mask, grid) // block**2
    chosen = _random_subset(batch_size, num_blocks, count, generator)  # (B, blocks)
    corner = (chosen // block_columns * columns + chosen % block_columns) * block
    patches = corner[..., None] + _square(block, columns, generator.device)  # (B, blocks, k*k)
    return patches.flatten(1).sort(dim=1).values


def _visible_crop(mask: Mask, grid: Grid, batch_size: int, generator: Generator) -> Tensor:
    rows, columns = grid
    side = _crop_side(mask.rate, grid)
    device = generator.device
    top = torch.randint(rows - side + 1, (batch_size, 1), generator=generator, device=device)
    left = torch.randint(columns - side + 1, (batch_size, 1), generator=generator, device=device)
    return top * columns + left + _square(side, columns, device)  # (B, side*side), sorted


def _square(side: int, columns: int, device: torch.device) -> Tensor:
    """Row-major offsets of a square of patches from its top-left one: (side*side,)."""
    steps = torch.arange(side, device=device)
    return (steps[:, None] * columns + steps).flatten()


MASKS: dict[str, Callable[[Mask, Grid, int, Generator], Tensor]] = {
    "patch": _visible_patches,
    "block": _visible_blocks,
    "crop": _visible_crop,
}

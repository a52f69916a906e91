"""The paper's masks, as indices of the patches that stay VISIBLE (Section 3.2, Figure 3a).

A kind of mask is two functions, side by side below: how many patches it leaves, and which. All draw
`visible`: int64 (B, V), sorted along V, where V depends on the settings alone. Every image of the
batch gets its own mask, drawn on the generator's device without a look from the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from maskdm.families import MASKS
from maskdm.recipe import Mask

Grid = tuple[int, int]  # rows, columns of patches
Count = tuple[int, Sequence[int]]  # visible patches under a mask, and under masks of any other rate


def draw_visible(mask: Mask, grid: Grid, batch_size: int, generator: Generator) -> Tensor:
    """Draws one mask per image.

    Args:
        mask: kind, rate, block size.
        grid: rows and columns of patches.
        batch_size: number B of images.
        generator: its device is that of the result.

    Returns:
        int64 (B, V), sorted indices into the row-major patch grid, V = `num_visible(mask, grid)`.
        Rate 0 gives every index.

    Raises:
        ValueError: a mask that the grid cannot have.

    Example:
        >>> draw_visible(Mask(kind="patch", rate=0.75), (4, 4), 2, torch.Generator()).shape
        torch.Size([2, 4])
    """
    count = num_visible(mask, grid)
    if count == grid[0] * grid[1]:
        # Every index in order needs no random numbers: a stage without a mask draws none, so its
        # noise does not depend on which kind of mask its rate of 0 belongs to.
        return torch.arange(count, device=generator.device).expand(batch_size, count)
    visible: Tensor = MASKS[mask.kind].draw(mask, grid, batch_size, generator)
    return visible


def num_visible(mask: Mask, grid: Grid) -> int:
    """Number V of visible patches under a mask, the same for every image.

    Raises ValueError where the rate, rounded to what the mask can hide, hides everything or
    (though above zero) nothing, and where blocks do not tile the grid.
    """
    total = grid[0] * grid[1]
    if mask.rate == 0:
        return total
    count, possible = MASKS[mask.kind].count(mask, grid)
    if 0 < count < total:
        return count
    rates = [1 - other / total for other in possible if 0 < other < total]
    nearest = sorted(rates, key=lambda rate: abs(rate - mask.rate))[:2]
    raise ValueError(
        f"mask rate {mask.rate:g} ({mask.kind}) would hide everything or nothing on this grid: "
        + (
            f"the nearest possible are {', '.join(f'{rate:.4g}' for rate in sorted(nearest))}"
            if nearest
            else "it is too coarse for any mask of this kind"
        )
    )


def effective_rate(mask: Mask, grid: Grid) -> float:
    """The fraction really hidden, after rounding to whole patches, blocks or squares."""
    return 1 - num_visible(mask, grid) / (grid[0] * grid[1])


def mask_text(mask: Mask) -> str:
    """What a mask hides: `2x2 blocks`."""
    return MASKS[mask.kind].title.format(block=mask.block)


def count_patches(mask: Mask, grid: Grid) -> Count:
    """Single patches: the number hidden is the nearest to the rate, or the next below."""
    total = grid[0] * grid[1]
    return total - _whole(mask.rate * total, mask), range(total)


def draw_patches(mask: Mask, grid: Grid, batch_size: int, generator: Generator) -> Tensor:
    """Single patches, each subset equally likely."""
    count = num_visible(mask, grid)
    return _random_subset(batch_size, grid[0] * grid[1], count, generator).sort(dim=1).values


def count_blocks(mask: Mask, grid: Grid) -> Count:
    """Blocks: whole ones. Raises ValueError where they do not tile the grid."""
    (rows, columns), block = grid, mask.block
    if rows % block or columns % block:
        fitting = [n for n in range(1, min(grid) + 1) if rows % n == 0 and columns % n == 0]
        raise ValueError(
            f"blocks of {block}x{block} patches do not tile a grid of {rows}x{columns}: "
            f"use block {', '.join(map(str, fitting))}"
        )
    num_blocks = (rows // block) * (columns // block)
    visible = num_blocks - _whole(mask.rate * num_blocks, mask)
    return visible * block**2, range(0, num_blocks * block**2, block**2)


def draw_blocks(mask: Mask, grid: Grid, batch_size: int, generator: Generator) -> Tensor:
    """Blocks on a grid of their own, each subset of them equally likely."""
    block, (rows, columns) = mask.block, grid
    block_columns = columns // block
    num_blocks = (rows // block) * block_columns
    count = num_visible(mask, grid) // block**2
    chosen = _random_subset(batch_size, num_blocks, count, generator)  # (B, blocks)
    # A block's number gives its row and column among blocks, and so its top-left patch.
    corner = (chosen // block_columns * columns + chosen % block_columns) * block
    patches = corner[..., None] + _square(block, columns, generator.device)  # (B, blocks, k*k)
    return patches.flatten(1).sort(dim=1).values


def count_crop(mask: Mask, grid: Grid) -> Count:
    """A square, whose side is the root of the area that the rate leaves, to a whole number."""
    side = _crop_side(mask, grid)
    return side * side, [n * n for n in range(1, min(grid) + 1)]


def draw_crop(mask: Mask, grid: Grid, batch_size: int, generator: Generator) -> Tensor:
    """A square, each place equally likely."""
    rows, columns = grid
    side = _crop_side(mask, grid)
    device = generator.device
    top = torch.randint(rows - side + 1, (batch_size, 1), generator=generator, device=device)
    left = torch.randint(columns - side + 1, (batch_size, 1), generator=generator, device=device)
    return top * columns + left + _square(side, columns, device)  # (B, side*side), sorted


def _whole(value: float, mask: Mask) -> int:
    """The nearest integer, halves up (Python's round takes them to the even neighbour), or below.

    A rate such as 0.29 is a little off in binary: of 100 patches it hides 29, not 28.
    """
    return math.floor(value + (0.5 if mask.rounding == "nearest" else 1e-9))


def _crop_side(mask: Mask, grid: Grid) -> int:
    side = _whole(math.sqrt((1 - mask.rate) * grid[0] * grid[1]), mask)
    return min(max(side, 1), *grid)


def _random_subset(batch_size: int, size: int, count: int, generator: Generator) -> Tensor:
    """Uniform subsets of range(size): int64 (B, count), in no order."""
    # The order of random numbers is a random permutation; its first entries are the subset. One
    # sort for the whole batch, where drawing without replacement would loop over images.
    noise = torch.rand(batch_size, size, generator=generator, device=generator.device)
    return noise.argsort(dim=1)[:, :count]


def _square(side: int, columns: int, device: torch.device) -> Tensor:
    """Row-major offsets of a square of patches from its top-left one: (side*side,)."""
    steps = torch.arange(side, device=device)
    return (steps[:, None] * columns + steps).flatten()

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from maskdm.masks import MASKS, draw_visible, effective_rate, num_visible
from maskdm.recipe import Mask


def draw(mask: Mask, grid: tuple[int, int], num: int = 64, seed: int = 0) -> torch.Tensor:
    return draw_visible(mask, grid, num, torch.Generator().manual_seed(seed))


@given(
    st.sampled_from(sorted(set(MASKS) - {"none"})),
    st.integers(1, 12),
    st.integers(1, 12),
    st.floats(0, 0.99),
    st.integers(1, 4),
    st.integers(0, 2**62),
)
def test_visible_are_sorted_distinct_indices_of_the_announced_number(
    kind, rows, columns, rate, block, seed
):
    mask = Mask(kind=kind, rate=rate, block=block)
    try:
        count = num_visible(mask, (rows, columns))
    except ValueError:
        assume(False)
    visible = draw(mask, (rows, columns), num=5, seed=seed)
    assert visible.dtype == torch.int64 and visible.shape == (5, count)
    assert (visible.diff(dim=1) > 0).all()
    assert visible.min() >= 0 and visible.max() < rows * columns
    assert effective_rate(mask, (rows, columns)) == pytest.approx(1 - count / (rows * columns))


def test_blocks_are_hidden_whole():
    visible = draw(Mask(kind="block", rate=0.5, block=4), (8, 12))
    shown = torch.zeros(64, 96).scatter(1, visible, 1.0).view(64, 2, 4, 3, 4)
    per_block = shown.sum(dim=(2, 4))
    assert set(per_block.unique().tolist()) == {0.0, 16.0}
    assert (per_block.sum(dim=(1, 2)) == 3 * 16).all()


def test_a_crop_shows_one_square_at_any_place():
    visible = draw(Mask(kind="crop", rate=0.75), (8, 8), num=2000)
    rows, columns = visible // 8, visible % 8
    for axis in (rows, columns):
        assert (axis.amax(1) - axis.amin(1) == 3).all()
    corners = {(int(r), int(c)) for r, c in zip(rows.amin(1), columns.amin(1), strict=True)}
    assert len(corners) == 25


@pytest.mark.parametrize("kind", ["patch", "block"])
def test_every_patch_is_visible_equally_often(kind):
    visible = draw(Mask(kind=kind, rate=0.75, block=2), (4, 4), num=8000)
    share = torch.bincount(visible.flatten(), minlength=16) / 8000
    assert (share - 0.25).abs().max() < 0.02  # four standard deviations


def test_masks_depend_on_the_generator_alone_and_differ_between_images():
    mask = Mask(kind="patch", rate=0.5)
    first, again, other = draw(mask, (8, 8)), draw(mask, (8, 8)), draw(mask, (8, 8), seed=1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_rate_zero_shows_every_patch_by_the_same_path():
    for kind in MASKS:
        visible = draw(Mask(kind=kind, rate=0), (2, 3), num=2)
        assert torch.equal(visible, torch.arange(6).expand(2, 6))


def test_the_rate_is_rounded_to_whole_blocks():
    mask = Mask(kind="block", rate=0.9, block=4)
    assert effective_rate(mask, (16, 16)) == 0.875
    assert num_visible(mask, (16, 16)) == 32


@given(st.integers(0, 99), st.sampled_from([8, 16, 32, 64]), st.sampled_from([1, 2, 4]))
def test_floor_hides_as_many_as_the_authors_code(percent, side, block):
    """Their int(rate x patches) // block^2 blocks, in whole numbers."""
    hidden = percent * side**2 // 100 // block**2
    mask = Mask(kind="block", rate=percent / 100, block=block, rounding="floor")
    assume(hidden > 0 or percent == 0)
    assert side**2 - num_visible(mask, (side, side)) == hidden * block**2
    if block == 1:
        patches = Mask(kind="patch", rate=percent / 100, rounding="floor")
        assert num_visible(patches, (side, side)) == num_visible(mask, (side, side))


def test_rounding_decides_at_90_percent_of_4x4_blocks_on_the_papers_grids():
    """14.4 of 16 blocks at 64 pixels, 57.6 of 64 at 128."""
    for side, nearest, floor in ((16, 14, 14), (32, 58, 57)):
        for rounding, hidden in (("nearest", nearest), ("floor", floor)):
            mask = Mask(kind="block", rate=0.9, block=4, rounding=rounding)
            assert side**2 - num_visible(mask, (side, side)) == 16 * hidden
    crop = Mask(kind="crop", rate=0.55, rounding="floor")  # a side of 10.73 patches
    assert num_visible(crop, (16, 16)) == 10**2
    assert num_visible(Mask(kind="crop", rate=0.55), (16, 16)) == 11**2


@pytest.mark.parametrize(
    ("mask", "grid", "message"),
    [
        (Mask(kind="patch", rate=0.001), (8, 8), "nearest possible are 0.01562, 0.03125"),
        (Mask(kind="patch", rate=0.999), (8, 8), "nearest possible are 0.9688, 0.9844"),
        (Mask(kind="block", rate=0.9, block=4), (8, 8), "nearest possible are 0.5, 0.75"),
        (Mask(kind="block", rate=0.5, block=8), (8, 8), "too coarse"),
        (Mask(kind="crop", rate=0.01), (4, 4), "nearest possible are 0.4375, 0.75"),
        (Mask(kind="block", rate=0.5, block=3), (8, 8), "do not tile a grid of 8x8: use block 1"),
    ],
)
def test_masks_that_a_grid_cannot_have_are_refused_with_the_nearest(mask, grid, message):
    with pytest.raises(ValueError, match=message):
        num_visible(mask, grid)

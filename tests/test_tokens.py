from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskdm.tokens import gather_patches, grid_shape, patchify, scatter_patches, unpatchify

sizes = st.integers(1, 4)


@given(sizes, sizes, sizes, sizes, st.integers(1, 4))
def test_unpatchify_is_the_exact_inverse_of_patchify(batch, rows, columns, patch, channels):
    images = torch.randn(batch, rows * patch, columns * patch, channels)
    patches = patchify(images, patch)
    assert patches.shape == (batch, rows * columns, patch * patch * channels)
    assert torch.equal(unpatchify(patches, patch, (rows, columns)), images)


def test_patches_are_row_major_and_values_are_row_column_channel():
    images = torch.arange(4 * 6 * 2).reshape(1, 4, 6, 2)
    patches = patchify(images, 2)
    assert torch.equal(patches[0, 4], images[0, 2:4, 2:4].flatten())  # second row, second column


def test_scatter_puts_gathered_patches_back_and_zeros_elsewhere():
    patches = torch.randn(2, 6, 3)
    visible = torch.tensor([[0, 4, 5], [1, 2, 3]])
    kept = gather_patches(patches, visible)
    assert torch.equal(kept[1], patches[1, 1:4])
    full = scatter_patches(kept, visible, 6)
    assert torch.equal(gather_patches(full, visible), kept)
    assert full[0, 1:4].abs().sum() == 0 and full[1, [0, 4, 5]].abs().sum() == 0


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="30x32 is not a multiple of patch_size 4"):
        grid_shape(30, 32, 4)
    with pytest.raises(ValueError, match="do not fill a grid of 2x2"):
        unpatchify(torch.zeros(1, 5, 4), 2, (2, 2))

"""Images as sequences of patch vectors, and back; choosing some of the patches by index."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def height_and_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Both sides, in pixels, of images whose size is given as the side of a square or as both.

    Raises ValueError for anything but one or two whole numbers above 0.
    """
    sides = [image_size] if isinstance(image_size, int) else list(image_size)
    if not 1 <= len(sides) <= 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(
            f"image_size {image_size!r} must be a number of pixels above 0, or height and width"
        )
    return sides[0], sides[-1]


def grid_shape(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Rows and columns of the patch grid of an image of `height` x `width` pixels.

    Raises ValueError where the patches do not tile the image.
    """
    if height % patch_size or width % patch_size:
        raise ValueError(f"image of {height}x{width} is not a multiple of patch_size {patch_size}")
    return height // patch_size, width // patch_size


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cuts images into patch vectors.

    Args:
        images: (B, H, W, C), any dtype.
        patch_size: side of a patch in pixels; it divides H and W.

    Returns:
        (B, N, P) of the same dtype: N patches in row-major order over the grid, each of
        P = patch_size * patch_size * C values in (row, column, channel) order.

    Raises:
        ValueError: the patches do not tile the image.
    """
    batch, height, width, channels = images.shape
    rows, columns = grid_shape(height, width, patch_size)
    x = images.reshape(batch, rows, patch_size, columns, patch_size, channels)
    x = x.transpose(2, 3)  # (B, rows, columns, row, column, channel)
    return x.reshape(batch, rows * columns, patch_size * patch_size * channels)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """The exact inverse of `patchify`: (B, N, P) to (B, H, W, C), N = grid rows x columns."""
    batch, num_patches, values = patches.shape
    rows, columns = grid
    if num_patches != rows * columns or values % patch_size**2:
        raise ValueError(
            f"patches of shape {tuple(patches.shape)} do not fill a grid of {rows}x{columns} "
            f"patches of {patch_size}x{patch_size} pixels"
        )
    channels = values // patch_size**2
    x = patches.reshape(batch, rows, columns, patch_size, patch_size, channels)
    x = x.transpose(2, 3)  # (B, rows, row, columns, column, channel)
    return x.reshape(batch, rows * patch_size, columns * patch_size, channels)


def gather_patches(patches: Tensor, visible: Tensor) -> Tensor:
    """Takes the patches at the indices `visible`: (B, N, P), int64 (B, V) -> (B, V, P).

    Example:
        >>> images = torch.rand(2, 8, 8, 3)  # (B, H, W, C)
        >>> patches = patchify(images, 4)  # (B, 4, 48): a grid of 2x2
        >>> visible = torch.tensor([[0, 3], [1, 2]])
        >>> gather_patches(patches, visible).shape
        torch.Size([2, 2, 48])
        >>> torch.equal(unpatchify(patches, 4, (2, 2)), images)
        True
    """
    return patches.gather(1, visible[..., None].expand(-1, -1, patches.shape[-1]))


def scatter_patches(patches: Tensor, visible: Tensor, num_patches: int) -> Tensor:
    """Puts patches back at their indices, zeros elsewhere: (B, V, P) -> (B, N, P).

    The inverse of `gather_patches` on the visible patches.
    """
    full = patches.new_zeros(patches.shape[0], num_patches, patches.shape[-1])
    return full.scatter(1, visible[..., None].expand_as(patches), patches)

"""One training step's randomness and gradients."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Generator, Tensor, nn

from maskdm.diffusion.objective import masked_denoising_loss
from maskdm.diffusion.schedule import DiscreteSchedule
from maskdm.masks import Grid, draw_visible
from maskdm.recipe import Diffusion, Mask
from maskdm.seeds import derive_seed
from maskdm.tokens import gather_patches, patchify


@dataclass(frozen=True)
class Batch:
    """A step's visible patches with all that is random about them.

    Attributes:
        x0: clean patches, float32 (B, V, P) in [-1, 1].
        visible: their indices in the grid, int64 (B, V).
        t: times, float32 (B,).
        noise: float32 (B, V, P).
        labels: classes, int64 (B,), or None.
    """

    x0: Tensor
    visible: Tensor
    t: Tensor
    noise: Tensor
    labels: Tensor | None


def step_generator(seed: int, rank: int, step: int, device: torch.device) -> Generator:
    """The generator of everything random in a step: a function of (seed, rank, step) alone."""
    return Generator(device).manual_seed(derive_seed(seed, "step", rank, step))


def draw_batch(
    images: Tensor,
    labels: Tensor | None,
    mask: Mask,
    grid: Grid,
    flip: bool,
    schedule: DiscreteSchedule,
    generator: Generator,
) -> Batch:
    """Mirrors images by option, keeps their visible patches, draws times and noise.

    Patches are chosen while they are still bytes: hidden ones are never converted, noised or
    embedded. `images` is uint8 (B, H, W, C) on the generator's device.
    """
    num, device = len(images), generator.device
    if flip:
        mirrored = torch.rand(num, generator=generator, device=device) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(2), images)
    visible = draw_visible(mask, grid, num, generator)
    patch_size = images.shape[1] // grid[0]
    patches = gather_patches(patchify(images, patch_size), visible)  # uint8 (B, V, P)
    x0 = patches.float() / 127.5 - 1
    t = schedule.draw_times(num, generator)
    noise = torch.randn(x0.shape, generator=generator, device=device)
    return Batch(x0, visible, t, noise, labels)


def backward(
    accelerator: Accelerator,
    model: nn.Module,
    batch: Batch,
    schedule: DiscreteSchedule,
    diffusion: Diffusion,
    micro_batch_size: int | None,
) -> Tensor:
    """Adds up the gradients of the mean loss, a micro-batch at a time.

    Returns:
        The mean loss of this rank's batch: float32 (), still on the device.
    """
    num = len(batch.x0)
    size = micro_batch_size or num
    mean_loss = torch.zeros((), device=batch.x0.device)
    for start in range(0, num, size):
        part = slice(start, start + size)
        is_last = start + size >= num
        # Ranks exchange gradients once a step, with the last micro-batch.
        with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
            losses = masked_denoising_loss(
                model,
                batch.x0[part],
                batch.visible[part],
                batch.t[part],
                batch.noise[part],
                schedule,
                diffusion,
                None if batch.labels is None else batch.labels[part],
            )
            loss = losses.sum() / num
            accelerator.backward(loss)
        mean_loss += loss.detach()
    return mean_loss

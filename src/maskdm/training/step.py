"""One training step's randomness and gradients."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Generator, Tensor, nn

from maskdm.diffusion.objective import masked_denoising_loss
from maskdm.diffusion.schedule import Schedule
from maskdm.diffusion.times import Share, draw_times
from maskdm.masks import draw_visible
from maskdm.recipe import Diffusion, Mask, Recipe, Stage
from maskdm.seeds import derive_seed
from maskdm.tokens import gather_patches, grid_shape, patchify


@dataclass(frozen=True)
class Batch:
    """A step's visible patches with all that is random about them.

    Attributes:
        x0: clean patches, float32 (B, V, P) in [-1, 1].
        visible: their indices in the grid, int64 (B, V).
        t: times, float32 (B,).
        noise: float32 (B, V, P).
        labels: classes, int64 (B,), num_classes where dropped; or None.
        middle: the patches that the network's middle works on, int64 (B, M); None = all.
    """

    x0: Tensor
    visible: Tensor
    t: Tensor
    noise: Tensor
    labels: Tensor | None
    middle: Tensor | None = None


def step_generator(seed: int, rank: int, step: int, device: torch.device) -> Generator:
    """The generator of a rank's random numbers in a step: a function of (seed, rank, step)."""
    # A CPU's generator takes the low 32 bits of a seed alone. Two steps in a million may agree in
    # them, which is harmless here; images that are drawn take all (`seeds.image_generator`).
    return Generator(device).manual_seed(derive_seed(seed, "step", rank, step))


def shared_generator(seed: int, step: int, device: torch.device) -> Generator:
    """The generator of what all ranks share in a step: a function of (seed, step)."""
    return Generator(device).manual_seed(derive_seed(seed, "shared", step))


def draw_batch(
    images: Tensor,
    labels: Tensor | None,
    recipe: Recipe,
    stage: Stage,
    schedule: Schedule,
    step: int,
    rank: int = 0,
    num_ranks: int = 1,
) -> Batch:
    """Mirrors images by option, keeps their visible patches, draws times and noise, drops labels.

    All random numbers depend on (seed, rank, step) alone.

    Args:
        images: this rank's, uint8 (B, H, W, C) on the device to use.
        labels: their classes, int64 (B,), or None.
        recipe: seed, mirroring, time sampling, label dropout.
        stage: the mask, and its own mirroring.
        schedule: the stage's.
        step: number of the step in the run.
        rank, num_ranks: which share of the batch the images are.
    """
    num, device = len(images), images.device
    own = step_generator(recipe.seed, rank, step, device)
    if recipe.flips(stage):
        images = mirror(images, torch.rand(num, generator=own, device=device) < 0.5)
    patch_size = recipe.model.patch_size
    grid = grid_shape(images.shape[1], images.shape[2], patch_size)
    # Patches are chosen while they are still bytes, so that hidden ones cost nothing: they are
    # never converted, noised or embedded. V is fixed for a stage: shapes are static.
    visible, middle = draw_visible(stage.mask, grid, num, own), None
    if stage.mask.where == "middle":  # all patches are seen, these by all blocks
        visible, middle = draw_visible(Mask(), grid, num, own), visible
    patches = gather_patches(patchify(images, patch_size), visible)  # uint8 (B, V, P)
    x0 = patches.float().div_(127.5).sub_(1)
    # Stratified times spread over the whole batch: ranks agree on them by a generator of the step.
    share = Share(num, rank, num_ranks)
    shared = shared_generator(recipe.seed, step, device)
    t = draw_times(recipe.diffusion.times, schedule, share, own, shared)
    noise = torch.randn(x0.shape, generator=own, device=device)
    # The last draw, so that a model without classes sees the same numbers before it.
    if labels is not None and recipe.model.label_dropout:
        dropped = torch.rand(num, generator=own, device=device) < recipe.model.label_dropout
        labels = torch.where(dropped, recipe.model.classes, labels)
    return Batch(x0, visible, t, noise, labels, middle)


def mirror(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirrors some images left-right, without reading from the device.

    Args:
        images: uint8 (B, H, W, C).
        mirrored: bool (B,), which.
    """
    # Viewed as channels-last (B, C, H, W), torch has a fast path for this flip on a CPU.
    flipped = images.permute(0, 3, 1, 2).flip(3).permute(0, 2, 3, 1)
    chosen = torch.where(mirrored[:, None], _words(flipped), _words(images))  # (B, H*W*C / 8)
    return chosen.view(torch.uint8).view(images.shape)


def _words(images: Tensor) -> Tensor:
    """Images as rows of 8-byte words where they divide so: far faster than bytes on a CPU."""
    rows = images.flatten(1)
    return rows.view(torch.int64) if rows.shape[1] % 8 == 0 else rows


def backward(
    accelerator: Accelerator,
    model: nn.Module,
    batch: Batch,
    schedule: Schedule,
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
                None if batch.middle is None else batch.middle[part],
            )
            loss = losses.sum() / num  # so the micro-batches' losses add up to the batch's mean
            accelerator.backward(loss)
        mean_loss += loss.detach()
    return mean_loss

"""The dense denoising loss by time: one yardstick for models trained under any mask or weight."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from maskdm.diffusion.objective import masked_denoising_loss
from maskdm.diffusion.times import times_at
from maskdm.engine import autocast, on_all_ranks
from maskdm.images.joined import Array
from maskdm.models.trained import TrainedModel
from maskdm.recipe import Diffusion, Sampling
from maskdm.sampling.speed import in_parts
from maskdm.seeds import derive_seed
from maskdm.tokens import patchify

NUM_BUCKETS = 10  # of times, each a tenth of the schedule's range
SEED = 0  # names the noise


@torch.no_grad()
def dense_loss(
    trained: TrainedModel, images: Array, labels: np.ndarray | None, settings: Sampling
) -> np.ndarray:
    """Mean of min(SNR, 1) (x0 - x0_hat)^2 per value, of whole images, by time.

    Every image is noised once in each bucket of times; over the images its times go evenly
    through the bucket. The weight bounds what a good denoiser can lose at either end, and makes
    it the same loss whatever the network predicts and was trained to weigh: under one noise
    schedule it compares across masks, predictions and weightings.

    A function of images, weights and a fixed seed, up to the rounding of matrix products, whose
    order may differ between batch sizes and devices. To be called on every rank.

    Args:
        trained: the model, on the device to use.
        images: uint8 (N, H, W, C), N at least 1.
        labels: their classes, int64 (N,); None where the model has none.
        settings: how many images at a time.

    Returns:
        float64 (10,), from the cleanest times to the noisiest.
    """
    device = next(trained.model.parameters()).device

    def of_images(numbers: list[int]) -> Tensor:
        def of_part(part: slice) -> Tensor:
            chosen = np.array(numbers[part])
            pixels = torch.from_numpy(images[chosen]).to(device)
            classes = None if labels is None else torch.from_numpy(labels[chosen]).to(device)
            places = (torch.from_numpy(chosen).to(device) + 0.5) / len(images)  # in a bucket
            return _losses(trained, pixels, classes, chosen, places)

        parts = in_parts(trained.model, settings, len(numbers), of_part)
        return torch.cat(parts)  # (n, buckets)

    losses = on_all_ranks(len(images), of_images).cpu().double()
    return losses.mean(0).numpy()


def _losses(
    trained: TrainedModel,
    images: Tensor,
    labels: Tensor | None,
    numbers: np.ndarray,
    within: Tensor,
) -> Tensor:
    """Each image's loss in each bucket: float32 (n, buckets).

    Args:
        images: uint8 (n, H, W, C) on the device.
        labels: classes, int64 (n,), or None.
        numbers: of the images, which name their noise.
        within: where in the buckets their times lie, float (n,) in [0, 1).
    """
    model, schedule = trained.model, trained.schedule
    settings = Diffusion(
        **{
            **trained.diffusion.model_dump(),
            "weighting": "min-snr",
            "snr_clip": 1.0,
            "loss_space": "same",
        }
    )
    x0 = patchify(images, model.patch_size).float().div_(127.5).sub_(1)  # (n, N, P)
    visible = torch.arange(model.num_patches, device=x0.device).repeat(len(x0), 1)
    losses = []
    for bucket in range(NUM_BUCKETS):
        noise = torch.stack([_noise(number, bucket, tuple(x0.shape[1:])) for number in numbers])
        t = times_at((bucket + within.float()) / NUM_BUCKETS, schedule)
        with autocast(x0.device):
            losses.append(
                masked_denoising_loss(
                    model, x0, visible, t, noise.to(x0.device), schedule, settings, labels
                )
            )
    return torch.stack(losses, dim=1)


def _noise(number: int, bucket: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise of an image in a bucket, float32, the same on every device."""
    seed = derive_seed(SEED, "dense-loss", int(number), bucket)
    generator = np.random.Generator(np.random.Philox(seed))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))

"""The dense denoising loss by time: one measure for models trained under any mask or weight."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from maskdm.diffusion.objective import masked_denoising_loss
from maskdm.diffusion.times import times_at
from maskdm.engine import autocast, on_all_ranks
from maskdm.evaluation.measure import Compared, Measured
from maskdm.images.joined import Array
from maskdm.models.trained import TrainedModel
from maskdm.recipe import Sampling, Weighting
from maskdm.sampling.speed import in_parts
from maskdm.seeds import derive_seed
from maskdm.settings import changed
from maskdm.tokens import patchify

NUM_BUCKETS = 10  # of times, each a tenth of their range
SEED = 0  # names the noise


def measure_dense_loss(compared: Compared) -> Measured:
    """The mean of `dense_loss` on the held-out images; details: by time, and the images' number."""
    model = compared.model
    assert model is not None  # needs: model
    by_time = dense_loss(model.trained, model.images, model.labels, model.sampling)
    details = {"by_time": by_time.tolist(), "num": len(model.images)}
    return Measured(float(by_time.mean()), details=details)


def dense_loss(
    trained: TrainedModel, images: Array, labels: np.ndarray | None, settings: Sampling
) -> np.ndarray:
    """The mean of `dense_losses` over images, by time: float64 (10,), the cleanest first."""
    by_time: np.ndarray = dense_losses(trained, images, labels, settings).mean(0).numpy()
    return by_time


@torch.no_grad()
def dense_losses(
    trained: TrainedModel, images: Array, labels: np.ndarray | None, settings: Sampling
) -> Tensor:
    """Mean of min(SNR, 1) (x0 - x0_hat)^2 per value of each whole image, by time: float64 (N, 10).

    Every image is noised once in each of ten buckets of times, the cleanest first; the times of all
    images spread evenly over the bucket. The weight bounds a good denoiser's loss at either end,
    and makes the loss independent of what the network predicts and how it was trained to weigh it:
    under one noise schedule, losses are comparable across masks, predictions and weightings.

    It depends on images, weights and a fixed seed alone, up to the rounding of matrix products,
    whose order may differ between batch sizes and devices. To be called on every rank.

    Args:
        trained: the model, on the device to use.
        images: uint8 (N, H, W, C), N at least 1.
        labels: their classes, int64 (N,); None for a model without classes.
        settings: how many images at a time.
    """
    device = next(trained.model.parameters()).device

    def of_images(numbers: list[int]) -> Tensor:
        def of_part(part: slice) -> Tensor:
            chosen = np.array(numbers[part])
            pixels = torch.from_numpy(images[chosen]).to(device)
            classes = None if labels is None else torch.from_numpy(labels[chosen]).to(device)
            places = (torch.from_numpy(chosen).to(device) + 0.5) / len(images)  # in a bucket
            return _losses(trained, pixels, classes, chosen, places)

        return torch.cat(in_parts(trained.model, settings, len(numbers), of_part))  # (n, buckets)

    return on_all_ranks(len(images), of_images).cpu().double()


def _losses(
    trained: TrainedModel, images: Tensor, labels: Tensor | None, names: np.ndarray, within: Tensor
) -> Tensor:
    """Each image's loss in each bucket, its time at a place `within` it: float32 (n, buckets)."""
    model, schedule = trained.model, trained.schedule
    weighting = Weighting(kind="min-snr", snr_clip=1.0)
    settings = changed(trained.diffusion, weighting=weighting, loss_space="same")
    x0 = patchify(images, model.patch_size).float().div_(127.5).sub_(1)  # (n, N, P)
    visible = torch.arange(model.num_patches, device=x0.device).repeat(len(x0), 1)
    losses = []
    for bucket in range(NUM_BUCKETS):
        noise = torch.stack([_noise(number, bucket, tuple(x0.shape[1:])) for number in names])
        t = times_at((bucket + within.float()) / NUM_BUCKETS, schedule)
        with autocast(x0.device):
            batch = (model, x0, visible, t, noise.to(x0.device))
            losses.append(masked_denoising_loss(*batch, schedule, settings, labels))
    return torch.stack(losses, dim=1)


def _noise(number: int, bucket: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise for an image in a bucket: float32, the same on every device."""
    seed = derive_seed(SEED, "dense-loss", int(number), bucket)
    generator = np.random.Generator(np.random.Philox(seed))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))

"""The one denoising loss of both stages (Eqs. 1 and 2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from maskdm.diffusion.schedule import DiscreteSchedule, add_noise, target_from
from maskdm.recipe import Diffusion

Denoiser = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def masked_denoising_loss(
    model: Denoiser,
    x0: Tensor,
    visible: Tensor,
    t: Tensor,
    noise: Tensor,
    schedule: DiscreteSchedule,
    settings: Diffusion,
    labels: Tensor | None = None,
) -> Tensor:
    """Masked denoising score matching on the visible patches (Eq. 2).

    With every patch visible it is the plain denoising loss (Eq. 1). Algorithm 1 also adds the
    positions to the noise; Eq. 2, followed here, gives them to the network instead.

    Args:
        model: `model(patches, positions, t, labels) -> patches`.
        x0: clean visible patches, float (B, V, P) in [-1, 1].
        visible: their indices in the full grid, int64 (B, V).
        t: times, float (B,) in [0, 1].
        noise: standard normal, float (B, V, P).
        schedule: signal and noise scales over time.
        settings: what the network predicts, and the weight over time.
        labels: classes, int64 (B,), or None.

    Returns:
        float32 (B,): each image's weighted squared error, averaged over its visible values.
    """
    alpha = schedule.alpha(t)[:, None, None]  # (B, 1, 1)
    sigma = schedule.sigma(t)[:, None, None]
    x_t = add_noise(x0, noise, alpha, sigma)  # (B, V, P)
    target = target_from(settings.prediction, x0, noise, alpha, sigma)
    output = model(x_t, visible, t, labels)  # (B, V, P)
    error = (output.float() - target).square().mean(dim=(1, 2))  # (B,)
    return loss_weight(settings, schedule.log_snr(t)) * error


def loss_weight(settings: Diffusion, log_snr: Tensor) -> Tensor:
    """Weight of the squared error of what the network predicts, at times of given log-SNR.

    `uniform` is 1. `min-snr` is min(SNR, c) for the error in x0, and the same loss written for
    eps (divided by SNR) and v (divided by SNR + 1): Hang et al. 2023, Section 3.4.
    Raises ValueError for an unknown weighting.
    """
    if settings.weighting == "uniform":
        return torch.ones_like(log_snr)
    if settings.weighting == "min-snr":
        snr = log_snr.exp()
        divisor = {"x0": torch.ones_like(snr), "eps": snr, "v": snr + 1}[settings.prediction]
        return snr.clamp(max=settings.snr_clip) / divisor
    raise ValueError(f"unknown weighting {settings.weighting!r}: known are uniform, min-snr")

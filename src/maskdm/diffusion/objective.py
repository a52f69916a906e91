"""The one denoising loss of both stages (Eqs. 1 and 2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from maskdm.choices import named
from maskdm.diffusion.prediction import add_noise, error_scale, target_from
from maskdm.diffusion.schedule import Schedule
from maskdm.families import WEIGHTINGS
from maskdm.recipe import Diffusion, Weighting

Denoiser = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def masked_denoising_loss(
    model: Denoiser,
    x0: Tensor,
    visible: Tensor,
    t: Tensor,
    noise: Tensor,
    schedule: Schedule,
    settings: Diffusion,
    labels: Tensor | None = None,
    middle: Tensor | None = None,
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
        settings: what the network predicts, the space of the error and its weight over time.
        labels: classes, int64 (B,), or None.
        middle: the patches that the network's middle works on (`Backbone.forward`); None = all.

    Returns:
        float32 (B,): each image's weighted squared error, averaged over its visible values.

    Example:
        >>> def network(patches, positions, t, labels):  # predicts no noise at all
        ...     return torch.zeros_like(patches)
        >>> x0, noise = torch.zeros(2, 8, 48), torch.ones(2, 8, 48)  # 8 visible patches each
        >>> visible, t = torch.arange(8).expand(2, 8), torch.tensor([0.1, 0.9])
        >>> schedule = make_schedule("cosine")
        >>> masked_denoising_loss(network, x0, visible, t, noise, schedule, Diffusion())
        tensor([1., 1.])
    """
    # One time for each image: the scales broadcast over its patches and their values.
    alpha = schedule.alpha(t)[:, None, None]  # (B, 1, 1)
    sigma = schedule.sigma(t)[:, None, None]
    x_t = add_noise(x0, noise, alpha, sigma)  # (B, V, P)
    target = target_from(settings.prediction, x0, noise, alpha, sigma)
    output = model(x_t, visible, t, labels, *([] if middle is None else [middle]))  # (B, V, P)
    assert output.shape == target.shape  # else they could broadcast
    # The mean over visible values, not the sum: stages with other masks keep the same loss scale.
    # In fp32, since the network may have answered in bf16.
    error = (output.float() - target).square().mean(dim=(1, 2))  # (B,)
    if settings.loss_space not in ("same", settings.prediction):
        error = error * space_factor(settings, schedule, t)
    return loss_weight(settings, schedule, t) * error


def space_factor(settings: Diffusion, schedule: Schedule, t: Tensor) -> Tensor:
    """Squared error in `loss_space` over that in what the network predicts: float (B,).

    Both scales are clamped to at least `loss_space_clip`, as JiT does where it divides by 1 - t
    (Li & He 2025, Section 4): else times near either end would outweigh all others.
    """
    alpha = schedule.alpha(t).clamp(min=settings.loss_space_clip)
    sigma = schedule.sigma(t).clamp(min=settings.loss_space_clip)
    wanted = error_scale(settings.loss_space, alpha, sigma)
    return (wanted / error_scale(settings.prediction, alpha, sigma)).square()


def loss_weight(settings: Diffusion, schedule: Schedule, t: Tensor) -> Tensor:
    """Weight of the squared error of what the network predicts, at times t: float (B,).

    `uniform` is 1, of the error in the loss space (Ho et al. 2020, Eq. 14). All others are the same
    loss whatever the network predicts: they weigh the error in x0, and are divided by the square of
    `error_scale` for another prediction.

    Raises ValueError for an unknown weighting.
    """
    weigh = named(settings.weighting.kind, WEIGHTINGS, "weighting").run
    if weigh is None:
        return torch.ones_like(t)
    weight_of_x0: Tensor = weigh(settings.weighting, schedule, t, schedule.log_snr(t))
    # An error e in x0 is `scale` e in the prediction, so its square is divided by scale^2.
    scale = error_scale(settings.prediction, schedule.alpha(t), schedule.sigma(t))
    return weight_of_x0 / scale.square()


def min_snr(weighting: Weighting, schedule: Schedule, t: Tensor, log_snr: Tensor) -> Tensor:
    """min(SNR, snr_clip) of the error in x0 (Hang et al. 2023, Section 3.4)."""
    return log_snr.exp().clamp(max=weighting.snr_clip)


def p2(weighting: Weighting, schedule: Schedule, t: Tensor, log_snr: Tensor) -> Tensor:
    """(1 + SNR)^-gamma of the error in eps (Choi et al. 2022, Eq. 8 with k = 1)."""
    snr = log_snr.exp()  # the squared error in eps is SNR times that in x0
    return snr * (1 + snr) ** -weighting.gamma


def sigmoid(weighting: Weighting, schedule: Schedule, t: Tensor, log_snr: Tensor) -> Tensor:
    """-d log_snr/dt sigmoid(bias - log_snr) of the error in eps.

    Kingma & Gao 2023, Eq. 12; Hoogeboom et al. 2024, Section 3.1.
    """
    rate = -schedule.log_snr_slope(t)
    return rate * (weighting.bias - log_snr).sigmoid() * log_snr.exp()

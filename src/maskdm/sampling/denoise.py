"""A network as the denoiser that samplers evaluate: the clean image at a log-SNR."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from maskdm.diffusion.prediction import x0_and_noise_from
from maskdm.models.trained import TrainedModel
from maskdm.sampling.samplers import Denoise
from maskdm.tokens import gather_patches


def x0_denoiser(trained: TrainedModel, positions: Tensor, labels: Tensor | None) -> Denoise:
    """The denoiser of patches at given positions (B, V) of images of given classes (B,)."""
    model, schedule = trained.model, trained.schedule
    dtype = next(model.parameters()).dtype

    def denoise(x: Tensor, log_snr: float) -> Tensor:
        level = torch.tensor(log_snr, dtype=torch.float64)
        alpha, sigma = (scale.to(x.dtype) for scale in schedule.scales(level))
        x_t = x * (alpha**2 + sigma**2).sqrt()  # 1, except for flows
        t = torch.full((len(x),), schedule.time_of(log_snr), device=x.device)
        output = model(x_t.to(dtype), positions, t, labels).float()
        return x0_and_noise_from(trained.diffusion.prediction, output, x_t, alpha, sigma)[0]

    return denoise


def sparse_denoiser(
    trained: TrainedModel,
    positions: Tensor,
    labels: Tensor | None,
    rate: float,
    generators: list[Generator],
) -> Denoise:
    """The same network, shown the image in parts that do not see each other.

    Every call deals each image's patches anew into random groups, as large as a mask of that rate
    leaves visible; the last group borrows from others to be as large. Each is denoised alone, as
    pre-training did.

    Args:
        trained: a model that was trained under masks.
        positions: the patches that are there, int64 (B, V).
        labels: classes, int64 (B,), or None.
        rate: fraction of the patches that each group does not see.
        generators: one per image; they deal the groups.
    """
    num = positions.shape[1]
    size = min(max(round((1 - rate) * num), 1), num)
    starts = [min(start, num - size) for start in range(0, num, size)]

    def denoise(x: Tensor, log_snr: float) -> Tensor:
        orders = [torch.randperm(num, generator=g, device=g.device) for g in generators]
        dealt = torch.stack(orders).to(x.device)  # (B, V)
        answer = torch.empty_like(x)
        for start in starts:
            group = dealt[:, start : start + size]  # (B, size)
            part = x0_denoiser(trained, positions.gather(1, group), labels)
            x0 = part(gather_patches(x, group), log_snr)
            answer.scatter_(1, group[..., None].expand_as(x0), x0)
        return answer

    return denoise


def clipped(denoise: Denoise) -> Denoise:
    """A denoiser whose images stay in [-1, 1]; samplers derive the noise from what they get."""
    return lambda x, log_snr: denoise(x, log_snr).clamp(-1, 1)

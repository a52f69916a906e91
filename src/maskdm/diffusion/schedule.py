"""Noise schedules behind one face, and the exact relations among x0, noise and velocity.

A schedule says how much signal `alpha(t)` and how much noise `sigma(t)` an image at time t in
[0, 1] has: x_t = alpha x0 + sigma noise. Variance preserving: alpha^2 + sigma^2 = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

NUM_STEPS = 1000  # the paper's T (Section 4.1)


class DiscreteSchedule:
    """A DDPM schedule: a table of T = 1000 entries, the i-th at t = i / 999.

    Args:
        betas: float64 (T,), variances of the forward steps, each in (0, 1).
    """

    def __init__(self, betas: Tensor):
        alphas_cumprod = (1 - betas.double()).cumprod(0)
        self.betas = betas
        self._alpha = alphas_cumprod.sqrt()
        self._sigma = (1 - alphas_cumprod).sqrt()
        self._log_snr = alphas_cumprod.log() - (1 - alphas_cumprod).log()
        self._on_device: dict[tuple[int, torch.device], Tensor] = {}

    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the signal at times t: float32, t's shape."""
        return self._look_up(self._alpha, t)

    def sigma(self, t: Tensor) -> Tensor:
        """Scale of the noise at times t: float32, t's shape."""
        return self._look_up(self._sigma, t)

    def log_snr(self, t: Tensor) -> Tensor:
        """Natural logarithm of alpha^2 / sigma^2 at times t: float32, t's shape."""
        return self._look_up(self._log_snr, t)

    def draw_times(self, batch_size: int, generator: Generator) -> Tensor:
        """Times of a batch, uniform over the table: float32 (B,), on the generator's device."""
        index = torch.randint(
            NUM_STEPS, (batch_size,), generator=generator, device=generator.device
        )
        return index.float() / (NUM_STEPS - 1)

    def _look_up(self, table: Tensor, t: Tensor) -> Tensor:
        key = (id(table), t.device)
        if key not in self._on_device:
            self._on_device[key] = table.float().to(t.device)
        index = (t * (NUM_STEPS - 1)).round().long()
        return self._on_device[key][index]


def linear_betas() -> Tensor:
    """DDPM's linear variances, 1e-4 to 0.02 (Ho et al. 2020, Section 4): float64 (1000,)."""
    return torch.linspace(1e-4, 0.02, NUM_STEPS, dtype=torch.float64)


def cosine_betas(s: float = 0.008, beta_max: float = 0.999) -> Tensor:
    """Variances of the cosine schedule (Nichol & Dhariwal 2021, Eq. 17): float64 (1000,).

    alpha_bar(u) = cos^2((u + s) / (1 + s) * pi / 2), up to a constant that cancels.
    """
    u = torch.arange(NUM_STEPS + 1, dtype=torch.float64) / NUM_STEPS
    alpha_bar = ((u + s) / (1 + s) * math.pi / 2).cos() ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=beta_max)


SCHEDULES: dict[str, Callable[[], DiscreteSchedule]] = {
    "linear": lambda: DiscreteSchedule(linear_betas()),
    "cosine": lambda: DiscreteSchedule(cosine_betas()),
}


def make_schedule(name: str) -> DiscreteSchedule:
    """The schedule of that name; raises ValueError that lists the names."""
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}: known are {', '.join(SCHEDULES)}")
    return SCHEDULES[name]()


# Conversions. alpha and sigma broadcast against the images; all exact for alpha, sigma > 0.


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_t = alpha x0 + sigma noise: the forward process in closed form (Section 2)."""
    return alpha * x0 + sigma * noise


def target_from(prediction: str, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The network's target: `eps` the noise, `x0` the image, `v` = alpha noise - sigma x0.

    v: Salimans & Ho 2022, Section 4. Raises ValueError for an unknown prediction.
    """
    if prediction == "eps":
        return noise
    if prediction == "x0":
        return x0
    if prediction == "v":
        return alpha * noise - sigma * x0
    raise ValueError(f"unknown prediction {prediction!r}: known are eps, x0, v")


def x0_and_noise_from(
    prediction: str, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """The clean image and the noise that a network's answer implies, given x_t.

    Raises ValueError for an unknown prediction.
    """
    if prediction == "eps":
        return (x_t - sigma * output) / alpha, output
    if prediction == "x0":
        return output, (x_t - alpha * output) / sigma
    if prediction == "v":
        return alpha * x_t - sigma * output, sigma * x_t + alpha * output
    raise ValueError(f"unknown prediction {prediction!r}: known are eps, x0, v")

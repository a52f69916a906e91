"""Noise schedules behind one face: how much signal and how much noise an image at time t has.

x_t = alpha(t) x0 + sigma(t) noise, t in [0, 1] from clean to noise. A schedule is defined by its
log-SNR, ln(alpha^2 / sigma^2), a falling function of t. All except the flow preserve the variance:
alpha^2 + sigma^2 = 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from maskdm.choices import named
from maskdm.families import SCHEDULES
from maskdm.recipe import Diffusion
from maskdm.tokens import height_and_width

NUM_STEPS = 1000  # the paper's T (Section 4.1)
MAX_LOG_SNR = 20.0  # of continuous schedules: a scale of 4.5e-5 where it would vanish at an end


class Schedule(ABC):
    """Signal and noise over time.

    Args:
        shift: added to the log-SNR at every time; see `log_snr_shift`.

    Attributes:
        num_times: how many times there are to train on; None = all of [t_min, 1].
        t_min: the least of them.
    """

    num_times: int | None = None
    t_min = 1e-5  # Song et al. 2020b, Appendix C

    def __init__(self, shift: float = 0.0):
        self.shift = shift

    @abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        """ln(alpha^2 / sigma^2) at times t: t's shape and floating dtype."""

    @abstractmethod
    def log_snr_slope(self, t: Tensor) -> Tensor:
        """Its derivative by t, below zero: t's shape and dtype."""

    @abstractmethod
    def time_of(self, log_snr: float) -> float:
        """The time in [0, 1] at which the log-SNR is nearest to the given one."""

    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the signal at times t: t's shape and dtype."""
        return self.scales(self.log_snr(t))[0]

    def sigma(self, t: Tensor) -> Tensor:
        """Scale of the noise at times t: t's shape and dtype."""
        return self.scales(self.log_snr(t))[1]

    def scales(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma where the log-SNR is as given, of its shape and dtype."""
        return log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()

    def _shifted(self, log_snr: Tensor) -> Tensor:
        return (log_snr + self.shift).clamp(-MAX_LOG_SNR, MAX_LOG_SNR)


class DiscreteSchedule(Schedule):
    """A DDPM schedule: a table of T = 1000 entries, the i-th at t = i / 999.

    Training draws these times alone. Between two entries the log-SNR is interpolated linearly, for
    samplers that evaluate the model there.

    Args:
        betas: float64 (T,), variances of the forward steps, each in (0, 1).
        shift: as in `Schedule`.
    """

    num_times = NUM_STEPS
    t_min = 0.0

    def __init__(self, betas: Tensor, shift: float = 0.0):
        super().__init__(shift)
        alphas_cumprod = (1 - betas.double()).cumprod(0)
        log_snr = alphas_cumprod.log() - (1 - alphas_cumprod).log() + shift
        alpha, sigma = self.scales(log_snr)
        slope = torch.gradient(log_snr)[0] * (NUM_STEPS - 1)
        self._tables = {"log_snr": log_snr, "slope": slope, "alpha": alpha, "sigma": sigma}
        self._on_device: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def log_snr(self, t: Tensor) -> Tensor:
        return self._interpolated("log_snr", t)

    def log_snr_slope(self, t: Tensor) -> Tensor:
        return self._interpolated("slope", t)

    def alpha(self, t: Tensor) -> Tensor:
        index, fraction = self._place(t)
        return torch.where(fraction == 0, self._table("alpha", t)[index], super().alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        index, fraction = self._place(t)
        return torch.where(fraction == 0, self._table("sigma", t)[index], super().sigma(t))

    def time_of(self, log_snr: float) -> float:
        table = self._tables["log_snr"]
        wanted = torch.tensor(-log_snr, dtype=table.dtype)
        high = int(torch.searchsorted(-table, wanted).clamp(1, NUM_STEPS - 1))
        above, below = table[high - 1].item(), table[high].item()
        fraction = (above - log_snr) / (above - below)
        return min(max((high - 1 + fraction) / (NUM_STEPS - 1), 0.0), 1.0)

    def _interpolated(self, name: str, t: Tensor) -> Tensor:
        index, fraction = self._place(t)
        table = self._table(name, t)
        following = table[(index + 1).clamp(max=NUM_STEPS - 1)]
        return torch.lerp(table[index], following, fraction)

    @staticmethod
    def _place(t: Tensor) -> tuple[Tensor, Tensor]:
        """Index of the entry before each time, and the way to the next in [0, 1)."""
        place = t * (NUM_STEPS - 1)
        nearest = place.round()
        place = torch.where((place - nearest).abs() < 1e-3, nearest, place)  # i / 999 rounds
        return place.long(), place - place.floor()

    def _table(self, name: str, t: Tensor) -> Tensor:
        """A table on the device and in the dtype of t; copied there once."""
        key = (name, t.device, t.dtype)
        if key not in self._on_device:
            self._on_device[key] = self._tables[name].to(t.dtype).to(t.device)  # mps has no float64
        return self._on_device[key]


class VPSDE(Schedule):
    """The variance-preserving SDE, the continuous limit of the linear schedule.

    alpha^2 = exp(-B(t)), B(t) = integral of beta = 0.1 t + 19.9 t^2 / 2, beta from 0.1 to 20
    (Song et al. 2020b, Eq. 32).
    """

    beta_min, beta_max = 0.1, 20.0

    def log_snr(self, t: Tensor) -> Tensor:
        return self._shifted(-self._integral(t).expm1().log())

    def log_snr_slope(self, t: Tensor) -> Tensor:
        beta = self.beta_min + (self.beta_max - self.beta_min) * t
        return beta / (-self._integral(t)).expm1()  # -beta / (1 - exp(-B))

    def time_of(self, log_snr: float) -> float:
        integral = math.log1p(math.exp(self.shift - log_snr))
        rise = self.beta_max - self.beta_min
        t = (math.sqrt(self.beta_min**2 + 2 * rise * integral) - self.beta_min) / rise
        return min(max(t, 0.0), 1.0)

    def _integral(self, t: Tensor) -> Tensor:
        return self.beta_min * t + (self.beta_max - self.beta_min) / 2 * t**2


class VPCosine(Schedule):
    """The cosine schedule in continuous time: alpha = cos(a(t)) / cos(a(0)).

    a(t) = (T t + s) / (1 + s) * pi / 2 with s = 0.008 (Nichol & Dhariwal 2021, Eq. 17). T = 0.9946
    as in DPM-Solver (Lu et al. 2022): at 1 the signal would vanish, and eps would say nothing.
    """

    s, last = 0.008, 0.9946

    def log_snr(self, t: Tensor) -> Tensor:
        ratio = (self._angle(t).cos() / self._angle(torch.zeros_like(t)).cos()) ** 2
        return self._shifted(ratio.log() - self._noise(t).log())

    def log_snr_slope(self, t: Tensor) -> Tensor:
        rate = self.last / (1 + self.s) * math.pi / 2
        return -2 * rate * self._angle(t).tan() / self._noise(t)

    def time_of(self, log_snr: float) -> float:
        start = self.s / (1 + self.s) * math.pi / 2
        alpha = 1 / math.sqrt(1 + math.exp(self.shift - log_snr))
        angle = math.acos(alpha * math.cos(start))
        t = (angle / (math.pi / 2) * (1 + self.s) - self.s) / self.last
        return min(max(t, 0.0), 1.0)

    def _angle(self, t: Tensor) -> Tensor:
        return (self.last * t + self.s) / (1 + self.s) * (math.pi / 2)

    def _noise(self, t: Tensor) -> Tensor:
        """sigma^2 without shift = 1 - cos^2 a / cos^2 a0 = sin(a - a0) sin(a + a0) / cos^2 a0."""
        start = self._angle(torch.zeros_like(t))
        passed = self.last * t / (1 + self.s) * (math.pi / 2)  # a - a0, without cancellation
        return passed.sin() * (self._angle(t) + start).sin() / start.cos() ** 2


class Flow(Schedule):
    """The straight line of flow matching: alpha = 1 - t, sigma = t (Lipman et al. 2022, Sec. 4.1).

    A shift of the log-SNR walks the same line at another pace: sigma = sigmoid(-log_snr / 2).
    """

    def log_snr(self, t: Tensor) -> Tensor:
        return self._shifted(2 * ((1 - t).log() - t.log()))

    def log_snr_slope(self, t: Tensor) -> Tensor:
        return -2 / (t * (1 - t))

    def time_of(self, log_snr: float) -> float:
        return 1 / (1 + math.exp((log_snr - self.shift) / 2))

    def scales(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        return (log_snr / 2).sigmoid(), (-log_snr / 2).sigmoid()


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


def linear(shift: float = 0.0) -> DiscreteSchedule:
    """DDPM's linear schedule."""
    return DiscreteSchedule(linear_betas(), shift)


def cosine(shift: float = 0.0) -> DiscreteSchedule:
    """The cosine schedule in 1000 steps."""
    return DiscreteSchedule(cosine_betas(), shift)


def make_schedule(name: str, shift: float = 0.0) -> Schedule:
    """The schedule of that name.

    Args:
        name: a key of `families.SCHEDULES`.
        shift: added to its log-SNR at every time; see `log_snr_shift`.

    Raises:
        ValueError: an unknown name; lists the known ones.

    Example:
        >>> schedule = make_schedule("cosine")
        >>> schedule.alpha(torch.tensor([0.0, 1.0])).round(decimals=3)  # clean, noise
        tensor([1., 0.])
    """
    schedule: Schedule = named(name, SCHEDULES, "schedule").make(shift)
    return schedule


def schedule_of(diffusion: Diffusion, image_size: int | Sequence[int]) -> Schedule:
    """The schedule of a diffusion, for images of that side (or height and width)."""
    return make_schedule(diffusion.schedule, log_snr_shift(diffusion.base_size, image_size))


def log_snr_shift(base_size: int | None, image_size: int | Sequence[int]) -> float:
    """2 ln(base_size / size): the log-SNR that keeps the noise on downsampled images the same.

    Averaging blocks of pixels removes noise, but not the image: larger images need more noise
    (Hoogeboom et al. 2023, Section 2.1). The size of a rectangle is the side of the square of
    its area. 0 where base_size is None.
    """
    height, width = height_and_width(image_size)
    return 2 * math.log(base_size / math.sqrt(height * width)) if base_size else 0.0

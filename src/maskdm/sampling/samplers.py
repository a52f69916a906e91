"""Solvers that turn noise into patches, a denoiser's answer at a time.

One signature for all: `sampler(denoise, noise, levels, settings, generators) -> patches`. They know
no schedule and no network: only log-SNR levels, and a denoiser that gives the clean image at one.
Any alpha and sigma can be scaled to alpha^2 + sigma^2 = 1, so each solver serves every schedule.

Where diffusers has a scheduler, it does the arithmetic. Each gets a table of exactly the levels of
this run (`trained_betas`), so that it steps through all of them, whatever their spacing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from maskdm.diffusion.schedule import Schedule
from maskdm.families import SAMPLERS
from maskdm.recipe import Sampling

Denoise = Callable[[Tensor, float], Tensor]
"""The clean image x0 (B, N, P) for x_t (B, N, P), alpha^2 + sigma^2 = 1, and its log-SNR."""

AfterStep = Callable[[int, Tensor], Tensor]
"""From the number of a step and what it led to, x_t (B, N, P), to what the next begins with."""


def sampling_levels(schedule: Schedule, settings: Sampling) -> Tensor:
    """Log-SNR of the levels at which the network is evaluated, rising: float64 (steps,).

    From t = 1 on. After the last one comes the clean image itself, as the denoiser sees it there.
    `uniform` times are 1, 1 - 1/steps, ..., 1/steps (for a discrete schedule the table's entries
    that diffusers calls trailing). `log-snr` and `karras` go to t = 0.001 (dpm-solver-eps to
    0.0001), or to the table's first entry; Karras et al. 2022, Eq. 5 with rho = 7.

    Raises ValueError where a discrete schedule has fewer times than there are steps.
    """
    num = settings.steps
    if schedule.num_times and num > schedule.num_times:
        raise ValueError(f"{num} sampling steps, but the schedule has {schedule.num_times} times")
    if settings.spacing == "uniform":
        t = 1 - torch.arange(num, dtype=torch.float64) / num
        if schedule.num_times:
            t = ((t * schedule.num_times).round() - 1) / (schedule.num_times - 1)
        return schedule.log_snr(t)
    t_end = 0.0 if schedule.num_times else SAMPLERS[settings.sampler].t_end
    ends = torch.tensor([1.0, t_end], dtype=torch.float64)
    first, last = schedule.log_snr(ends).tolist()
    way = torch.linspace(0, 1, num, dtype=torch.float64)
    if settings.spacing == "log-snr":
        return first + (last - first) * way
    rho = 7.0
    roots = [math.exp(-level / 2 / rho) for level in (first, last)]  # (sigma / alpha)^(1 / rho)
    return -2 * rho * (roots[0] + (roots[1] - roots[0]) * way).log()


def kept(step: int, x: Tensor) -> Tensor:
    """Goes on with what a step led to."""
    return x


def ddim(
    denoise: Denoise,
    noise: Tensor,
    levels: Tensor,
    settings: Sampling,
    generators: list[Generator],
    after_step: AfterStep = kept,
) -> Tensor:
    """DDIM (Song et al. 2020a, Eq. 12); eta 0 is deterministic, eta 1 ancestral.

    Args:
        denoise: the clean image at x_t and a log-SNR.
        noise: standard normal, float (B, N, P).
        levels: log-SNR at which it is evaluated, rising, float64 (steps,).
        settings: eta.
        generators: one per image, for samplers that add noise.
        after_step: is called after each step; the samplers below take it, too.

    Returns:
        Clean patches, float (B, N, P).
    """
    scheduler = on_levels(DDIMScheduler, levels, clip_sample=False)
    options = {"eta": settings.eta, "generator": generators}
    return _follow(scheduler, denoise, noise, levels, after_step, **options)


def ddpm(
    denoise: Denoise,
    noise: Tensor,
    levels: Tensor,
    settings: Sampling,
    generators: list[Generator],
    after_step: AfterStep = kept,
) -> Tensor:
    """Ancestral sampling from the posterior of each step (Ho et al. 2020, Eqs. 6 and 7)."""
    scheduler = on_levels(DDPMScheduler, levels, clip_sample=False)
    return _follow(scheduler, denoise, noise, levels, after_step, generator=generators)


def dpm_solver(
    denoise: Denoise,
    noise: Tensor,
    levels: Tensor,
    settings: Sampling,
    generators: list[Generator],
    after_step: AfterStep = kept,
) -> Tensor:
    """DPM-Solver++ (2M): second order, one evaluation a step (Lu et al. 2022b, Algorithm 2)."""
    scheduler = on_levels(DPMSolverMultistepScheduler, levels)
    return _follow(scheduler, denoise, noise, levels, after_step)


def dpm_solver_eps(
    denoise: Denoise,
    noise: Tensor,
    levels: Tensor,
    settings: Sampling,
    generators: list[Generator],
    after_step: AfterStep = kept,
) -> Tensor:
    """DPM-Solver in the noise, multistep of third order (Lu et al. 2022, Eq. 3.7 with k = 3).

    With lambda = ln(alpha / sigma) and h its step, exactly

        x_t = alpha_t / alpha_s x_s - alpha_t int exp(-lambda) eps(lambda) d lambda.

    eps is taken as the parabola through the last three answers (through fewer at first), whose
    integrals are in closed form. It keeps as many steps as answers: singlestep DPM-Solver-3, as
    the paper's lineage runs it, spends three on each step. The last step gives the denoiser's
    answer, where theirs ends with the noise that is left at t = 0.0001 (0.4 grey levels of 255).
    """
    halves = (levels / 2).tolist()  # lambda
    answers: list[Tensor] = []  # the noise at the last three levels, the newest first
    x = noise
    for i, h in enumerate((levels / 2).diff().tolist()):
        alpha, sigma = math.sqrt(_sigmoid(2 * halves[i])), math.sqrt(_sigmoid(-2 * halves[i]))
        answers = [(x - alpha * denoise(x, levels[i].item())) / sigma, *answers[:2]]
        ahead = math.sqrt(_sigmoid(2 * halves[i + 1])), math.sqrt(_sigmoid(-2 * halves[i + 1]))
        x = ahead[0] / alpha * x
        # Newton's divided differences of eps, each with the integral of its polynomial.
        grown = math.expm1(h)
        x = x - ahead[1] * grown * answers[0]
        if i >= 1:
            before = halves[i] - halves[i - 1]
            first = (answers[0] - answers[1]) / before
            x = x - ahead[1] * (grown - h) * first
        if i >= 2:
            earlier = halves[i - 1] - halves[i - 2]
            second = (first - (answers[1] - answers[2]) / earlier) / (before + earlier)
            x = x - ahead[1] * (2 * (grown - h) - h**2 + before * (grown - h)) * second
        x = after_step(i, x)
    return after_step(len(levels) - 1, denoise(x, levels[-1].item()))


def unipc(
    denoise: Denoise,
    noise: Tensor,
    levels: Tensor,
    settings: Sampling,
    generators: list[Generator],
    after_step: AfterStep = kept,
) -> Tensor:
    """UniPC: a predictor of second order with a corrector at no cost (Zhao et al. 2023)."""
    scheduler = on_levels(UniPCMultistepScheduler, levels)
    return _follow(scheduler, denoise, noise, levels, after_step)


def heun(
    denoise: Denoise,
    noise: Tensor,
    levels: Tensor,
    settings: Sampling,
    generators: list[Generator],
    after_step: AfterStep = kept,
) -> Tensor:
    """Heun's method on the probability-flow ODE: second order, two evaluations a step.

    With alpha = cos(phi), sigma = sin(phi) the ODE is dx/dphi = v, the velocity cos(phi) noise -
    sin(phi) x0 (Salimans & Ho 2022, Appendix D): bounded from end to end. Karras et al. 2022 (and
    diffusers) step in sigma / alpha instead, where the first step of a schedule that begins near
    pure noise is a thousand times the others. The last step gives the denoiser's answer.
    """
    angles = (-levels / 2).exp().atan()

    def velocity(x: Tensor, i: int) -> Tensor:
        alpha, sigma = angles[i].cos().item(), angles[i].sin().item()
        x0 = denoise(x, levels[i].item())
        return alpha / sigma * (x - alpha * x0) - sigma * x0

    x = noise
    for i, turn in enumerate(angles.diff().tolist()):
        slope = velocity(x, i)
        x = after_step(i, x + turn / 2 * (slope + velocity(x + turn * slope, i + 1)))
    return after_step(len(levels) - 1, denoise(x, levels[-1].item()))


def euler_maruyama(
    denoise: Denoise,
    noise: Tensor,
    levels: Tensor,
    settings: Sampling,
    generators: list[Generator],
    after_step: AfterStep = kept,
) -> Tensor:
    """Euler-Maruyama on the reverse SDE (Song et al. 2020b, Eq. 6 and Appendix D.1).

    dx = (-beta x / 2 - beta score) dt + sqrt(beta) dw, backwards in time. A step's beta dt is
    taken as the exact integral of beta over it, which any schedule has: the fall of ln alpha^2.
    The last step gives the denoiser's answer, without noise.

    Raises ValueError where a step takes the integral past 2; see `refuse_unstable`.
    """
    refuse_unstable(levels)
    steps = F.logsigmoid(levels).diff()  # of ln alpha^2
    x = noise
    for i, (level, beta_dt) in enumerate(zip(levels[:-1].tolist(), steps.tolist(), strict=True)):
        alpha, power = math.sqrt(_sigmoid(level)), _sigmoid(-level)
        score = (alpha * denoise(x, level) - x) / power
        fresh = randn_tensor(x.shape, generators, x.device, x.dtype)
        x = after_step(i, x + beta_dt * (x / 2 + score) + math.sqrt(beta_dt) * fresh)
    return after_step(len(levels) - 1, denoise(x, levels[-1].item()))


def refuse_unstable(levels: Tensor) -> None:
    """Raises ValueError where Euler-Maruyama would diverge: where beta dt of a step is over 2.

    There the step, an extrapolation, turns the image over. A schedule that starts from almost no
    signal begins with such a leap however many even steps there are.
    """
    steps = F.logsigmoid(levels).diff()
    if len(steps) and steps.max() > 2:
        raise ValueError(
            f"euler-maruyama in {len(levels)} steps is unstable on this schedule (beta dt goes to "
            f"{steps.max():.2f}, 2 is the limit): use spacing log-snr, more steps, or another "
            "sampler"
        )


def refuse_settings(schedule: Schedule, settings: Sampling) -> None:
    """Raises ValueError where a sampler cannot take its steps on a schedule."""
    refuse = SAMPLERS[settings.sampler].refuse
    levels = sampling_levels(schedule, settings)
    if refuse is not None:
        refuse(levels)


def _follow(
    scheduler: Any,
    denoise: Denoise,
    noise: Tensor,
    levels: Tensor,
    after_step: AfterStep,
    **options: Any,
) -> Tensor:
    """Steps through a scheduler's levels; `options` are arguments of its `step`."""
    x = noise
    for step, index in enumerate(scheduler.timesteps.tolist()):
        x0 = denoise(x, levels[-1 - index].item())
        x = after_step(step, scheduler.step(x0, index, x, **options).prev_sample)
    return x


def on_levels(kind: type[Any], levels: Tensor, **options: Any) -> Any:
    """diffusers' scheduler of that class whose only timesteps are these levels, first to last.

    Timestep i is level -1 - i; it takes clean images as the network's answers.
    """
    alphas_cumprod = levels.flip(0).sigmoid()
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    with warnings.catch_warnings():  # diffusers hands numpy a tensor in a way that it deprecates
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        scheduler = kind(
            num_train_timesteps=len(levels),
            trained_betas=(1 - alphas_cumprod / before).tolist(),
            prediction_type="sample",
            timestep_spacing="trailing",
            **options,
        )
        scheduler.alphas_cumprod = alphas_cumprod  # its own product of betas is in float32
        scheduler.set_timesteps(len(levels))
    return scheduler


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))

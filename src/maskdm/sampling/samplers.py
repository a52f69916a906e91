"""Solvers that turn noise into patches, a denoiser's answer at a time.

One signature for all: `sampler(denoise, noise, scheduler, settings, generators) -> patches`.
diffusers' schedulers do the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import DDIMScheduler
from torch import Generator, Tensor

from maskdm.diffusion.schedule import NUM_STEPS
from maskdm.recipe import Diffusion, Sampling

Denoise = Callable[[Tensor, float], Tensor]
"""The network with everything but x_t (B, N, P) and the time t in [0, 1] filled in."""

BETA_SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}  # diffusers' names
PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def make_scheduler(diffusion: Diffusion) -> DDIMScheduler:
    """diffusers' scheduler for a recipe's diffusion; it is saved with the model.

    Its timesteps are `trailing`: the first is T - 1, the noise that sampling starts from.
    """
    return DDIMScheduler(
        num_train_timesteps=NUM_STEPS,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule=BETA_SCHEDULES[diffusion.schedule],
        prediction_type=PREDICTION_TYPES[diffusion.prediction],
        timestep_spacing="trailing",
    )


def ddim(
    denoise: Denoise,
    noise: Tensor,
    scheduler: DDIMScheduler,
    settings: Sampling,
    generators: list[Generator],
) -> Tensor:
    """DDIM (Song et al. 2020a, Eq. 12); eta 0 is deterministic, eta 1 ancestral.

    With `settings.clip_x0` the estimate of the clean image is clipped and the noise re-derived
    from it, so that the two stay consistent.

    Args:
        denoise: the network's answer for x_t at time t.
        noise: standard normal, float (B, N, P).
        scheduler: betas and prediction type.
        settings: steps, eta, clipping.
        generators: one per image; they give the noise of eta > 0.

    Returns:
        Clean patches, float (B, N, P).
    """
    scheduler = DDIMScheduler.from_config(scheduler.config, clip_sample=settings.clip_x0)
    scheduler.set_timesteps(settings.steps)
    x = noise
    for step in scheduler.timesteps.tolist():
        x = scheduler.step(
            denoise(x, step / (NUM_STEPS - 1)),
            step,
            x,
            eta=settings.eta,
            use_clipped_model_output=settings.clip_x0,
            generator=generators,
        ).prev_sample
    return x


SAMPLERS: dict[
    str, Callable[[Denoise, Tensor, DDIMScheduler, Sampling, list[Generator]], Tensor]
] = {"ddim": ddim}


def model_denoise(
    model: Callable[..., Tensor], positions: Tensor, labels: Tensor | None
) -> Denoise:
    """Fixes positions (B, N) and labels (B,) of a denoiser."""

    def denoise(x_t: Tensor, t: float) -> Tensor:
        times = torch.full((len(x_t),), t, device=x_t.device)
        return model(x_t, positions, times, labels).float()

    return denoise

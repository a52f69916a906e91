"""A model's noise as diffusers' scheduler, and whether another scheduler has the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from maskdm.diffusion.schedule import NUM_STEPS, log_snr_shift, schedule_of
from maskdm.export.pixel_pipeline import is_flow
from maskdm.recipe import Diffusion

PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def diffusers_scheduler(
    diffusion: Diffusion, image_size: int | Sequence[int], clip_x0: bool = True
) -> SchedulerMixin:
    """A diffusion as diffusers' scheduler.

    Its timestep i is our time t = i / 999; for a flow it is sigma = i / 1000, whose time is
    another where the flow is shifted. What the network predicts is its prediction type, where
    diffusers knows it.
    """
    if diffusion.schedule == "flow":
        return FlowMatchEulerDiscreteScheduler(NUM_STEPS, shift=flow_shift(diffusion, image_size))
    t = torch.arange(NUM_STEPS, dtype=torch.float64) / (NUM_STEPS - 1)
    power = schedule_of(diffusion, image_size).log_snr(t).sigmoid()  # alpha^2
    before = torch.cat([torch.ones(1, dtype=torch.float64), power[:-1]])
    return DDIMScheduler(
        num_train_timesteps=NUM_STEPS,
        trained_betas=(1 - power / before).tolist(),
        prediction_type=PREDICTION_TYPES.get(diffusion.prediction, "v_prediction"),
        timestep_spacing="trailing",
        clip_sample=clip_x0,
    )


def flow_shift(diffusion: Diffusion, image_size: int | Sequence[int]) -> float | None:
    """The shift of a flow's sigma in diffusers' terms, shift t / (1 + (shift - 1) t); else None."""
    if diffusion.schedule != "flow":
        return None
    return math.exp(-log_snr_shift(diffusion.base_size, image_size) / 2)


def refuse_scheduler(scheduler: Any, own: Any) -> None:
    """Raises ValueError where a scheduler has other noise than a model's own one."""
    same = is_flow(scheduler) == is_flow(own)
    if same and not is_flow(own):
        power, own_power = getattr(scheduler, "alphas_cumprod", torch.ones(1)), own.alphas_cumprod
        same = len(power) == len(own_power) and all(
            torch.allclose(one, other, rtol=1e-2, atol=0)
            for one, other in ((power, own_power), (1 - power, 1 - own_power))
        )
    if not same:
        raise ValueError(
            f"{type(scheduler).__name__} has other noise than this model was trained on: make it "
            "by from_config(pipeline.scheduler.config), or use another one"
        )

"""The optimizer, the learning rate over a stage, clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from maskdm.recipe import Stage
from maskdm.recipe_length import steps_of


def make_optimizer(parameters: Iterable[nn.Parameter], stage: Stage) -> torch.optim.AdamW:
    """A fresh AdamW with the stage's settings (Section 4.1; decoupled weight decay)."""
    return torch.optim.AdamW(
        parameters, lr=stage.lr, betas=stage.betas, weight_decay=stage.weight_decay, fused=True
    )


def enter_stage(optimizer: torch.optim.AdamW, stage: Stage) -> None:
    """Gives an optimizer the stage's settings; clearing its moments is left to the caller.

    A run has one optimizer: the engine keeps every one that it prepared, and its loss scaler
    would unscale the gradients once for each.
    """
    for group in optimizer.param_groups:
        group.update(lr=stage.lr, betas=stage.betas, weight_decay=stage.weight_decay)


def learning_rate(stage: Stage, stage_step: int) -> float:
    """Learning rate of a stage's step, counted from 0: a pure function, so resume is exact.

    Linear warm-up reaches `lr` at step `stage.warmup_steps`; then constant, or a cosine that would
    reach zero at step `steps`. Each of the stage's restarts begins this anew, up to the next.
    """
    starts = [0, *stage.restarts, stage.steps]
    segment = max(i for i, start in enumerate(starts[:-1]) if start <= stage_step)
    step, steps = stage_step - starts[segment], starts[segment + 1] - starts[segment]
    warmup_steps = (
        min(stage.warmup_steps, steps)
        if isinstance(stage.warmup, int)
        else steps_of(stage.warmup, steps)
    )
    if step < warmup_steps:
        share = (step + 1) / (warmup_steps + 1)
        return stage.warmup_from + (stage.lr - stage.warmup_from) * share
    if stage.lr_schedule == "constant":
        return stage.lr
    elapsed = (step - warmup_steps) / (steps - warmup_steps)
    return stage.lr * 0.5 * (1 + math.cos(math.pi * elapsed))


def clip_gradients(accelerator: Accelerator, model: nn.Module, clip: float | None) -> Tensor:
    """Clips the gradient to a norm, None = not at all; returns its norm before, on the device."""
    if clip is not None:
        norm: Tensor = accelerator.clip_grad_norm_(model.parameters(), clip)
        return norm.detach()
    accelerator.unscale_gradients()
    return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])

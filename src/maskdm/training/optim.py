"""The optimizer, and the learning rate over a stage."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from maskdm.recipe import Stage


def make_optimizer(parameters: Iterable[nn.Parameter], stage: Stage) -> torch.optim.AdamW:
    """A fresh AdamW with the stage's settings (Section 4.1; decoupled weight decay)."""
    return torch.optim.AdamW(
        parameters, lr=stage.lr, betas=stage.betas, weight_decay=stage.weight_decay, fused=True
    )


def enter_stage(optimizer: torch.optim.AdamW, stage: Stage) -> None:
    """Gives an optimizer the stage's settings; its moments are the caller's to clear or keep.

    A run has one optimizer: the engine keeps every one that it was ever given, and its loss
    scaler would undo the scale of the gradients once for each.
    """
    for group in optimizer.param_groups:
        group.update(lr=stage.lr, betas=stage.betas, weight_decay=stage.weight_decay)


def learning_rate(stage: Stage, stage_step: int) -> float:
    """Learning rate of a stage's step, counted from 0: a pure function, so resume is exact.

    Linear warm-up reaches `lr` at step `warmup_steps`; then constant, or a cosine that would
    reach zero at step `steps`.
    """
    if stage_step < stage.warmup_steps:
        return stage.lr * (stage_step + 1) / (stage.warmup_steps + 1)
    if stage.lr_schedule == "constant":
        return stage.lr
    elapsed = (stage_step - stage.warmup_steps) / (stage.steps - stage.warmup_steps)
    return stage.lr * 0.5 * (1 + math.cos(math.pi * elapsed))

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


def restart_optimizer(optimizer: torch.optim.AdamW, stage: Stage) -> None:
    """Makes an optimizer as fresh as `make_optimizer` would, with another stage's settings.

    The engine keeps every optimizer that it was ever given, and its loss scaler would undo the
    scale of the gradients once for each: so a run has one.
    """
    optimizer.state.clear()
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

"""The optimizer, the learning rate over a stage, and the one decision about precision."""

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


def choose_precision(requested: str, device: torch.device) -> tuple[str, str]:
    """Decides the compute precision: `fp32`, `bf16` or `fp16`, and says why.

    Weights, optimizer and moving average stay in fp32 whatever the answer.
    Raises ValueError where the device cannot do what was requested.
    """
    if requested == "fp16" and device.type != "cuda":
        raise ValueError(f"precision fp16 needs a CUDA device, and this is {device.type}: use auto")
    if requested != "auto":
        return requested, "as the recipe says"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", "the GPU computes it natively"
    if device.type == "cuda":
        return "fp32", "this GPU has no bf16 units; precision fp16 is faster, if less stable"
    return "fp32", f"bf16 is not faster on {device.type}"

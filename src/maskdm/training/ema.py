"""The exponential moving average of the weights: the model that samples are drawn from."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from maskdm.families import AVERAGES
from maskdm.models.power_average import gamma_of_width
from maskdm.recipe import Average, Stage

ModelT = TypeVar("ModelT", bound=nn.Module)

COPIED = 100  # updates before the average of the paper's code begins to lag


def make_average(model: ModelT) -> ModelT:
    """A frozen copy of the model, in evaluation mode, to hold the average."""
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def restart_average(average: nn.Module, model: nn.Module) -> None:
    """Starts the average from the model's present weights, as each stage does."""
    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
        mean.copy_(weight)


def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Moves the average a step towards the model: mean <- decay mean + (1 - decay) weight.

    n calls after a restart it is exactly decay^n w_0 + (1 - decay) sum_k decay^(n - k) w_k.
    torch's own formula, in one pass over all tensors; its `AveragedModel`, which wraps it, reads
    a count from the device at each call.
    """
    update = get_ema_multi_avg_fn(decay)
    update(list(average.parameters()), list(model.parameters()), 0)


def decay_of(settings: Average, update: int) -> float:
    """Decay of a stage's update with that number, counted from 1: a pure function of both."""
    compute = AVERAGES[settings.kind].run
    assert compute is not None
    decay: float = compute(settings, update)
    return decay


def share_of_first(stage: Stage) -> float:
    """What part of a stage's average its first weights make up at the stage's end."""
    return stage.ema.decay**stage.steps if stage.ema.kind == "constant" else 0.0


def constant_decay(settings: Average, update: int) -> float:
    """The same at each step."""
    return settings.decay


def warmup_decay(settings: Average, update: int) -> float:
    """A copy for 100 steps, then min(decay, 1 - (1 + n)^(-2/3)) at the n-th after them.

    The paper's code uses ema_pytorch with these defaults.
    """
    num = update - 1 - COPIED
    return 0.0 if num <= 0 else min(settings.decay, 1 - (1 + num) ** (-2 / 3))


def power_decay(settings: Average, update: int) -> float:
    """(1 - 1/n)^(gamma + 1): the weights of step tau count as tau^gamma.

    Karras et al. 2024 (EDM2), Eqs. 2 and 3. The first update takes the weights as they are.
    """
    return (1 - 1 / update) ** (gamma_of_width(settings.width) + 1)

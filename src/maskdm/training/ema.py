"""The exponential moving average of the weights: the model that samples are drawn from."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

ModelT = TypeVar("ModelT", bound=nn.Module)


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

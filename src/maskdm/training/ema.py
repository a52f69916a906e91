"""The exponential moving average of the weights, the model that is sampled from."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def make_ema(model: nn.Module) -> AveragedModel:
    """A frozen copy of the model, to be started by `restart_ema` at each stage."""
    ema = AveragedModel(model)
    ema.requires_grad_(False)
    return ema.eval()


def restart_ema(ema: AveragedModel, model: nn.Module, decay: float) -> None:
    """Starts the average from the model's present weights, with a stage's decay.

    After n calls of `ema.update_parameters(model)` the average is exactly
    decay^n w_0 + (1 - decay) sum_k decay^(n - k) w_k.
    """
    with torch.no_grad():
        for average, weight in zip(ema.module.parameters(), model.parameters(), strict=True):
            average.copy_(weight)
    continue_ema(ema, decay)


def continue_ema(ema: AveragedModel, decay: float) -> None:
    """Goes on from the average's present weights (after a resume)."""
    ema.multi_avg_fn = get_ema_multi_avg_fn(decay)
    # AveragedModel copies instead of averaging while its count is zero, and asks for the count
    # at each step: kept on the host, the question costs no device sync.
    ema.n_averaged = torch.ones((), dtype=torch.long)

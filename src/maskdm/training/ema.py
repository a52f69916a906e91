"""The exponential moving average of the weights: the model that samples are drawn from."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from maskdm.families import AVERAGES
from maskdm.models.power_average import gamma_of_width
from maskdm.recipe import Average, Recipe, Stage
from maskdm.runs.averages import is_snapshot_due, save_snapshot
from maskdm.runs.checkpoint import Progress, keep_average
from maskdm.settings import changed

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
    """
    move_average(average, model, 1 - decay)


@torch.no_grad()
def move_average(average: nn.Module, model: nn.Module, share: float | Tensor) -> None:
    """Moves the average a share of the way to the model's weights, all tensors at once.

    torch's own `AveragedModel` reads a count from the device at each call.

    Args:
        average, model: of the same weights.
        share: 1 - decay. As a tensor, float32 () on their device, it takes three passes, not one.
    """
    means = list[Tensor](average.parameters())
    weights = list[Tensor](model.parameters())
    if isinstance(share, Tensor):
        ways = torch._foreach_sub(weights, means)
        torch._foreach_mul_(ways, share)
        torch._foreach_add_(means, ways)
    else:
        torch._foreach_lerp_(means, weights, share)


class Averages(Generic[ModelT]):
    """The average that images are drawn from, and in power averages a narrower one beside it.

    Args:
        model: the model.

    Attributes:
        main: the average.
        narrow: of half the width; None unless the stage's average is a power function.
    """

    def __init__(self, model: ModelT):
        self.main = make_average(model)
        self.narrow: ModelT | None = None

    def enter_stage(self, stage: Stage, model: nn.Module, begins: bool) -> None:
        """Readies the averages for a stage; where it begins, they start from its first weights."""
        if begins:
            restart_average(self.main, model)
            self.narrow = None
        if stage.ema.kind == "power" and self.narrow is None:
            self.narrow = make_average(self.main)
        elif stage.ema.kind != "power":
            self.narrow = None

    def shares(self, stage: Stage, stage_step: int) -> list[float]:
        """1 - decay of each, after the stage's step of that number, counted from 0."""
        ways = [stage.ema] if self.narrow is None else [stage.ema, narrower(stage.ema)]
        return [1 - decay_of(one, stage_step + 1) for one in ways]

    def update(self, model: nn.Module, shares: Sequence[float | Tensor]) -> None:
        """Moves them towards the model, each by its share (see `move_average`)."""
        averages = [self.main] if self.narrow is None else [self.main, self.narrow]
        for average, share in zip(averages, shares, strict=True):
            move_average(average, model, share)

    def keep(self, run_dir: Path, recipe: Recipe, stage: Stage, progress: Progress) -> None:
        """Writes what is due: a snapshot (see `runs.averages`), the average for a curve."""
        every, is_end = recipe.every(recipe.keep_every), progress.stage_step == stage.steps
        if every and (is_end or progress.step % every == 0):
            keep_average(run_dir, progress, self.main)
        if is_snapshot_due(stage, progress.stage_step):
            where = (run_dir, stage, progress.step, progress.stage_step)
            save_snapshot(*where, self.by_width(stage))

    def by_width(self, stage: Stage) -> dict[float, nn.Module]:
        """The two of a power average by their relative widths."""
        assert self.narrow is not None
        return {stage.ema.width: self.main, narrower(stage.ema).width: self.narrow}


def narrower(settings: Average) -> Average:
    """The settings of the second average: half as wide (Karras et al. 2024 track 0.05 and 0.1)."""
    return changed(settings, width=settings.width / 2)


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

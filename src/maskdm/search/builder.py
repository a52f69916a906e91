"""From a schedule to a recipe of some length."""

from __future__ import annotations

import itertools
from typing import Any

from maskdm.masks import num_visible
from maskdm.models.backbone import Backbone
from maskdm.recipe import Budget, Mask, Recipe, Stage
from maskdm.search.space import Schedule, Space
from maskdm.settings import changed
from maskdm.tokens import grid_shape
from maskdm.training.budget import FEWEST_STEPS
from maskdm.training.work import stage_work, total_flops
from maskdm.words import flops_text

WARMUP_PART = 5  # of the shortest masked stage, one in so many steps is warm-up at most


class Builder:
    """Makes a schedule's recipe for a length.

    Masked stages keep their learning rate and warm-up at any length, so that a shorter one is the
    beginning of a longer one. The last stage is the recipe's own, on whole images; its warm-up and
    average follow its length.

    Args:
        base: the recipe, with all numbers.
        space: what is searched.
        model: of the recipe; only its sizes matter.
        lengths: FLOPs of a trial on each rung, and of one with a fresh seed.
    """

    def __init__(self, base: Recipe, space: Space, model: Backbone, lengths: tuple[float, ...]):
        self.base, self._space, self._model = base, space, model
        self.full_flops = total_flops(base, stage_work(base, model))
        self.lengths, self._prices = lengths, dict[str, int]()

    def recipe(self, schedule: Schedule, flops: float, seed: int = 0) -> Recipe:
        """The schedule at a length, at most so many FLOPs.

        Args:
            schedule: what is trained.
            flops: of the whole training.
            seed: added to the recipe's.

        Raises ValueError for a mask that the grid cannot have, and a length without enough steps.
        """
        rows = [self._masked(i, schedule) for i in range(len(schedule.masks))]
        rows.append(self._whole(schedule, flops))
        prices = [self._price(row) for row in rows]
        for row, price in zip(rows[:-1], prices, strict=False):
            row["steps"] = self._masked_steps(schedule, flops, price)
        rest = flops - sum(row["steps"] * p for row, p in zip(rows[:-1], prices, strict=False))
        rows[-1]["steps"] = int(rest / prices[-1])
        for row in rows:
            if row["steps"] < FEWEST_STEPS:
                raise ValueError(
                    f"{flops_text(flops)} leave {row['steps']} steps for a stage of {schedule}"
                )
        if isinstance(rows[-1]["warmup"], int):
            rows[-1]["warmup"] = min(rows[-1]["warmup"], rows[-1]["steps"])
        return changed(self.base, stages=rows, budget=Budget(), seed=self.base.seed + seed)

    def marks(self, schedule: Schedule, rung: int) -> list[int]:
        """Steps of the first stage after which other trials of a rung may go on; increasing.

        Stages whose learning rate may not be constant have none, nor have fresh seeds.
        """
        if schedule.is_dense or rung + 1 == len(self.lengths):
            return []
        price = self._price(self._masked(0, schedule))
        parts = itertools.product(self._space.shares, self._space.masked_stages)
        flops = {self.lengths[rung] * share / num for share, num in parts}
        return sorted({int(one / price) for one in flops} - {0})

    def is_possible(self, schedule: Schedule) -> bool:
        """Whether the grid can have the masks, and each stage has steps at the shortest length."""
        grid = grid_shape(*self.base.data.shape[:2], self.base.model.patch_size)
        try:
            for number in range(len(schedule.masks)):
                num_visible(self._mask(number, schedule), grid)
            self.recipe(schedule, self.lengths[0])
        except ValueError:
            return False
        return True

    def _masked(self, number: int, schedule: Schedule) -> dict[str, Any]:
        """Settings of a masked stage, without its steps."""
        own = self.base.stages[0]
        row: dict[str, Any] = {
            **own.model_dump(),
            "name": f"masked-{number + 1}",
            "mask": self._mask(number, schedule).model_dump(),
            "steps": 1,
            "batch_size": self._batch(own, schedule),
            "lr": own.lr * schedule.lr * schedule.masked_lr,
            "lr_schedule": "constant",
            "warmup": 0,
            "restarts": (),
            "until": "steps",
            "probe_flops": 0,
            "start_from": "raw",
        }
        row["warmup_from"] = min(own.warmup_from, row["lr"])
        # The warm-up is the same at any length and share: that of the shortest there is.
        least = min(self._space.shares) / max(self._space.masked_stages)
        steps = int(self.lengths[0] * least / self._price(row))
        row["warmup"] = min(own.warmup_steps, steps // WARMUP_PART)
        return row

    def _mask(self, number: int, schedule: Schedule) -> Mask:
        """A masked stage's mask: what is not searched of it is that of the recipe's first stage."""
        kind, rate = schedule.masks[number]
        return changed(self.base.stages[0].mask, kind=kind, rate=rate, block=self._space.block)

    def _whole(self, schedule: Schedule, flops: float) -> dict[str, Any]:
        """Settings of the last stage, without its steps."""
        own, factor = self.base.stages[-1], flops / self.full_flops
        row: dict[str, Any] = {
            **own.model_dump(),
            "name": "dense" if schedule.is_dense else "whole",
            "mask": {"kind": "none", "rate": 0.0},
            "steps": 1,
            "batch_size": self._batch(own, schedule),
            "lr": own.lr * schedule.lr,
            "restarts": (),
            "probe_flops": 0,
            "start_from": "raw" if schedule.is_dense else own.start_from,
            "ema": {**own.ema.model_dump(), "decay": own.ema.decay ** (1 / factor)},
        }
        row["warmup_from"] = min(own.warmup_from, row["lr"])
        if isinstance(own.warmup, int):
            row["warmup"] = round(own.warmup * factor)
        return row

    def _batch(self, own: Stage, schedule: Schedule) -> int:
        return max(1, round(own.batch_size * schedule.batch))

    def _price(self, row: dict[str, Any]) -> int:
        """FLOPs of a step of a stage."""
        key = f"{row['mask']} {row['batch_size']}"
        if key not in self._prices:
            stages = [{**row, "steps": 1, "warmup": 0}]
            one = changed(self.base, stages=stages, budget=Budget())
            self._prices[key] = stage_work(one, self._model)[0].step_flops
        return self._prices[key]

    def _masked_steps(self, schedule: Schedule, flops: float, price: int) -> int:
        return int(flops * schedule.share / len(schedule.masks) / price)

"""How long a run still takes, with its previews and measurements."""

from __future__ import annotations

import time
from collections.abc import Sequence

from maskdm.models.backbone import Backbone
from maskdm.recipe import Recipe
from maskdm.runs.checkpoint import Progress
from maskdm.training.budget import besides, set_points
from maskdm.training.work import StageWork, total_flops

FORGET_SEC = 20.0  # speeds of longer ago hardly count


class Remaining:
    """Estimates the time left from the compute that is left and the speed of the last seconds.

    Args:
        recipe: planned; `works` of its stages, `model` and the source's `num_images` give its cost.

    Attributes:
        total_flops: of all training steps.
        images_per_sec: of the last seconds; None = unknown yet.
    """

    def __init__(
        self, recipe: Recipe, works: Sequence[StageWork], model: Backbone, num_images: int
    ):
        self._works = works
        self.total_flops = total_flops(recipe, list(works))
        self.replan(recipe)
        one = model.forward_flops(works[0].num_patches)
        self._look_flops = one * besides(recipe, num_images).total / max(1, len(self._points))
        self._flops_per_sec: float | None = None
        self.images_per_sec: float | None = None
        self._look_sec: float | None = None  # of the last preview and measurement
        self._since, self._seen = time.perf_counter(), (0, 0)

    def replan(self, recipe: Recipe) -> None:
        """Takes up stages of other lengths, of as many FLOPs in all."""
        self._recipe = recipe
        looks = set_points(recipe, recipe.preview_every if recipe.num_previews else 0)
        self._points = sorted(looks | set_points(recipe, recipe.evaluate_every))

    def begin(self, progress: Progress) -> None:
        """To be called whenever training begins or goes on after a pause."""
        self._since, self._seen = time.perf_counter(), (progress.flops, progress.images)

    def update(self, progress: Progress) -> None:
        """Takes the speed since the last call."""
        seconds = time.perf_counter() - self._since
        if seconds <= 0 or progress.images == self._seen[1]:
            return
        kept = 0.5 ** (seconds / FORGET_SEC)
        speeds = [
            (now - then) / seconds
            for now, then in zip((progress.flops, progress.images), self._seen, strict=True)
        ]
        known = (self._flops_per_sec, self.images_per_sec)
        self._flops_per_sec, self.images_per_sec = (
            new if old is None else kept * old + (1 - kept) * new
            for old, new in zip(known, speeds, strict=True)
        )
        self.begin(progress)

    def looked(self, seconds: float) -> None:
        """Takes the time of a preview or measurement, or both."""
        self._look_sec = seconds

    def enter_stage(self) -> None:
        """Forgets the number of images per second: another mask gives another."""
        self.images_per_sec = None

    def seconds(self, progress: Progress) -> tuple[float, float] | None:
        """Time left of the stage and of the run; None = unknown yet."""
        if not self._flops_per_sec:
            return None
        step, left = progress.step - progress.stage_step, []
        for i, (stage, work) in enumerate(zip(self._recipe.stages, self._works, strict=True)):
            if i < progress.stage:
                continue
            first, step = step, step + stage.steps
            done = progress.step if i == progress.stage else first
            looks = sum(done < point <= step for point in self._points)
            each = self._look_sec or self._look_flops / self._flops_per_sec
            left.append((step - done) * work.step_flops / self._flops_per_sec + looks * each)
        return left[0], sum(left)

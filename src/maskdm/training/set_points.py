"""Looks at the averaged model at set points of a run: quality.jsonl and the preview grids."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from maskdm.models.trained import TrainedModel
from maskdm.recipe import Recipe
from maskdm.training.checkpoint import Progress
from maskdm.training.monitor import Monitor, clock, read_metrics

QualityLine = dict[str, Any]
"""A line of quality.jsonl; of a set point where nothing is measured, its first part alone."""

Measure = Callable[[TrainedModel], QualityLine]
"""Measures the averaged model; called on every rank, and the first one's answer counts."""

Preview = Callable[[Accelerator, TrainedModel, Path, QualityLine], None]
"""Draws a preview grid with the averaged model into a file; called on every rank."""


class SetPoints:
    """Measures and draws where the recipe says, and each stage's end.

    Args:
        recipe: how often.
        run_dir: RUN.
        hidden: the fraction that each stage really hides.
        accelerator: tells the ranks apart.
        monitor: keeps the lines, and says them.
        measure: None = nothing is measured.
        preview: None = nothing is drawn.
    """

    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path,
        hidden: Sequence[float],
        accelerator: Accelerator,
        monitor: Monitor,
        measure: Measure | None,
        preview: Preview | None,
    ):
        self._recipe, self._run_dir, self._hidden = recipe, run_dir, hidden
        self._accelerator, self._monitor = accelerator, monitor
        self._measure, self._preview = measure, preview

    def measures_at(self, progress: Progress) -> bool:
        """Whether the model is measured at this step."""
        every = self._recipe.evaluate_every
        if self._measure is None or every == 0 or progress.step == 0:
            return False
        return self._is_end(progress) or progress.step % every == 0

    def draws_at(self, progress: Progress) -> bool:
        """Whether a preview is drawn at this step."""
        if self._preview is None or progress.step == 0:
            return False
        return self._is_end(progress) or progress.step % self._recipe.preview_every == 0

    def look(self, progress: Progress, trained: TrainedModel) -> None:
        """Measures and draws what is due at this step. To be called on every rank."""
        line = self._where(progress)
        if self.measures_at(progress):
            line |= self._measured(trained, line)
        if self.draws_at(progress):
            self._draw(trained, line)

    def catch_up(self, progress: Progress, trained: TrainedModel) -> None:
        """Does at a checkpoint's step what was due there and is missing, since a kill forbade it.

        To be called on every rank.
        """
        lines = read_metrics(self._monitor.quality_path)
        known = next((line for line in lines if line["step"] == progress.step), None)
        is_drawn = self._sample_file(progress.step).exists()
        known, is_drawn = broadcast_object_list([known, is_drawn])  # as the first rank sees it
        line = known or self._where(progress)
        if self.measures_at(progress) and known is None:
            line |= self._measured(trained, line)
        if self.draws_at(progress) and not is_drawn:
            self._draw(trained, line)

    def _where(self, progress: Progress) -> QualityLine:
        return {
            "step": progress.step,
            "stage": self._recipe.stages[progress.stage].name,
            "images": progress.images,
            "flops": progress.flops,
            "elapsed_sec": progress.elapsed_sec,
            "hidden": self._hidden[progress.stage],
        }

    def _measured(self, trained: TrainedModel, where: QualityLine) -> QualityLine:
        assert self._measure is not None
        start = time.perf_counter()
        self._monitor.doing(f"step {where['step']:,}: measuring")
        measured = self._measure(trained)
        self._monitor.log_quality({**where, **measured})
        took = clock(time.perf_counter() - start)
        self._monitor.say(f"  step {where['step']:,}: {quality_text(measured)}; took {took}")
        return measured

    def _draw(self, trained: TrainedModel, line: QualityLine) -> None:
        assert self._preview is not None
        self._monitor.doing(f"step {line['step']:,}: drawing a preview")
        self._preview(self._accelerator, trained, self._sample_file(line["step"]), line)

    def _is_end(self, progress: Progress) -> bool:
        return progress.stage_step == self._recipe.stages[progress.stage].steps

    def _sample_file(self, step: int) -> Path:
        return self._run_dir / "samples" / f"step-{step:08d}.png"


def quality_text(measured: QualityLine) -> str:
    """What was measured, in one line: `dense loss 0.0431 (train 0.0412), sliced 12.3 +- 0.5`."""
    return ", ".join(quality_parts(measured))


def quality_parts(measured: QualityLine) -> list[str]:
    """What was measured, a part for each quantity; none where nothing was."""
    parts = []
    if "dense_loss" in measured:
        on_trained = f"train {measured['dense_loss_train']:.4f}"
        parts.append(f"dense loss {measured['dense_loss']:.4f} ({on_trained})")
    elif "dense_loss_train" in measured:
        parts.append(f"dense loss {measured['dense_loss_train']:.4f} on training images")
    for name in ("sliced", "kid"):
        if name in measured:
            parts.append(f"{name} {_with_error(measured[name], measured[f'{name}_error'])}")
    return parts


def _with_error(value: float, error: float | None) -> str:
    """A figure to the second digit of its error: `9.3 +- 1.2`."""
    if not error:
        return f"{value:.3g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:,.{decimals}f} +- {error:,.{decimals}f}"

"""Looks at the averaged model at set points of a run: measures it, draws previews, exports it.

What they show is in the run's report, which is written anew each time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from maskdm.evaluation.neighbours import nearest_in_pixels
from maskdm.evaluation.overfitting import rise_of_loss
from maskdm.evaluation.quick import QuickLook
from maskdm.export.pipeline import pipeline_of_run, save_pipeline
from maskdm.images.joined import SelectedRows
from maskdm.images.order import training_subset
from maskdm.images.store import Store
from maskdm.metrics import METRICS
from maskdm.models.backbone import Backbone
from maskdm.models.trained import TrainedModel
from maskdm.recipe import Recipe
from maskdm.report.page import update_report
from maskdm.report.pictures import spread
from maskdm.report.plots import plot_loss
from maskdm.report.sheets import draw_sheet, neighbours_sheet, preview_sheet
from maskdm.runs.checkpoint import Progress
from maskdm.runs.find import REPORT, find_checkpoint
from maskdm.runs.lines import Line, read_lines
from maskdm.runs.plan_file import write_plan
from maskdm.sampling.generate import generate_on_all_ranks
from maskdm.training.costs import plan_of
from maskdm.training.monitor import Monitor
from maskdm.training.work import StageWork
from maskdm.words import clock, with_error

NUM_SHOWN = 12  # images on the sheets of a report
MOST_COMPARED = 50_000  # training images among which the nearest to a sample is looked for


class Checkups:
    """Measures and draws where the recipe says and at each stage's end; exports at the run's end.

    To be made, and called, on every rank.

    Args:
        recipe: how often, and what.
        run_dir: RUN.
        store: all images of the run's source.
        works: of the stages.
        accelerator: tells the ranks apart.

    Raises:
        ValueError: features that are not available, or too few real images.
    """

    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path,
        store: Store,
        works: Sequence[StageWork],
        accelerator: Accelerator,
    ):
        self._recipe, self._run_dir, self._works = recipe, run_dir, works
        self._store, self._accelerator = store, accelerator
        self._is_main = accelerator.is_main_process
        self._measure = (
            QuickLook(recipe, store, recipe.for_previews) if recipe.evaluate_every else None
        )

    def begin(self, model: Backbone, monitor: Monitor) -> None:
        """Writes what the report shows before the first step: plan, images and masks.

        Args:
            model: only its sizes matter.
        """
        if not self._is_main:
            return
        write_plan(self._run_dir, plan_of(self._recipe, model, self._store, self._accelerator))
        sheet = self._run_dir / "data.png"
        if not sheet.exists() or find_checkpoint(self._run_dir / "checkpoints") is None:
            images = self._store.images[self._training_images(NUM_SHOWN)]
            draw_sheet(list(images), self._recipe).save(sheet)
        update_report(self._run_dir, monitor.say)

    def replan(self, recipe: Recipe) -> None:
        """Takes up stages of other lengths."""
        self._recipe = recipe

    def measures_at(self, progress: Progress) -> bool:
        """Whether the model is measured at this step."""
        every = self._recipe.every(self._recipe.evaluate_every)
        if every == 0 or progress.step == 0:
            return False
        return self._is_stage_end(progress) or progress.step % every == 0

    def draws_at(self, progress: Progress) -> bool:
        """Whether a preview is drawn at this step."""
        if self._recipe.num_previews == 0 or progress.step == 0:
            return False
        every = self._recipe.every(self._recipe.preview_every)
        return self._is_stage_end(progress) or progress.step % every == 0

    def look(
        self,
        progress: Progress,
        average: Backbone,
        monitor: Monitor,
        measured: Line | None = None,
        is_drawn: bool = False,
    ) -> None:
        """Measures and draws what is due at this step, except what is there already."""
        measuring = self.measures_at(progress) and measured is None
        drawing = self.draws_at(progress) and not is_drawn
        if not (measuring or drawing):
            return
        line = measured or self._start_line(progress)
        with monitor.looking(progress):
            if measuring:
                line |= self._measured(progress, average, line, monitor)
            if drawing:
                self._draw(progress, average, line, monitor)
            if self._is_main:
                update_report(self._run_dir, monitor.say)

    def catch_up(self, progress: Progress, average: Backbone, monitor: Monitor) -> None:
        """Does what was due at a checkpoint's step and is missing, because a kill came between."""
        lines = read_lines(monitor.quality_path)
        measured = next((line for line in lines if line["step"] == progress.step), None)
        is_drawn = self._preview_file(progress.step).exists()
        seen = broadcast_object_list([measured, is_drawn])  # as the first rank sees it
        self.look(progress, average, monitor, *seen)

    def finish(self, average: Backbone, monitor: Monitor) -> None:
        """Exports the finished model, plots its loss and completes the report."""
        if not self._is_main:
            return
        run = self._run_dir
        save_pipeline(pipeline_of_run(average, self._recipe), run / "model")
        monitor.say(f"model   {run / 'model'}")
        monitor.say(f"loss    {plot_loss(run)}")
        for file in sorted((run / "samples").glob("step-*.png"))[-1:]:
            monitor.say(f"preview {file}")
        update_report(run, monitor.say)
        monitor.say(f"report  {run / REPORT}")
        monitor.say(f"next    maskdm sample {run} --num 64 --out grid.png")

    def _start_line(self, progress: Progress) -> Line:
        return {
            "step": progress.step,
            "stage": self._recipe.stages[progress.stage].name,
            "images": progress.images,
            "flops": progress.flops,
            "elapsed_sec": progress.elapsed_sec,
            "hidden": self._works[progress.stage].hidden,
        }

    def _measured(
        self, progress: Progress, average: Backbone, line: Line, monitor: Monitor
    ) -> Line:
        assert self._measure is not None
        start = time.perf_counter()
        monitor.show_activity(f"step {progress.step:,}: measuring")
        measured = self._measure(self._trained(progress, average), monitor.shows_bars)
        monitor.log_quality({**line, **measured})
        if self._is_main and (rise := rise_of_loss(read_lines(monitor.quality_path))):
            monitor.say(f"  note: {rise}; {self._run_dir}@best is the average before")
        took = clock(time.perf_counter() - start)
        monitor.say(f"  step {progress.step:,}: {', '.join(quality_parts(measured))}; took {took}")
        return measured

    def _draw(self, progress: Progress, average: Backbone, line: Line, monitor: Monitor) -> None:
        monitor.show_activity(f"step {progress.step:,}: drawing a preview")
        trained = self._trained(progress, average)
        images = generate_on_all_ranks(
            trained,
            self._recipe.for_previews,
            self._recipe.num_previews,
            progress=monitor.shows_bars,
        )
        if self._is_main:
            if progress.step == self._recipe.num_steps:
                self._draw_neighbours(images[:NUM_SHOWN])
            title = f"{line['stage']}, step {progress.step:,}"
            file = self._preview_file(progress.step)
            file.parent.mkdir(parents=True, exist_ok=True)
            parts = [part.replace("+-", "±") for part in quality_parts(line)]
            sheet = preview_sheet(images, title, parts)
            sheet.save(file)
            monitor.log_preview(sheet, progress.step)

    def _draw_neighbours(self, samples: np.ndarray) -> None:
        """Draws samples of the finished model beside the training images most like them."""
        train = SelectedRows(self._store.images, self._training_images(MOST_COMPARED))
        near = nearest_in_pixels(samples, train, self._recipe.data.flip)
        neighbours_sheet(samples, near).save(self._run_dir / "neighbours.png")

    def _training_images(self, most: int) -> np.ndarray:
        """Indices of at most so many images that are trained on, evenly spread: int64 (n,)."""
        subset = training_subset(len(self._store), self._recipe.data)
        return subset[np.array(spread(range(len(subset)), most))]

    def _trained(self, progress: Progress, average: Backbone) -> TrainedModel:
        stage = self._recipe.stages[progress.stage]
        return TrainedModel(average, self._recipe.diffusion_of(stage))

    def _is_stage_end(self, progress: Progress) -> bool:
        return progress.stage_step == self._recipe.stages[progress.stage].steps

    def _preview_file(self, step: int) -> Path:
        return self._run_dir / "samples" / f"step-{step:08d}.png"


def quality_parts(line: dict[str, Any]) -> list[str]:
    """What a line of quality.jsonl measured: `dense loss 0.0431 (train 0.0412)`, `sliced 12.3`."""
    parts = []
    for name, metric in METRICS.items():
        if name not in line:
            continue
        title = metric.title_in(line.get("features", ""), short=True)
        text = f"{title} {with_error(line[name], line.get(f'{name}_error') or None)}"
        train = line.get(f"{name}_train")
        parts.append(text + ("" if train is None else f" (train {with_error(train, None)})"))
    if "dense_loss" not in line and "dense_loss_train" in line:
        parts.append(f"dense loss {with_error(line['dense_loss_train'], None)} on training images")
    return parts

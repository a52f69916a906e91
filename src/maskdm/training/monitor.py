"""What a run reports to people and machines: console, progress bar, lines of JSON."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from maskdm.engine import device_name
from maskdm.families import BACKBONES
from maskdm.images.order import num_held_out, training_subset
from maskdm.images.store import Store, store_folder
from maskdm.images.unreadable import listed_unreadable
from maskdm.masks import mask_text
from maskdm.models.backbone import Backbone
from maskdm.recipe import Budget, Recipe, Stage
from maskdm.runs.averages import remove_averages_after
from maskdm.runs.checkpoint import Progress
from maskdm.runs.lines import PROBES, append_line, keep_lines_until
from maskdm.training.costs import costs_of, warnings_of
from maskdm.training.remaining import Remaining as Remaining
from maskdm.training.speed import ThisMachine
from maskdm.training.trackers import Trackers
from maskdm.training.work import StageWork
from maskdm.words import about, clock, counted, flops_text, printable

PLAIN_LINE_SEC = 30.0  # without a terminal, a line of progress this often
BAR_SEC = 1.0  # the bar moves this often
WORTH_GUESSING = 10**12  # FLOPs of a run whose time is said beforehand
MOST_HELD_OUT = 0.25  # part of the images that may be held out without a note


@contextmanager
def readers_may_leave() -> Iterator[None]:
    """Training goes on in silence where nobody reads its output any more.

    A closed pipe (`maskdm train ... | head`) gives EPIPE, a closed terminal EIO.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # what it still holds, and all that follows, goes nowhere
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


class Monitor:
    """Console and metrics of a run; on ranks other than the first it is silent.

    Args:
        run_dir: the run's folder.
        remaining: estimates the time left. Progress is measured in FLOPs, since a masked step
            costs a fraction of a dense one.
        active: whether this is the rank that reports.
        show: whether to print to the console.

    Attributes:
        quality_path: of quality.jsonl.
    """

    def __init__(self, run_dir: Path, remaining: Remaining, active: bool, show: bool):
        self._run_dir, self._path = run_dir, run_dir / "metrics.jsonl"
        self.quality_path = run_dir / "quality.jsonl"
        self._probes_path = run_dir / PROBES
        self._active = active
        self._show = active and show
        self._remaining, self._total_flops = remaining, remaining.total_flops
        self._bar: tqdm[Any] | None = None
        self._trackers: Trackers | None = None
        self._last_sec = self._last_line_sec = time.monotonic()
        self._unsaid = ""  # the newest line, if it came too soon after another

    def start(self, progress: Progress, recipe: Recipe) -> None:
        """Drops what is of later steps (a kill left it), and opens trackers and the bar."""
        self._remaining.begin(progress)
        if self._active:
            keep_lines_until(self._path, progress.step)
            keep_lines_until(self.quality_path, progress.step)
            keep_lines_until(self._probes_path, progress.step)
            remove_averages_after(self._run_dir, progress.step)
            if progress.step < recipe.num_steps:
                self._trackers = Trackers(recipe, self._run_dir, progress.step, self.say)
        if self._show and sys.stderr.isatty():
            self._bar = tqdm(
                total=self._total_flops,
                initial=progress.flops,
                bar_format="{percentage:3.0f}%|{bar}| {desc}",
                dynamic_ncols=True,
            )

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        with readers_may_leave():
            if self._bar is not None:
                self._bar.write(text)
            elif self._show:
                print(text, flush=True)

    def show_activity(self, text: str) -> None:
        """Shows on the bar what takes a while; without one, how far training is."""
        if self._bar is None:
            self._say_unsaid()
            return
        with readers_may_leave():
            self._bar.set_description_str(text)

    def log(self, line: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl and shows it. Raises OSError on a full disk."""
        if not self._active:
            return
        append_line(self._path, line)
        if self._trackers is not None:
            self._trackers.log("train", line)

    @property
    def is_due(self) -> bool:
        """Whether it is time to show where training is."""
        return self._active and time.monotonic() - self._last_sec > BAR_SEC

    def advance(self, progress: Progress, stage: Stage, loss: float | None) -> None:
        """Shows where training is: stage, step, loss, speed, time left of stage and run.

        Args:
            loss: the mean of the last steps; None = unknown yet.
        """
        self._last_sec = time.monotonic()
        self._remaining.update(progress)
        speed, left = self._remaining.images_per_sec, self._remaining.seconds(progress)
        parts = [f"{stage.name} step {progress.stage_step:,}/{stage.steps:,}"]
        parts += [] if loss is None else [f"loss {loss:.4f}"]
        parts += [] if speed is None else [f"{speed:,.{0 if speed >= 10 else 2}f} img/s"]
        if left is not None:
            of_stage, of_run = map(clock, left)
            parts.append(f"{of_stage} left" + (f", {of_run} of the run" * (left[0] < left[1])))
        text = "  ".join(parts)
        if self._bar is not None:
            with readers_may_leave():
                self._bar.set_description_str(text, refresh=False)
                self._bar.update(progress.flops - self._bar.n)
        else:
            self._unsaid = f"  {100 * progress.flops / self._total_flops:3.0f} %  {text}"
            if time.monotonic() - self._last_line_sec > PLAIN_LINE_SEC:
                self._say_unsaid()

    @contextmanager
    def looking(self, progress: Progress) -> Iterator[None]:
        """Times a preview or measurement, for the time that is left."""
        start = time.perf_counter()
        yield
        self._remaining.looked(time.perf_counter() - start)
        self._remaining.begin(progress)

    @property
    def shows_bars(self) -> bool:
        """Whether what takes a while shows a bar of its own."""
        return self._bar is not None

    def _say_unsaid(self) -> None:
        if self._unsaid:
            self.say(self._unsaid)
            self._unsaid, self._last_line_sec = "", time.monotonic()

    def log_quality(self, line: dict[str, Any]) -> None:
        """Appends a line to quality.jsonl. Raises OSError on a full disk."""
        if self._active:
            append_line(self.quality_path, line)
        if self._trackers is not None:
            self._trackers.log("quality", line)

    def log_probe(self, line: dict[str, Any]) -> None:
        """Appends a line to probes.jsonl. Raises OSError on a full disk."""
        if self._active:
            append_line(self._probes_path, line)
        if self._trackers is not None:
            self._trackers.log("probe", line)

    def go_on(self, recipe: Recipe, progress: Progress) -> None:
        """Takes up stages of other lengths, and where training goes on after forks of it."""
        self._remaining.replan(recipe)
        self._remaining.begin(progress)

    def log_preview(self, picture: Image.Image, step: int) -> None:
        """Sends a preview, RGB, to the trackers."""
        if self._trackers is not None:
            self._trackers.log_picture("previews", picture, step)

    def close(self) -> None:
        """Closes trackers and the bar."""
        if self._trackers is not None:
            self._trackers.close()
            self._trackers = None
        if self._bar is not None:
            with readers_may_leave():
                self._bar.close()
            self._bar = None

    def introduce(
        self,
        recipe: Recipe,
        store: Store,
        model: Backbone,
        accelerator: Accelerator,
        precision: str,
    ) -> None:
        """Says what the run trains on, what it trains, where, and how much of it."""
        for line in data_lines(recipe, store):
            self.say(line)
        kind, num_params = BACKBONES[model.kind], sum(p.numel() for p in model.parameters())
        self.say(
            f"model   {kind.title}, {num_params / 1e6:.2f} M parameters, "
            f"{model.num_patches} patches"
        )
        if not kind.masks_save_compute and any(stage.mask.rate for stage in recipe.stages):
            self.say(f"  note: {kind.title} needs the whole grid: masks save no compute")
        devices = f"{accelerator.num_processes} x {device_name(accelerator.device)}"
        self.say(f"device  {devices}, {precision}")
        if note := threads_note(accelerator):
            self.say(f"  note: {note}")
        num_train = len(training_subset(len(store), recipe.data))
        costs = costs_of(recipe, model, None, len(store), num_train)
        epochs = sum(stage.epochs or 0 for stage in costs.stages)
        self.say(
            f"plan    {counted(len(recipe.stages), 'stage')}, "
            f"{flops_text(self._total_flops)} in all, each image seen {epochs:,.3g} times"
            f"{time_text(recipe.budget, self._total_flops, accelerator)}"
        )
        for warning in warnings_of(recipe, costs, num_params, num_train):
            self.say(f"  note: {warning}")

    def introduce_stage(self, recipe: Recipe, progress: Progress, work: StageWork) -> None:
        """Says what a stage does: its mask, the fraction really hidden, steps and compute."""
        self._remaining.enter_stage()
        stage = recipe.stages[progress.stage]
        what = "whole images"
        if work.hidden:
            rate = f" ({100 * stage.mask.rate:.4g} % in the recipe)"
            is_exact = abs(work.hidden - stage.mask.rate) < 5e-4
            how = "hidden" if work.num_middle is None else "not in the middle"
            what = f"{100 * work.hidden:.4g} % {how}{'' if is_exact else rate}, "
            what += mask_text(stage.mask)
        schedule = f", schedule {stage.schedule}" if stage.schedule else ""
        self.say(
            f"stage {progress.stage + 1}/{len(recipe.stages)} {stage.name}: {what}{schedule}, "
            f"{stage.steps:,} steps of {counted(stage.batch_size, 'image')}, "
            f"{flops_text(work.step_flops * stage.steps)}"
        )

    def conclude_stage(self, progress: Progress, stage: Stage, loss: float | None) -> None:
        """Says how a stage has ended."""
        self.advance(progress, stage, loss)
        self._say_unsaid()
        self.say(f"  done after {clock(progress.elapsed_sec)} of training")


def data_lines(recipe: Recipe, store: Store) -> list[str]:
    """What a run trains on, and what to know about it, in lines for people."""
    num, height, width, channels = store.images.shape
    num_used, num_out = len(training_subset(num, recipe.data)), num_held_out(num, recipe.data)
    parts = [
        f"data    {num_used:,}{'' if num_used == num else f' of {num:,}'} images "
        f"{height}x{width}x{channels} from {recipe.data.source}"
    ]
    if num_classes := len(store.manifest["class_names"]):
        unused = "" if recipe.model.num_classes else " (unused)"
        parts.append(f"{counted(num_classes, 'class', 'classes')}{unused}")
    if num_out:
        parts.append(f"{num_out:,} held out")
    bad = store.manifest["left_out"]
    if bad:
        parts.append(f"{len(bad):,} unreadable skipped")
    lines = [", ".join(parts)]
    if num_out > MOST_HELD_OUT * num:
        share = 100 * num_out / num
        lines.append(f"  note: {share:.0f} % of the images are held out: lower data.held_out")
    lines += [f"  note: {printable(note)}" for note in store.manifest["notes"]]
    if bad:
        lines.append(f"  skipped: {listed_unreadable(bad, most=3)}")
        if (cached := store_folder(store.manifest["key"])).is_dir():
            lines.append(f"  to read them again, remove {cached}")
    return lines


def time_text(budget: Budget, flops: int, accelerator: Accelerator) -> str:
    """What a run will take, after a comma: `, in about 8 min`. To be called on every rank.

    Without a budget in hours a guess, for runs of minutes; it errs towards too little.
    """
    if budget.hours:
        return f", in {about(3600 * budget.hours)} with previews and measuring"
    if flops < WORTH_GUESSING:
        return ""
    return f", at best in {about(flops / ThisMachine(accelerator).flops_per_sec())}"


def threads_note(accelerator: Accelerator) -> str | None:
    """What to do where waiting threads would take a busy CPU's time (docs/performance.md)."""
    if accelerator.device.type != "cpu" or "OMP_WAIT_POLICY" in os.environ:
        return None
    return (
        "torch was imported before maskdm, so its threads spin while they wait: on a busy CPU "
        "import maskdm first, or set OMP_WAIT_POLICY=PASSIVE"
    )

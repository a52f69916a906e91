"""Ends a masked stage where the next one gains more: `until: plateau`, as forks of the run show.

A probe trains two forks of the run from its present weights, for the same FLOPs: one goes on in
the stage and then in the next, the other at once in the next. Both end in the next stage, since a
network that has just changed to other patches gains quickly whatever it learned before. They are
scored by the dense loss on held-out images. Nothing of them remains but their losses.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from maskdm.evaluation.dense_loss import dense_losses
from maskdm.evaluation.quick import first_for_losses
from maskdm.files import write_text
from maskdm.images.feed import Feed
from maskdm.images.order import held_out_subset
from maskdm.images.store import Store
from maskdm.models.backbone import Backbone
from maskdm.models.compiling import CompiledForward
from maskdm.models.trained import TrainedModel
from maskdm.recipe import Average, Recipe, Stage
from maskdm.report.facts import decision_text
from maskdm.runs.changes import settled
from maskdm.runs.checkpoint import Plateau, Progress
from maskdm.runs.lines import Line
from maskdm.settings import changed
from maskdm.training.ema import Averages, decay_of, make_average, update_average
from maskdm.training.monitor import Monitor
from maskdm.training.optim import enter_stage, learning_rate
from maskdm.training.plateau import PROBED_IMAGES, Forks, forks_of
from maskdm.training.ready import Ready, make_ready
from maskdm.training.step import draw_batch
from maskdm.training.stop import StopRequest, agreed
from maskdm.training.update import descend
from maskdm.training.work import StageWork

WARMUP_PART = 5  # of a fork's steps, one in so many is warm-up at most
NOISE = 2.0  # standard errors of a difference that decides
# Of a fork's last steps: raw weights are noisy, and the stage's own average would hardly move.
FORKS_AVERAGE = Average(kind="power", width=0.1)


class Stopped(Exception):
    """A signal came while forks were trained."""


class Probe:
    """Probes the stages with `until: plateau`, and ends them. To be made and called on every rank.

    Args:
        recipe: planned.
        works: of its stages.
        store: all images of the source.
        accelerator: the engine.
        model: the network itself, on the device.
        wrapped, stepper: network and optimizer as the engine prepared them.
        averages: of the weights.
        feed: the run's batches.
        stop: whether a signal came.
    """

    def __init__(
        self,
        recipe: Recipe,
        works: Sequence[StageWork],
        store: Store,
        accelerator: Accelerator,
        model: Backbone,
        wrapped: nn.Module,
        stepper: AcceleratedOptimizer,
        averages: Averages[Backbone],
        feed: Feed,
        stop: StopRequest,
    ):
        self._works, self._store, self._forks = works, store, dict[tuple[int, int], Forks]()
        self._accelerator, self._feed, self._averages = accelerator, feed, averages
        self._model, self._wrapped, self._stepper = model, wrapped, stepper
        self._stop = stop
        num = len(store)
        self._held_out = first_for_losses(held_out_subset(num, recipe.data), num, PROBED_IMAGES)
        self._labels = store.labels if recipe.model.classes else None

    def is_next(self, recipe: Recipe, progress: Progress) -> bool:
        """Whether forks are trained after the next step, so that a checkpoint is due before it."""
        stage = recipe.stages[progress.stage]
        if stage.until == "steps":
            return False
        return progress.stage_step + 1 in self._forks_of(recipe, progress).points

    def look(
        self, recipe: Recipe, progress: Progress, network: CompiledForward, monitor: Monitor
    ) -> Recipe:
        """Probes the present stage where that is due; gives the recipe, other where it ends.

        The forks' FLOPs are added to the progress. They and what the stage saves are settled with
        the next stage, so that the run spends what it would have spent, to within a step.

        Raises Stopped where a signal came meanwhile: the checkpoint before is to be continued.
        """
        number, stage = progress.stage, recipe.stages[progress.stage]
        forks, ends = self._forks_of(recipe, progress), progress.stage_step == stage.steps
        if not ends and progress.stage_step not in forks.points:
            return recipe
        if not ends:
            monitor.show_activity(f"step {progress.step:,}: training forks")
            line = self._probed(recipe, progress, forks, network)
            progress.flops += forks.flops
            progress.probe_flops += forks.flops
            monitor.log_probe({**line, "flops": progress.flops})
            monitor.say(f"  step {progress.step:,}: {decision_text(line)}")
            ends = line["ends"]
        if ends:
            fewer = stage.steps - progress.stage_step
            saved = fewer * self._works[number].step_flops - progress.probe_flops
            more = round(saved / self._works[number + 1].step_flops)
            facts = (number, fewer, more, progress.probe_flops, stage.warmup_steps)
            progress.plateaus.append(Plateau(*facts))
            progress.probe_flops = 0
            recipe = settled(recipe, progress)
        monitor.go_on(recipe, progress)
        return recipe

    def write_lengths(self, run_dir: Path, recipe: Recipe, progress: Progress) -> None:
        """Writes the real length of a stage that has just ended into RUN/recipe.yaml.

        To be called after its checkpoint, which knows it, too: a kill between loses nothing.
        """
        ended = progress.plateaus and progress.plateaus[-1].stage == progress.stage
        if ended and progress.stage_step == recipe.stages[progress.stage].steps:
            write_text(run_dir / "recipe.yaml", recipe.to_yaml())

    def _forks_of(self, recipe: Recipe, progress: Progress) -> Forks:
        key = (progress.stage, recipe.stages[progress.stage].steps)
        if key not in self._forks:
            sizes = (self._works, self._model, len(self._store))
            self._forks[key] = forks_of(recipe, progress.stage, *sizes)
        return self._forks[key]

    def _probed(
        self, recipe: Recipe, progress: Progress, forks: Forks, network: CompiledForward
    ) -> Line:
        """The forks' losses at a step, and whether the stage ends there."""
        stage, after = recipe.stages[progress.stage : progress.stage + 2]
        losses = []
        for masked, whole in ((forks.masked, forks.following), (0, forks.whole)):
            with self._undone(stage):
                losses.append(self._fork(recipe, progress, masked, whole, forks.following, network))
        # Compile for the stage again; the answers are those of its beginning.
        self._ready(recipe, stage, network)
        stays, leaves = losses
        gain = stays - leaves
        mean = float(gain.mean())
        error = float(gain.std() / len(gain) ** 0.5) if len(gain) > 1 else math.inf
        facts = {"stays": float(stays.mean()), "leaves": float(leaves.mean())}
        facts |= {"gain": mean, "gain_error": error}
        return {
            "step": progress.step,
            "stage": stage.name,
            "next": after.name,
            **{key: value if math.isfinite(value) else None for key, value in facts.items()},
            "probe_flops": forks.flops,
            "ends": mean > NOISE * error,  # never where a loss is NaN
        }

    def _fork(
        self,
        recipe: Recipe,
        progress: Progress,
        masked_steps: int,
        whole_steps: int,
        num_averaged: int,
        network: CompiledForward,
    ) -> Tensor:
        """Trains a fork; gives the dense loss of each held-out image: float64 (N,).

        It sees the images and random numbers of the run's coming steps.

        Args:
            masked_steps: of the present stage.
            whole_steps: of the next stage after them, without a decay of the learning rate.
            num_averaged: of these, the last ones, over which the weights are averaged.
        """
        stage, after = recipe.stages[progress.stage : progress.stage + 2]
        model, averages = self._model, self._averages
        step, images = progress.step, progress.images
        if masked_steps:
            ready = self._ready(recipe, stage, network)
        for i in range(progress.stage_step, progress.stage_step + masked_steps):
            self._step(recipe, stage, ready, step, images, learning_rate(stage, i))
            averages.update(model, averages.shares(stage, i))
            step, images = step + 1, images + stage.batch_size

        if after.start_from == "ema":
            model.load_state_dict(averages.main.state_dict())
        self._stepper.optimizer.state = defaultdict(dict)
        enter_stage(self._stepper.optimizer, after)
        warmup = min(after.warmup_steps, num_averaged // WARMUP_PART)
        lengths: dict[str, Any] = {"steps": whole_steps, "warmup": warmup, "restarts": ()}
        short = changed(after, lr_schedule="constant", **lengths)
        ready, average = self._ready(recipe, after, network), make_average(averages.main)
        for i in range(whole_steps):
            self._step(recipe, short, ready, step, images, learning_rate(short, i))
            step, images = step + 1, images + after.batch_size
            if (update := i + 1 - (whole_steps - num_averaged)) > 0:
                update_average(average, model, decay_of(FORKS_AVERAGE, update))

        trained = TrainedModel(average, ready.diffusion)
        held_out = self._store.images[self._held_out]
        labels = None if self._labels is None else self._labels[self._held_out]
        return dense_losses(trained, held_out, labels, recipe.for_previews).mean(1)

    def _step(
        self, recipe: Recipe, stage: Stage, ready: Ready, step: int, images: int, rate: float
    ) -> None:
        """An optimizer step, as in the loop."""
        engine = self._accelerator
        if agreed(engine, step % 10 == 0, self._stop.is_set)[0]:
            raise Stopped
        pixels, labels = self._feed.next(images, stage.batch_size)
        ranks = engine.process_index, engine.num_processes
        batch = draw_batch(pixels, labels, recipe, stage, ready.schedule, step, *ranks)
        parts = (engine, self._model, self._wrapped, self._stepper)
        descend(*parts, stage, ready, batch, rate)

    def _ready(self, recipe: Recipe, stage: Stage, network: CompiledForward) -> Ready:
        silent = (self._accelerator, lambda text: None)
        return make_ready(network, self._model, recipe, stage, *silent)

    @contextlib.contextmanager
    def _undone(self, stage: Stage) -> Iterator[None]:
        """Puts weights, averages, optimizer and loss scaler back after the block, bit for bit."""
        optimizer, scaler = self._stepper.optimizer, self._accelerator.scaler
        networks = [self._model, self._averages.main]
        networks += [] if self._averages.narrow is None else [self._averages.narrow]
        with torch.no_grad():
            kept = [{k: v.clone() for k, v in one.state_dict().items()} for one in networks]
        state, scale = optimizer.state, scaler.state_dict() if scaler else {}
        copies = {
            parameter: {name: value.clone() for name, value in values.items()}
            for parameter, values in state.items()
        }
        optimizer.state = defaultdict(dict, copies)
        try:
            yield
        finally:
            for one, tensors in zip(networks, kept, strict=True):
                one.load_state_dict(tensors)
            optimizer.state = state
            enter_stage(optimizer, stage)
            if scaler:
                scaler.load_state_dict(scale)

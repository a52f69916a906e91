"""The training loop: stages in, a run's folder out. One loop; a stage is data."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from maskdm.engine import make_accelerator
from maskdm.recipe import Recipe
from maskdm.runs.checkpoint import (
    Progress,
    load_checkpoint,
    load_narrow_average,
    prune_checkpoints,
    save_checkpoint,
)
from maskdm.training.checkups import Checkups
from maskdm.training.ema import Averages
from maskdm.training.monitor import Monitor, Remaining
from maskdm.training.optim import enter_stage, learning_rate, make_optimizer
from maskdm.training.planning import (
    Amount,
    RunOptions,
    ThisMachine,
    asked_lengths,
    link_control,
    planned,
    recipe_and_folder,
)
from maskdm.training.probe import Probe, Stopped
from maskdm.training.start import (
    claimed,
    initial_model,
    make_feed,
    newest_checkpoint,
    open_images,
    refuse_recipe,
)
from maskdm.training.step import draw_batch
from maskdm.training.stop import SaveTimer, StopRequest, agreed
from maskdm.training.tick import NonFiniteLoss, Tick, with_way_out
from maskdm.training.update import CompiledForward, make_update
from maskdm.training.work import stage_work


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns.

    Attributes:
        finished: False if a signal stopped the run after saving; calling again continues it.
        ema: the averaged model, on the training device, in evaluation mode.
        checkpoint: the newest checkpoint.
    """

    finished: bool
    ema: nn.Module
    checkpoint: Path


def train(
    recipe: Recipe | str | Path,
    run_dir: str | Path | None = None,
    resume: str = "auto",
    show: bool = True,
    *,
    hours: Amount = None,
    minutes: Amount = None,
    flops: Amount = None,
    images: Amount = None,
    epochs: Amount = None,
    shrink: float = 1.0,
    control: Literal["none", "dense", "unmasked"] = "none",
    control_equal: Literal["flops", "time", "steps"] = "flops",
    change: bool = False,
) -> TrainResult:
    """Runs a recipe's stages in a run's folder, from the start or from its newest checkpoint.

    It leaves what `maskdm train` leaves: checkpoints, metrics, measurements, previews, the exported
    model, the plot (docs/runs.md).

    Args:
        recipe: the settings of the whole run; or the name of a packaged recipe, a YAML file, or a
            run's folder, which is continued.
        run_dir: RUN, made if it does not exist. A run of this recipe in it is continued. None =
            the folder that is continued, or runs/RECIPE-SOURCE.
        resume: `auto` continues; `never` refuses a folder that holds a run.
        show: print to the console.
        hours, minutes, flops, images, epochs: a budget for the whole run, to which the stages are
            scaled; "+2" = on top of what the run in the folder had. At most one.
        shrink: scales the length of all stages, and what depends on it.
        control: `dense` trains the recipe's control instead: its last stage's settings from the
            first step on, without masks; `unmasked`: all stages with their own settings, without
            masks.
        control_equal: what it has in common with the recipe; `unmasked` in each stage.
        change: accept changed learning rates and the like in a run that goes on.

    Raises:
        ValueError: settings, source or folder do not fit; nothing was changed.
        NonFiniteLoss: the loss diverged; the last good checkpoint stays.
        OSError: the disk refused; the last good checkpoint stays.

    Example:
        >>> result = train("photos64", "runs/mine", hours=8)  # doctest: +SKIP
    """
    # Refuse what cannot work before anything is written.
    how = {"shrink": shrink, "control": control, "control_equal": control_equal, "change": change}
    options = RunOptions.of(hours, minutes, flops, images, epochs, **how)
    recipe, run_dir = recipe_and_folder(recipe, run_dir, options)
    accelerator, precision, reason = make_accelerator(recipe.precision)
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    refuse_recipe(recipe, run_dir, num_ranks)
    machine = ThisMachine(accelerator, print if show and rank == 0 else lambda text: None)
    store = open_images(recipe, accelerator, show)
    lengths = asked_lengths(recipe, options)
    recipe = planned(recipe, options, run_dir, store, machine)
    model, transferred = initial_model(recipe, run_dir, store)
    works = stage_work(recipe, model)
    checkups = Checkups(recipe, run_dir, store, works, accelerator)

    with contextlib.ExitStack() as stack:
        # Claim the folder, and say what will be done.
        stack.enter_context(
            claimed(run_dir, recipe, resume, store, accelerator, precision, options.change, lengths)
        )
        remaining = Remaining(recipe, works, model, len(store))
        monitor = Monitor(run_dir, remaining, accelerator.is_main_process, show)
        stack.enter_context(contextlib.closing(monitor))
        monitor.introduce(recipe, store, model, accelerator, f"{precision} ({reason})")
        for text in transferred:
            monitor.say(text)
        if accelerator.is_main_process:
            link_control(run_dir, options)
        checkups.begin(model, monitor)

        # Give the model its device and its average, and take up the newest whole checkpoint.
        model = model.to(accelerator.device)
        averages = Averages(model)
        average = averages.main
        optimizer = make_optimizer(model, recipe.stages[0])
        progress, folder = Progress(), run_dir / "checkpoints"
        checkpoint = newest_checkpoint(accelerator, folder, monitor)
        if checkpoint is not None:
            progress = load_checkpoint(checkpoint, model, average, optimizer)
            averages.narrow = load_narrow_average(checkpoint, average)
            finished = progress.step == recipe.num_steps
            monitor.say(f"{'finished with' if finished else 'continuing after'} {checkpoint.name}")
        network = CompiledForward(model)
        wrapped, stepper = accelerator.prepare(model, optimizer)
        if accelerator.scaler is not None and progress.scaler:
            accelerator.scaler.load_state_dict(progress.scaler)
        feed = stack.enter_context(contextlib.closing(make_feed(recipe, store, accelerator)))
        monitor.say(f"feed    {feed.how}")
        stop, timer = stack.enter_context(StopRequest()), SaveTimer(recipe.checkpoint_minutes)
        parts = (accelerator, model, wrapped, stepper, averages)
        probe = Probe(recipe, works, store, *parts, feed, stop)
        monitor.start(progress, recipe)
        if checkpoint is not None:  # a kill may have come between saving and looking
            checkups.catch_up(progress, average, monitor)

        while True:
            # Hand the weights over to the next stage, which begins with a fresh optimizer.
            stage = recipe.stages[progress.stage]
            if progress.stage_step == stage.steps:
                assert checkpoint is not None  # each stage's end is one
                if progress.stage + 1 == len(recipe.stages):
                    checkups.finish(average, monitor)
                    return TrainResult(True, average, checkpoint)
                progress.stage, progress.stage_step = progress.stage + 1, 0
                stage = recipe.stages[progress.stage]
                if stage.start_from == "ema":
                    model.load_state_dict(average.state_dict())
            if progress.stage_step == 0:
                optimizer.state.clear()
            averages.enter_stage(stage, model, begins=progress.stage_step == 0)
            enter_stage(optimizer, stage)
            work = works[progress.stage]
            intervals = (recipe.log_every, recipe.checkpoint_every)
            log_every, checkpoint_every = map(recipe.every, intervals)
            monitor.introduce_stage(recipe, progress, work)
            tick = Tick(progress)
            with tick.excluded_from_speed():
                update = make_update(network, parts, recipe, stage, monitor.say)
            schedule = update.ready.schedule

            while progress.stage_step < stage.steps:
                # Fetch this rank's share of the batch.
                with tick.waiting():
                    pixels, labels = feed.next(progress.images, stage.batch_size)

                # Hide patches and add noise; all of it depends on (seed, rank, step) alone.
                batch = draw_batch(
                    pixels, labels, recipe, stage, schedule, progress.step, rank, num_ranks
                )

                # Follow the gradient of the denoising loss on the visible patches.
                loss_and_norm = update(batch, progress.stage_step)

                # Count what was done.
                tick.add(loss_and_norm)
                progress.step += 1
                progress.stage_step += 1
                progress.images += stage.batch_size
                progress.flops += work.step_flops

                # Until a plateau: let forks tell at set points whether the stage ends here.
                if stage.until == "plateau":
                    with tick.excluded_from_speed():
                        try:
                            recipe = probe.look(recipe, progress, network, monitor)
                        except Stopped:
                            assert checkpoint is not None  # of the step before
                            monitor.say(f"stopped; {checkpoint} is saved: call again to go on")
                            return TrainResult(False, average, checkpoint)
                        stage = recipe.stages[progress.stage]
                        checkups.replan(recipe)

                # At set points read the losses and log them.
                is_end = progress.stage_step == stage.steps
                is_tick = is_end or progress.step % log_every == 0
                may_ask = is_tick or progress.step % 10 == 0
                stopping, overdue = agreed(accelerator, may_ask, stop.is_set, timer.is_due)
                saving = is_end or stopping or overdue or progress.step % checkpoint_every == 0
                # So that failing loses nothing.
                saving = saving or checkups.measures_at(progress) or probe.is_next(recipe, progress)
                showing = monitor.is_due
                if is_tick or saving or (showing and num_ranks == 1):
                    try:
                        tick.read(accelerator)
                    except NonFiniteLoss as error:
                        raise with_way_out(error, checkpoint, recipe, stage) from None
                if is_tick:
                    line = {"step": progress.step, "stage": stage.name, **tick.line()}
                    line |= {"lr": learning_rate(stage, progress.stage_step - 1)}
                    with tick.paused():
                        monitor.log({**line, "hidden": work.hidden})
                    if note := feed.note_waiting(line["data_wait"]):
                        monitor.say(f"  {note}")

                if showing:
                    monitor.advance(progress, stage, tick.recent_loss)

                # Keep averages, to be measured after training, or to make others of.
                if accelerator.is_main_process:
                    with tick.paused():
                        averages.keep(run_dir, recipe, stage, progress)

                # Save, and leave on request; else measure and draw what is due.
                with tick.paused():
                    if saving:
                        scaler = accelerator.scaler
                        progress.scaler = scaler.state_dict() if scaler else {}
                        checkpoint = folder / f"step-{progress.step:08d}"
                        if accelerator.is_main_process:
                            state = (model, average, optimizer, averages.narrow)
                            save_checkpoint(folder, progress, *state, is_stage_end=is_end)
                            prune_checkpoints(folder, checkpoint, recipe.keep_checkpoints)
                            probe.write_lengths(run_dir, recipe, progress)
                        accelerator.wait_for_everyone()
                        timer.restart()
                        is_last = is_end and progress.stage + 1 == len(recipe.stages)
                        if stopping and not is_last:
                            monitor.say(f"stopped after saving {checkpoint}: call again to go on")
                            return TrainResult(False, average, checkpoint)
                    checkups.look(progress, average, monitor)
            monitor.conclude_stage(progress, stage, tick.recent_loss)
            del update  # a recorded step keeps its memory

"""The training loop: stages in, checkpoints out. One loop; a stage is data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from maskdm.diffusion.schedule import schedule_of
from maskdm.engine import main_first, make_accelerator
from maskdm.images.feed import Feed
from maskdm.images.order import ImageOrder, training_subset
from maskdm.images.store import Store, open_store
from maskdm.masks import num_visible
from maskdm.models.build import Backbone, build_model
from maskdm.models.compiling import CompiledForward
from maskdm.models.trained import TrainedModel
from maskdm.recipe import Recipe, Stage
from maskdm.tokens import grid_shape
from maskdm.training.checkpoint import (
    Progress,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from maskdm.training.checks import (
    refuse_run_among_images,
    refuse_uneven_batches,
    refuse_unfit_labels,
)
from maskdm.training.ema import make_average, restart_average, update_average
from maskdm.training.find import find_checkpoint
from maskdm.training.load import load_model
from maskdm.training.monitor import Monitor, clock, environment
from maskdm.training.narration import introduce, stage_line
from maskdm.training.optim import enter_stage, learning_rate, make_optimizer
from maskdm.training.ready import make_ready
from maskdm.training.run_folder import claimed_run_folder
from maskdm.training.set_points import Measure, Preview, SetPoints
from maskdm.training.step import backward, draw_batch
from maskdm.training.stop import StopRequest
from maskdm.training.tick import NonFiniteLoss, Tick
from maskdm.training.transfer import transfer_weights

MakeMeasure = Callable[[Store], Measure]
"""Makes ready what measures, given all images; called on every rank before anything is written."""


@dataclass(frozen=True)
class TrainResult:
    """What `train` leaves behind.

    Attributes:
        finished: False if a signal stopped the run after saving; calling again continues it.
        ema: the averaged model, on the training device, in evaluation mode.
        checkpoint: the newest checkpoint.
    """

    finished: bool
    ema: Backbone
    checkpoint: Path


def train(
    recipe: Recipe,
    run_dir: Path,
    resume: str = "auto",
    preview: Preview | None = None,
    make_measure: MakeMeasure | None = None,
    show: bool = True,
) -> TrainResult:
    """Runs a recipe's stages in a run's folder, from the start or from its newest checkpoint.

    Args:
        recipe: the settings of the whole run.
        run_dir: RUN; made if it isn't there. A run of an equal recipe in it is continued.
        resume: `auto` continues; `never` refuses a folder that holds a run.
        preview: draws preview grids; None = none are drawn.
        make_measure: makes what measures the averaged model at set points; None = nothing does.
        show: print to the console.

    Raises:
        ValueError: settings, source or folder don't fit; nothing was changed.
        NonFiniteLoss: the loss diverged; the last good checkpoint stays.
        OSError: the disk refused; the last good checkpoint stays.
    """
    # Refuse what cannot work before anything is written.
    grid = grid_shape(*recipe.data.shape[:2], recipe.model.patch_size)
    visible_counts = [num_visible(stage.mask, grid) for stage in recipe.stages]
    refuse_run_among_images(recipe.data.source, run_dir)
    accelerator, precision, reason = make_accelerator(recipe.precision)
    refuse_uneven_batches(recipe, accelerator.num_processes)
    store = _agreed_store(recipe, accelerator, show)
    refuse_unfit_labels(recipe, store)
    subset = training_subset(len(store), recipe.data)
    measure = make_measure(store) if make_measure and recipe.evaluate_every else None
    class_names = store.manifest["class_names"] if recipe.model.num_classes else None
    model = build_model(recipe, class_names)  # the same weights on every rank and in every run
    transferred = _start_from(recipe, run_dir, model)
    stack = contextlib.ExitStack()
    if accelerator.is_main_process:
        facts = environment(accelerator.device, accelerator.num_processes)
        facts |= {"precision": precision, "images_sha256": store.manifest["sha256"]}
        facts["labels_sha256"] = store.labels_sha256() if class_names else None
        stack.enter_context(claimed_run_folder(run_dir, recipe, resume, facts, class_names))
    accelerator.wait_for_everyone()

    # Give the model its place and its average.
    model = model.to(accelerator.device)
    average = make_average(model)
    step_flops = [
        3 * model.forward_flops(count) * stage.batch_size  # forward, and twice that backward
        for count, stage in zip(visible_counts, recipe.stages, strict=True)
    ]
    hidden = [1 - count / (grid[0] * grid[1]) for count in visible_counts]
    total_flops = sum(f * s.steps for f, s in zip(step_flops, recipe.stages, strict=True))
    monitor = Monitor(run_dir, total_flops, accelerator.is_main_process, show)
    introduce(monitor, recipe, store, model, accelerator, f"{precision} ({reason})", total_flops)
    for line in transferred:
        monitor.say(line)

    # Take up the newest whole checkpoint, if there is one.
    progress, folder = Progress(), run_dir / "checkpoints"
    optimizer = make_optimizer(model.parameters(), recipe.stages[0])
    checkpoint = _agreed_checkpoint(accelerator, folder, monitor)
    if checkpoint is not None:
        progress = load_checkpoint(checkpoint, model, average, optimizer)
        finished = progress.step == sum(stage.steps for stage in recipe.stages)
        monitor.say(f"{'finished with' if finished else 'continuing after'} {checkpoint.name}")
    network = CompiledForward(model)
    wrapped, stepper = accelerator.prepare(model, optimizer)
    if accelerator.scaler is not None and progress.scaler:
        accelerator.scaler.load_state_dict(progress.scaler)
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    feed = Feed(
        store,
        subset,
        ImageOrder(len(subset), recipe.seed),
        rank,
        num_ranks,
        accelerator.device,
        recipe.data.resident,
        with_labels=recipe.model.num_classes > 0,
    )
    monitor.say(f"feed    {feed.how}")
    points = SetPoints(recipe, run_dir, hidden, accelerator, monitor, measure, preview)

    with stack, StopRequest() as stop, contextlib.closing(monitor), contextlib.closing(feed):
        monitor.start(progress.step, progress.flops)
        if checkpoint is not None:  # a kill may have come between saving and looking
            diffusion = recipe.diffusion_of(recipe.stages[progress.stage])
            points.catch_up(progress, TrainedModel(average, diffusion))
        while True:
            # Hand the weights over to the next stage, which begins with a fresh optimizer.
            stage = recipe.stages[progress.stage]
            if progress.stage_step == stage.steps:
                assert checkpoint is not None  # each stage's end is one
                if progress.stage + 1 == len(recipe.stages):
                    return TrainResult(True, average, checkpoint)
                progress.stage, progress.stage_step = progress.stage + 1, 0
                stage = recipe.stages[progress.stage]
                if stage.start_from == "ema":
                    model.load_state_dict(average.state_dict())
            if progress.stage_step == 0:
                optimizer.state.clear()
                restart_average(average, model)
            enter_stage(optimizer, stage)
            diffusion = recipe.diffusion_of(stage)
            schedule = schedule_of(diffusion, recipe.data.size)
            monitor.say(
                stage_line(
                    recipe, progress, grid, hidden[progress.stage], step_flops[progress.stage]
                )
            )
            if (kept := stage.ema_decay**stage.steps) > 0.1:
                monitor.say(
                    f"  note: ema_decay {stage.ema_decay:g} keeps {100 * kept:.0f} % of the "
                    f"stage's first weights over {stage.steps:,} steps: try a lower one"
                )
            tick = Tick(progress)
            with tick.unhurried():
                micro_batch_size = make_ready(
                    network, model, recipe, stage, schedule, accelerator, monitor.say
                )

            while progress.stage_step < stage.steps:
                # Fetch this rank's share of the batch.
                with tick.waiting():
                    images, labels = feed.next(progress.images, stage.batch_size)

                # Hide patches and add noise; all of it depends on (seed, rank, step) alone.
                batch = draw_batch(
                    images, labels, recipe, stage, schedule, progress.step, rank, num_ranks
                )

                # Follow the gradient of the denoising loss on the visible patches.
                for group in stepper.param_groups:
                    group["lr"] = learning_rate(stage, progress.stage_step)
                loss = backward(accelerator, wrapped, batch, schedule, diffusion, micro_batch_size)
                grad_norm = _clip_gradients(accelerator, model, stage)
                stepper.step()
                stepper.zero_grad()
                update_average(average, model, stage.ema_decay)

                # Count what was done.
                tick.add(loss, grad_norm)
                progress.step += 1
                progress.stage_step += 1
                progress.images += stage.batch_size
                progress.flops += step_flops[progress.stage]

                # At set points read the losses, log, save, leave if asked to, measure and draw.
                is_end = progress.stage_step == stage.steps
                is_tick = is_end or progress.step % recipe.log_every == 0
                stopping = stop.agreed(accelerator, may_ask=is_tick or progress.step % 10 == 0)
                saving = is_end or stopping or progress.step % recipe.checkpoint_every == 0
                saving = saving or points.measures_at(progress)  # so that failing loses nothing
                if is_tick or saving:
                    _read(tick, accelerator, checkpoint, recipe, stage)
                if is_tick:
                    where = {"step": progress.step, "stage": stage.name}
                    how = {"lr": learning_rate(stage, progress.stage_step - 1)}
                    record = {**where, **tick.line(), **how, "hidden": hidden[progress.stage]}
                    monitor.log(record)
                    if note := feed.note_waiting(record["data_wait"]):
                        monitor.say(f"  {note}")
                if saving:
                    with tick.paused():
                        progress.scaler = (
                            accelerator.scaler.state_dict() if accelerator.scaler else {}
                        )
                        checkpoint = folder / f"step-{progress.step:08d}"
                        if accelerator.is_main_process:
                            save_checkpoint(folder, progress, model, average, optimizer, is_end)
                            prune_checkpoints(folder, checkpoint, recipe.keep_checkpoints)
                        accelerator.wait_for_everyone()
                    is_last = is_end and progress.stage + 1 == len(recipe.stages)
                    if stopping and not is_last:
                        monitor.say(
                            f"stopped on request after saving {checkpoint}; call again to go on"
                        )
                        return TrainResult(False, average, checkpoint)
                with tick.paused():
                    points.look(progress, TrainedModel(average, diffusion))
            monitor.say(f"  done after {clock(progress.elapsed_sec)} of training")


def _agreed_store(recipe: Recipe, accelerator: Accelerator, show: bool) -> Store:
    """The images: the first rank builds their store if need be; all have the same, or all refuse.

    Raises ValueError on every rank.
    """
    store = main_first(
        lambda: open_store(recipe.data, progress=show and accelerator.is_main_process)
    )
    (sha256,) = broadcast_object_list([store.manifest["sha256"]])
    if store.manifest["sha256"] != sha256:
        raise ValueError(
            f"nodes have made different images of {recipe.data.source} (other versions of Pillow, "
            "perhaps): pack them once with maskdm pack, to a disk that all can read"
        )
    return store


def _start_from(recipe: Recipe, run_dir: Path, model: Backbone) -> list[str]:
    """Gives the model the weights that `init` names, unless a run goes on; says what they were."""
    if recipe.init is None:
        return []
    (checkpoint,) = broadcast_object_list([find_checkpoint(run_dir / "checkpoints", _say_nothing)])
    if checkpoint is not None:
        return []
    source = load_model(recipe.init)
    try:
        lines = transfer_weights(source.trained.model, model)
    except ValueError as error:
        raise ValueError(f"init {recipe.init}: {error}") from None
    before, now = source.trained.diffusion, recipe.diffusion_of(recipe.stages[0])
    for name in ("schedule", "base_size", "prediction"):
        if getattr(before, name) != getattr(now, name):
            lines.append(f"{name} {getattr(before, name)} -> {getattr(now, name)}")
    return [f"init    from {source.found.folder}: {lines[0]}", *(f"  {line}" for line in lines[1:])]


def _say_nothing(text: str) -> None:
    """For what is said elsewhere."""


def _agreed_checkpoint(accelerator: Accelerator, folder: Path, monitor: Monitor) -> Path | None:
    """The newest whole checkpoint, as the first rank sees it: all start from the same."""
    found = None
    if accelerator.is_main_process:
        found = find_checkpoint(folder, note=lambda text: monitor.say(f"note: {text}"))
    (checkpoint,) = broadcast_object_list([found])
    if checkpoint is not None and not checkpoint.is_dir():
        raise ValueError(f"{checkpoint} is not there: all nodes need one shared disk for --out")
    return checkpoint


def _clip_gradients(accelerator: Accelerator, model: nn.Module, stage: Stage) -> Tensor:
    """Clips the gradient where the stage says so; gives its norm before, on the device."""
    if stage.clip is not None:
        return accelerator.clip_grad_norm_(model.parameters(), stage.clip).detach()
    accelerator.unscale_gradients()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return nn.utils.get_total_norm(gradients)


def _read(
    tick: Tick, accelerator: Accelerator, checkpoint: Path | None, recipe: Recipe, stage: Stage
) -> None:
    """Reads the tick; a loss that is no number gets the way out added to its message."""
    try:
        tick.read(accelerator)
    except NonFiniteLoss as error:
        saved = f"the last good checkpoint is {checkpoint}" if checkpoint else "nothing was saved"
        tries = ["a lower lr", "more warmup_steps"]
        tries += [] if stage.clip else ["clip 1.0"]
        if recipe.diffusion_of(stage).schedule == "linear":
            tries += ["schedule cosine (90 % masking diverges with linear)"]
        raise NonFiniteLoss(f"{error}; {saved}; try {', '.join(tries)}") from None

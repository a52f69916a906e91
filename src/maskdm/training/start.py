"""What happens before the first step: refusals, images, initial weights, the run's folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from maskdm.diffusion.schedule import schedule_of
from maskdm.engine import from_main, main_first
from maskdm.files import refuse_unwritable
from maskdm.images.feed import Feed
from maskdm.images.open import refuse_inside
from maskdm.images.order import ImageOrder, training_subset
from maskdm.images.store import Store, open_store
from maskdm.models.backbone import Backbone
from maskdm.models.build import build_model
from maskdm.recipe import Recipe
from maskdm.runs.environment import environment
from maskdm.runs.find import damage, find_checkpoint
from maskdm.runs.folder import claimed_run_folder
from maskdm.runs.load import load_model
from maskdm.sampling.samplers import refuse_settings
from maskdm.training.monitor import Monitor
from maskdm.training.trackers import refuse_trackers
from maskdm.training.transfer import transfer_weights
from maskdm.training.work import stage_work


def refuse_recipe(recipe: Recipe, run_dir: Path, num_ranks: int) -> None:
    """Raises ValueError for a recipe that cannot be trained, or sampled when it is trained.

    Also for a run whose checkpoints are all unreadable: it would begin anew, and remove them. To be
    called on every rank.
    """
    stage_work(recipe)  # masks that the grid cannot have
    refuse_settings(schedule_of(recipe.final_diffusion, recipe.data.size), recipe.sampling)
    refuse_inside(recipe.data.source, run_dir, "--out")
    refuse_unwritable(run_dir, "--out", is_folder=True)
    refuse_trackers(recipe.log_to)
    from_main(lambda: _refuse_unreadable(run_dir / "checkpoints"))
    for i, stage in enumerate(recipe.stages):
        if stage.batch_size % num_ranks:
            below = stage.batch_size // num_ranks * num_ranks
            raise ValueError(
                f"stages.{i}.batch_size {stage.batch_size} does not divide among {num_ranks} "
                f"devices: use {f'{below} or ' if below else ''}{below + num_ranks}"
            )


def _refuse_unreadable(folder: Path) -> None:
    found = [path.name for path in sorted(folder.glob("step-*"))]
    if found and find_checkpoint(folder) is None:
        raise ValueError(
            f"none of the checkpoints in {folder} can be read ({found[-1]}: "
            f"{damage(folder / found[-1])}): bring them back, or remove them to begin anew"
        )


def open_images(recipe: Recipe, accelerator: Accelerator, show: bool) -> Store:
    """The images: the first rank builds their store if need be, and all ranks have the same.

    Raises ValueError on every rank, also where the model's classes are not those of the images.
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
    training_subset(len(store), recipe.data)  # refuses to hold out all of them
    wanted, names = recipe.model.num_classes, store.manifest["class_names"]
    if wanted not in ("auto", 0, len(names)):
        raise ValueError(
            f"model.num_classes is {wanted}, but {recipe.data.source} has {len(names)} classes: "
            f"use {len(names)}" + ("" if names else " (class folders root/class/x.png give labels)")
        )
    return store


def initial_model(recipe: Recipe, run_dir: Path, store: Store) -> tuple[Backbone, list[str]]:
    """The model with its first weights, the same on every rank and in every run of the recipe.

    Returns:
        The model, on the CPU; what was taken from the recipe's `init`, in lines for people.

    Raises:
        ValueError: sizes that the network cannot have, or an `init` that does not fit.
    """
    model = build_model(recipe, _class_names(recipe, store))
    if recipe.init is None:
        return model, []
    if from_main(lambda: find_checkpoint(run_dir / "checkpoints")) is not None:
        # A run that is continued has weights of its own.
        return model, []
    source = load_model(recipe.init, weights=recipe.init_weights)
    try:
        lines = transfer_weights(source.trained.model, model)
    except ValueError as error:
        raise ValueError(f"init {recipe.init}: {error}") from None
    before, now = source.trained.diffusion, recipe.diffusion_of(recipe.stages[0])
    for name in ("schedule", "base_size", "prediction"):
        if getattr(before, name) != getattr(now, name):
            lines.append(f"{name} {getattr(before, name)} -> {getattr(now, name)}")
    kind = {"ema": "averaged", "raw": "raw"}[recipe.init_weights]
    first = f"init    {kind} weights of {source.location.folder}: {lines[0]}"
    return model, [first, *(f"  {line}" for line in lines[1:])]


@contextlib.contextmanager
def claimed(
    run_dir: Path,
    recipe: Recipe,
    resume: str,
    store: Store,
    accelerator: Accelerator,
    precision: str,
    change: bool,
    lengths: dict[str, Any],
) -> Iterator[None]:
    """Claims RUN for this process, on the first rank: see `claimed_run_folder`.

    Args:
        recipe: with all numbers.
        lengths: what was asked for (`asked_lengths`).
    """
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            class_names = _class_names(recipe, store)
            facts = environment(accelerator.device, accelerator.num_processes)
            facts |= {"precision": precision, "images_sha256": store.manifest["sha256"]}
            facts["lengths"] = lengths
            facts["labels_sha256"] = store.labels_sha256() if class_names else None
            claim = claimed_run_folder(run_dir, recipe, resume, facts, class_names, change)
            stack.enter_context(claim)
        accelerator.wait_for_everyone()
        yield


def newest_checkpoint(accelerator: Accelerator, folder: Path, monitor: Monitor) -> Path | None:
    """The newest whole checkpoint, as the first rank sees it: all start from the same."""
    found = None
    if accelerator.is_main_process:
        found = find_checkpoint(folder, note=lambda text: monitor.say(f"note: {text}"))
    (checkpoint,) = broadcast_object_list([found])
    if checkpoint is not None and not checkpoint.is_dir():
        raise ValueError(f"{checkpoint} does not exist: all nodes need one shared disk for --out")
    return checkpoint


def make_feed(recipe: Recipe, store: Store, accelerator: Accelerator) -> Feed:
    """Batches of this rank's training images, in the endless order of the recipe's seed."""
    subset = training_subset(len(store), recipe.data)
    return Feed(
        store,
        subset,
        ImageOrder(len(subset), recipe.seed),
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.device,
        recipe.data.resident,
        with_labels=recipe.model.classes > 0,
    )


def _class_names(recipe: Recipe, store: Store) -> list[str] | None:
    return store.manifest["class_names"] if recipe.model.classes else None

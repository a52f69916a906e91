"""From what was asked for to what is done: the recipe with all numbers, for this run's folder."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskdm.engine import from_main
from maskdm.families import MODEL_SIZES
from maskdm.files import expanded, write_text
from maskdm.images.order import training_subset
from maskdm.images.store import Store
from maskdm.models.build import weightless_model
from maskdm.recipe import Budget, Recipe
from maskdm.recipe_files import load_recipe, recipe_names
from maskdm.runs.changes import extended, settled, with_fixed_warmups
from maskdm.runs.checkpoint import Progress
from maskdm.runs.find import CONTROL
from maskdm.runs.folder import first_lengths, progress_of
from maskdm.settings import changed
from maskdm.training.budget import (
    INTERVALS,
    LENGTHS_OF_STAGE,
    MANY_IMAGES,
    lengths_of,
    longer,
    scaled,
    with_steps,
)
from maskdm.training.controls import dense_control, unmasked_control
from maskdm.training.plateau import refuse_plateaus
from maskdm.training.speed import Machine
from maskdm.training.speed import ThisMachine as ThisMachine
from maskdm.training.work import stage_work, total_flops

# Floating-point operations for each token that a model sees are 6 a parameter; tokens for each
# parameter that it should see. U-ViT-S has 370 of them in the paper, language models 20.
TOKENS_PER_PARAMETER = 100

CONTROLS = {"dense": dense_control, "unmasked": unmasked_control}
Amount = float | str | None  # of a budget; "+2" = two more


@dataclass(frozen=True)
class RunOptions:
    """How a recipe is run, besides its settings.

    Attributes:
        budget: of the whole run, in place of the recipe's.
        more: whether the budget is meant on top of what the run in the folder had.
        shrink: scales the length of the run.
        control: one without masks instead of the recipe: `dense_control`, or `unmasked_control`.
        control_equal: what the control has in common with it: flops, time or steps.
        change: whether settings may change that change the weights of a run that goes on.
    """

    budget: Budget = Budget()
    more: bool = False
    shrink: float = 1.0
    control: str = "none"
    control_equal: str = "flops"
    change: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.shrink < math.inf:
            raise ValueError(f"shrink {self.shrink:g}: expected a number above 0")

    @classmethod
    def of(
        cls,
        hours: Amount = None,
        minutes: Amount = None,
        flops: Amount = None,
        images: Amount = None,
        epochs: Amount = None,
        **others: Any,
    ) -> RunOptions:
        """Options with a budget as a user gives it; `others` by their names here.

        Raises ValueError as `budget_of`, and for a `shrink` that is not a number above 0.
        """
        budget, more = budget_of(hours, minutes, flops, images, epochs)
        return cls(budget, more, **others)


def budget_of(
    hours: Amount, minutes: Amount, flops: Amount, images: Amount, epochs: Amount
) -> tuple[Budget, bool]:
    """A budget, and whether it is meant on top of what a run had. None = not given.

    Raises ValueError for more than one, and what is not a number above 0.
    """
    given = {"hours": hours, "minutes": minutes, "flops": flops, "images": images, "epochs": epochs}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"give one budget, not {' and '.join(given)}")
    if not given:
        return Budget(), False
    ((name, value),) = given.items()
    try:
        amount = float(value or 0)
    except ValueError:
        amount = math.nan
    if not 0 < amount < math.inf:
        raise ValueError(f"{name} {value!r}: expected a number above 0, or +2 for two more")
    more = isinstance(value, str) and value.strip().startswith("+")
    return Budget(hours=amount / 60) if name == "minutes" else Budget(**{name: amount}), more


def recipe_and_folder(
    recipe: Recipe | str | Path, run_dir: str | Path | None, options: RunOptions
) -> tuple[Recipe, Path]:
    """The recipe and the folder that are meant.

    Args:
        recipe: a recipe, its name or file, or a run's folder with its own.
        run_dir: None = the run's folder that was named, or what `named_folder` says.

    Raises ValueError where there is no such recipe, or no name to be made of it.
    """
    name = "run" if isinstance(recipe, Recipe) else str(recipe)
    if not isinstance(recipe, Recipe):
        own = expanded(recipe) / "recipe.yaml"
        recipe = load_recipe(own if own.is_file() else recipe)
    return recipe, expanded(run_dir or named_folder(name, recipe, options.control))


def named_folder(name: str, recipe: Recipe, control: str = "none") -> Path:
    """Where a run goes that was given no folder.

    Args:
        name: of the recipe or its file: runs/NAME-SOURCE, or runs/NAME where the source is the
            packaged recipe's own or says no more. Or a run's folder: itself.
        control: other than `none` = a control, in a folder beside its run's.
    """
    run = expanded(name)
    if (run / "recipe.yaml").is_file():
        return run if control == "none" else Path(f"{run}-{control}")
    source = Path(recipe.data.source.rstrip("/").split("://")[-1]).name
    source = re.sub(r"[^\w-]+", "-", source.split(".")[0]).strip("-")
    stem = Path(name).stem
    is_own = name in recipe_names() and load_recipe(name).data.source == recipe.data.source
    parts = [stem, *([] if is_own or not source or source in stem else [source])]
    return Path("runs") / "-".join([*parts, *([] if control == "none" else [control])])


def planned(
    recipe: Recipe,
    options: RunOptions,
    run_dir: Path,
    store: Store,
    machine: Machine,
) -> Recipe:
    """The recipe with all numbers: of the run in the folder, or computed from images and budget.

    To be called on every rank.

    Raises ValueError for a budget that is too small, or on a run that has another kind of budget,
    and for classes that only some images have.
    """
    num_train = len(training_subset(len(store), recipe.data))
    own = run_dir / "recipe.yaml"
    there = from_main(lambda: load_recipe(own) if own.is_file() else None)
    progress = from_main(lambda: progress_of(run_dir))
    # Where nothing was saved yet, there is nothing to continue: all is planned anew.
    before = there if options.more or progress is not None else None
    progress = progress or Progress()
    if options.more and (before is None or options.control != "none"):
        raise ValueError(
            f"{run_dir} holds no run that could grow: give the budget without a plus"
            if before is None
            else "a control has the budget of its recipe: extend the run, then train its control"
        )
    if options.control != "none":
        return _control(recipe, options, before, run_dir, progress, store, machine)
    if before is not None:
        numbers = (len(store), num_train)
        result = _continued(recipe, before, options, run_dir, progress, numbers, machine)
        pairs = zip(before.stages, result.stages, strict=False)
        if any((old.until, new.until) == ("steps", "plateau") for old, new in pairs):
            refuse_plateaus(result, len(store))
        return result
    recipe = with_classes(recipe, store)
    # Forks that another run made are not made again.
    stages = [stage.model_dump() | {"probe_flops": 0} for stage in recipe.stages]
    result = with_numbers(changed(recipe, stages=stages), options, len(store), num_train, machine)
    is_own = there is not None and recipe.is_planned and recipe.budget == there.budget
    if is_own and not options.budget.is_set:  # the folder's own recipe, planned for its budget
        result = changed(result, budget=recipe.budget.model_dump())
    return result


def with_numbers(
    recipe: Recipe,
    options: RunOptions,
    num_images: int | None,
    num_train: int | None,
    machine: Machine,
) -> Recipe:
    """A recipe with classes known, of the requested length; or its control.

    Args:
        num_images: of the source; `num_train` of them are trained on. None = unknown.

    Raises ValueError for a budget that is too small, or in epochs of unknown images, and for
    stages that cannot be probed for their plateau.
    """
    draft = scaled(recipe, options.shrink) if options.shrink != 1 else recipe
    if options.budget.is_set:
        draft = changed(draft, budget=options.budget.model_dump())
    if num_train is None and draft.budget.epochs:
        raise ValueError(
            f"{draft.data.source} cannot be counted, so a budget in epochs means nothing: use "
            "--images"
        )
    num_images, num_train = num_images or MANY_IMAGES, num_train or MANY_IMAGES
    draft = with_size(draft, num_train, machine)
    result = with_steps(draft, num_images, num_train, machine, rescale=options.budget.is_set)
    if options.control != "none":
        return CONTROLS[options.control](result, options.control_equal, machine)
    refuse_plateaus(result, num_images)
    return result


def with_classes(recipe: Recipe, store: Store) -> Recipe:
    """The recipe with the number of classes of the images, where it is `auto`.

    Raises ValueError where some images have a class and others don't.
    """
    if recipe.model.num_classes != "auto":
        return recipe
    if store.manifest.get("partly_labelled"):
        raise ValueError(
            f"some images of {recipe.data.source} have a class and some have none: sort all into "
            "class folders, or train without classes, --model.num-classes 0"
        )
    num = len(store.manifest["class_names"])
    # A single class tells nothing.
    return changed(recipe, model=changed(recipe.model, num_classes=num if num > 1 else 0))


def with_size(recipe: Recipe, num_train: int, machine: Machine) -> Recipe:
    """The recipe with a model that fits images and budget, where its size is `auto`.

    The largest of `MODEL_SIZES` that sees 100 tokens for each of its parameters within the budget,
    and has no more parameters than the training images have values; else the smallest. Parameters
    are those of a U-ViT of that size, for any kind.
    """
    if recipe.model.size is None:
        return recipe
    if recipe.model.size != "auto":
        return with_model_size(recipe, recipe.model.size)
    flops = flops_of_budget(recipe, num_train, machine)
    values = num_train * math.prod(recipe.data.shape)
    most = min(math.sqrt(flops / (6 * TOKENS_PER_PARAMETER)), values)
    fitting = [name for name in MODEL_SIZES if MODEL_SIZES[name].num_params <= most]
    return with_model_size(recipe, fitting[-1] if fitting else next(iter(MODEL_SIZES)))


def with_model_size(recipe: Recipe, size: str) -> Recipe:
    """The recipe with a model of a size by its name.

    Learning rates are those of width 96, and fall with the width, as Adam's should (Yang et al.
    2022, Table 3: 1 / width for the matrices inside).
    """
    row = MODEL_SIZES[size]
    return _with_sizes(recipe, row.embed_dim, row.depth, row.num_heads)


def _with_sizes(recipe: Recipe, embed_dim: int, depth: int, num_heads: int) -> Recipe:
    sizes = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    model = {**recipe.model.model_dump(), **sizes, "size": None}
    rates = [stage.model_dump() | {"lr": stage.lr * 96 / embed_dim} for stage in recipe.stages]
    return changed(recipe, model=model, stages=rates)


def flops_of_budget(recipe: Recipe, num_train: int, machine: Machine) -> float:
    """Roughly how many FLOPs a run has, before its model is known."""
    budget = recipe.budget
    if budget.flops:
        return budget.flops
    smallest = with_model_size(recipe, next(iter(MODEL_SIZES)))
    if budget.hours:
        return machine.flops_per_sec() * 3600 * budget.hours
    works = stage_work(smallest, weightless_model(smallest))
    images = budget.images or (budget.epochs or 0) * num_train
    each = works[-1].step_flops / recipe.stages[-1].batch_size
    return images * each if images else total_flops(smallest, works)


def asked_lengths(recipe: Recipe, options: RunOptions) -> dict[str, Any]:
    """How long a run was asked to be, before a budget scaled it: kept of its first start.

    Args:
        recipe: as it was given.
    """
    lengths: dict[str, Any] = dict(lengths_of(recipe))
    if options.control != "none":
        budget = options.budget if options.budget.is_set else recipe.budget
        lengths |= {"control": options.control, "control_equal": options.control_equal}
        lengths |= {"budget": budget.model_dump(exclude_none=True), "shrink": options.shrink}
        costs = {"mask", "batch_size", "share"}
        lengths["control_of"] = [
            row.model_dump(mode="json", include=costs) for row in recipe.stages
        ]
    return lengths


def link_control(run_dir: Path, options: RunOptions) -> None:
    """Writes down in a control's folder whose control it is, for `compare`."""
    suffix = f"-{options.control}"
    if options.control != "none" and run_dir.name.endswith(suffix):
        of = run_dir.name.removesuffix(suffix)
        content = {"of": of, "kind": options.control, "equal": options.control_equal}
        write_text(run_dir / CONTROL, json.dumps(content) + "\n")


def _control(
    recipe: Recipe,
    options: RunOptions,
    before: Recipe | None,
    run_dir: Path,
    progress: Progress,
    store: Store,
    machine: Machine,
) -> Recipe:
    """A recipe's control; one that has begun keeps its model, and grows with its recipe.

    Args:
        before: the control that has begun; None = none has.
        run_dir: its folder.
        progress: of it.

    Raises ValueError where one has begun that has something else in common with its recipe.
    """
    asked = asked_lengths(recipe, options)
    recipe = with_classes(recipe, store)
    if before is not None:
        recipe = _with_sizes_of(before, recipe)
        lengths = from_main(lambda: first_lengths(run_dir)) or {}
        equal = lengths.get("control_equal", options.control_equal)
        if equal != options.control_equal:
            raise ValueError(
                f"{run_dir} holds a control of equal {equal}: name a new folder with --out for one "
                f"of equal {options.control_equal}"
            )
        if asked == lengths:  # the machine may look slower now, but no other length was asked for
            return extended(before, _of_same_length(before, recipe, options), progress)
    num_train = len(training_subset(len(store), recipe.data))
    result = with_numbers(recipe, options, len(store), num_train, machine)
    if before is None or len(before.stages) != len(result.stages):
        return result
    return extended(before, with_fixed_warmups(before, result), progress)


def _of_same_length(before: Recipe, recipe: Recipe, options: RunOptions) -> Recipe:
    """A control that goes on with its steps, and with all else of its recipe as it is now."""
    draft = scaled(recipe, options.shrink) if options.shrink != 1 else recipe
    stages = [stage.model_dump() for stage in draft.stages]
    for row in stages:  # its steps tell nothing here, but a warm-up must fit
        row["steps"] = row["steps"] or before.num_steps + draft.num_steps
        row["warmup"] = 0
    evaluation = draft.evaluation.planned_as(before.evaluation)
    control = CONTROLS[options.control](
        changed(draft, stages=stages, evaluation=evaluation), "steps"
    )
    kept = ("steps", "warmup", "restarts", "probe_flops")
    rows = [
        stage.model_dump() | {name: getattr(own, name) for name in kept}
        for stage, own in zip(control.stages, before.stages, strict=True)
    ]
    return changed(control, stages=rows)


def _continued(
    draft: Recipe,
    before: Recipe,
    options: RunOptions,
    run_dir: Path,
    progress: Progress,
    numbers: tuple[int, int],
    machine: Machine,
) -> Recipe:
    """The recipe that continues the run in a folder: with its numbers, or longer.

    Args:
        numbers: images of the source, and those of them that are trained on.
    """
    before = settled(before, progress)
    lengths = from_main(lambda: first_lengths(run_dir))
    asked = _with_numbers_of(before, draft, options, progress, lengths)
    if options.budget.is_set and (options.more or options.budget != before.budget):
        extra, total = _extra(options, before.budget, run_dir)
        asked = longer(asked, extra, progress, machine, *numbers)
        asked = changed(asked, budget=total.model_dump())
    if len(asked.stages) != len(before.stages):
        return asked
    return extended(before, asked, progress)


def _extra(options: RunOptions, before: Budget, run_dir: Path) -> tuple[Budget, Budget]:
    """What a run gets on top of its budget, and its budget then.

    Raises ValueError where that is no more than it has, or cannot be compared with it.
    """
    ((unit, amount),) = [(name, value) for name, value in options.budget if value is not None]
    had = getattr(before, unit)
    if options.more:
        return options.budget, before if had is None else Budget(**{unit: had + amount})
    if had is None:
        raise ValueError(
            f"the run in {run_dir} was not planned by --{unit}: say how much more it gets, "
            f"--{unit} +{amount:g}"
        )
    if amount < had:
        raise ValueError(
            f"the run in {run_dir} has a budget of {had:g} {unit}, and can only grow: name a new "
            "folder with --out for a shorter one"
        )
    return Budget(**{unit: amount - had}), options.budget


def _with_sizes_of(before: Recipe, draft: Recipe) -> Recipe:
    """A draft with the run's batches where they may be smaller, and its model where size is `auto`.

    Any other size is the draft's own.
    """
    stages = []
    for i, stage in enumerate(draft.stages):
        had = before.stages[min(i, len(before.stages) - 1)].batch_size  # a control has fewer stages
        may_be = stage.smallest_batch and stage.smallest_batch <= had <= stage.batch_size
        batch = had if may_be else stage.batch_size
        stages.append({**stage.model_dump(), "batch_size": batch, "smallest_batch": None})
    draft = changed(draft, stages=stages)
    if draft.model.size is None:
        return draft
    if draft.model.size != "auto":
        return with_model_size(draft, draft.model.size)
    own = before.model
    return _with_sizes(draft, own.embed_dim, own.depth, own.num_heads)


def _with_numbers_of(
    before: Recipe,
    draft: Recipe,
    options: RunOptions,
    progress: Progress,
    lengths: dict[str, Any] | None,
) -> Recipe:
    """A draft with the numbers of a run's recipe where it leaves them open.

    With a budget, lengths are open that are as in the run's first command: that budget has scaled
    them. All others count as they are, and so do all of a draft that is the run's own recipe.

    Args:
        lengths: those of the run's first command (`lengths_of`); None = unknown.
    """
    given = set[str]()
    if lengths is not None:
        given = {name for name, value in lengths_of(draft).items() if lengths.get(name) != value}
    draft = scaled(draft, options.shrink) if options.shrink != 1 else draft
    draft = _with_sizes_of(before, settled(draft, progress))
    model, evaluation = draft.model, draft.evaluation.planned_as(before.evaluation)
    if model.num_classes == "auto":
        model = changed(model, num_classes=before.model.num_classes)
    is_own = [stage.steps for stage in draft.stages] == [stage.steps for stage in before.stages]
    scales = options.budget.is_set and not is_own and (draft.is_planned or lengths is not None)
    stages = [stage.model_dump() for stage in draft.stages]
    for i, (row, own) in enumerate(zip(stages, before.stages, strict=False)):
        open_ones = {
            name for name in LENGTHS_OF_STAGE if scales and f"stages.{i}.{name}" not in given
        }
        if "steps" in open_ones or not row["steps"]:
            row["steps"] = own.steps
        if "warmup" in open_ones:
            row["warmup"] = own.warmup
        if "ema.decay" in open_ones:
            row["ema"] = row["ema"] | {"decay": own.ema.decay}
        row["restarts"] = tuple(restart for restart in own.restarts if restart < row["steps"])
    intervals = {name: getattr(before, name) for name in INTERVALS if scales and name not in given}
    numbers = changed(
        draft,
        model=model,
        evaluation=evaluation,
        stages=stages,
        budget=before.budget.model_dump(),
        **intervals,
    )
    return with_fixed_warmups(before, numbers, given)

"""From a budget to steps: how long each stage of a run is, and what depends on it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from maskdm.evaluation.dense_loss import NUM_BUCKETS
from maskdm.evaluation.quick import evaluations_of_look
from maskdm.models.build import weightless_model
from maskdm.recipe import Budget, Recipe, Stage
from maskdm.recipe_evaluation import Evaluation
from maskdm.runs.checkpoint import Progress
from maskdm.settings import changed
from maskdm.training.speed import Machine, Speed
from maskdm.training.work import StageWork, stage_work, total_flops
from maskdm.words import about, counted, flops_text

MOST_ON_MEASURING = 0.05  # part of a run's FLOPs that samples, or losses, in it may cost (auto)
FEWEST_SAMPLES, MOST_SAMPLES = 100, 1000  # for a measurement that says something (auto)
FEWEST_LOSSES, MOST_LOSSES = 32, 256  # images whose losses tell one model from another (auto)
MOST_BESIDES = 0.5  # part of a budget that may go to what is not its stages' training
LESS_LOOKING = "or do without some: --evaluate-every 0 --num-previews 0"
FEWEST_STEPS = 10  # of a stage
ENOUGH_STEPS = 1000  # of a run: with fewer, smaller batches help (docs/does-masking-pay.md)
MANY_IMAGES = 100_000  # stand for an unknown number: more than a measurement takes
INTERVALS = ("log_every", "checkpoint_every", "keep_every", "preview_every", "evaluate_every")
LENGTHS_OF_STAGE = ("steps", "warmup", "ema.decay")


@dataclass(frozen=True)
class Besides:
    """What a run computes besides training, in network evaluations of one whole image."""

    previews: int
    measuring: int

    @property
    def total(self) -> int:
        """Both."""
        return self.previews + self.measuring


def besides(recipe: Recipe, num_images: int, after: int = 0) -> Besides:
    """What a planned recipe's previews and measurements after a step take, for so many images."""
    previews, looks = (
        sum(step > after for step in set_points(recipe, every))
        for every in (recipe.preview_every, recipe.evaluate_every)
    )
    return Besides(
        previews * recipe.num_previews * recipe.preview_steps,
        looks * evaluations_of_look(recipe, num_images),
    )


def set_points(recipe: Recipe, interval: int | str) -> set[int]:
    """Steps at which something is done once an interval, and at each stage's end; 0 = never."""
    if not (every := recipe.every(interval)):
        return set()
    ends = itertools.accumulate(stage.steps for stage in recipe.stages)
    return {*ends, *range(every, recipe.num_steps + 1, every)}


def lengths_of(recipe: Recipe) -> dict[str, int | float | str]:
    """What a budget scales, by the dotted names of the settings."""
    lengths: dict[str, int | float | str] = {name: getattr(recipe, name) for name in INTERVALS}
    for i, stage in enumerate(recipe.stages):
        own = zip(LENGTHS_OF_STAGE, (stage.steps, stage.warmup, stage.ema.decay), strict=True)
        lengths |= {f"stages.{i}.{name}": value for name, value in own}
    return lengths


def scaled(recipe: Recipe, factor: float) -> Recipe:
    """A recipe of other length: steps, warm-ups, averages and intervals by the same factor."""
    stages = []
    for stage in recipe.stages:
        steps = max(1, round(stage.steps * factor)) if stage.steps else 0
        ema = changed(stage.ema, decay=stage.ema.decay ** (1 / factor))
        warmup = stage.warmup
        if isinstance(warmup, int):
            warmup = min(round(warmup * factor), steps or warmup)
        lengths = {"steps": steps, "warmup": warmup, "ema": ema, "restarts": ()}
        lengths["probe_flops"] = round(stage.probe_flops * factor)
        stages.append({**stage.model_dump(), **lengths})
    intervals = {
        name: max(1, round(value * factor))
        for name in INTERVALS
        if isinstance(value := getattr(recipe, name), int) and value
    }
    budget = {name: None if value is None else value * factor for name, value in recipe.budget}
    return changed(recipe, stages=stages, budget=budget, **intervals)


def with_steps(
    recipe: Recipe,
    num_images: int,
    num_train: int,
    machine: Machine,
    rescale: bool = False,
) -> Recipe:
    """A recipe whose stages have as many steps as its budget allows. To be called on every rank.

    Stages without steps divide what the others leave by their shares of the FLOPs. Where all have
    steps, they are kept, and the budget is dropped; with `rescale`, all are scaled to it. Where it
    pays for few steps, batches are smaller, as far as they may be (`smallest_batch`).

    Args:
        num_images: of the source; `num_train` of them are trained on.
        machine: on which a budget in hours is spent.

    Raises ValueError for a budget that is too small.
    """
    usual = _with_batches(recipe, 0)
    if recipe.is_planned and not (rescale and recipe.budget.is_set):
        works = stage_work(recipe, weightless_model(recipe))
        return _with_quick_nums(changed(usual, budget=Budget()), works)
    planned = _of_budget(usual, num_images, num_train, machine)
    smaller = _with_batches(recipe, math.ceil(math.log2(ENOUGH_STEPS / planned.num_steps)))
    if smaller.stages != usual.stages:
        planned = _of_budget(smaller, num_images, num_train, machine)
    for i, (stage, asked) in enumerate(zip(planned.stages, recipe.stages, strict=True)):
        if _is_free(recipe, asked) and stage.steps < FEWEST_STEPS:
            raise ValueError(
                f"the budget leaves {counted(stage.steps, 'step')} of "
                f"{counted(stage.batch_size, 'image')} for stage {stage.name}: give more, or lower "
                f"--stages.{i}.batch-size"
            )
    return planned


def _is_free(recipe: Recipe, stage: Stage) -> bool:
    """Whether a budget decides a stage's length: it has no steps, or all have and are scaled."""
    return not stage.steps or recipe.is_planned


def _with_batches(recipe: Recipe, halvings: int) -> Recipe:
    """The recipe with batches halved so often, as far as they may be, and fixed from then on."""
    stages = []
    for stage in recipe.stages:
        batch, smallest = stage.batch_size, stage.smallest_batch
        if smallest and _is_free(recipe, stage):
            for _ in range(halvings):
                batch = batch // 2 if batch % 2 == 0 and batch // 2 >= smallest else batch
        stages.append({**stage.model_dump(), "batch_size": batch, "smallest_batch": None})
    return changed(recipe, stages=stages)


def _of_budget(recipe: Recipe, num_images: int, num_train: int, machine: Machine) -> Recipe:
    """The recipe with as many steps as its budget allows, few as they may be."""
    works = stage_work(recipe, weightless_model(recipe))
    budget = recipe.budget
    speed = machine.speed(recipe) if budget.hours else None
    wanted = _amount(budget, num_train)
    prices = _prices(recipe, works, budget, speed)
    parts = _parts(recipe, works)
    price = _price_of_flop(parts, prices, works)
    apart = 0.0  # what goes to all else but the stages whose length is free
    for _ in range(4):  # how often is measured depends on the length, too
        planned = _of_flops(recipe, works, (wanted - apart) / price)
        steps = [
            0 if part else stage.steps for part, stage in zip(parts, recipe.stages, strict=True)
        ]
        apart = float(sum(a * b for a, b in zip(steps, prices, strict=True)))
        if speed is not None:
            apart += besides(planned, num_images).total * speed.forward_sec
        if apart > MOST_BESIDES * wanted:
            fixed, way_out = "stages with steps", "or shorten them with --stages.N.steps"
            if speed is not None:
                fixed, way_out = "previews, measuring, and " + fixed, LESS_LOOKING
            raise _too_small(budget, wanted, apart, fixed, way_out)
    return planned


def longer(
    recipe: Recipe,
    extra: Budget,
    progress: Progress,
    machine: Machine,
    num_images: int,
    num_train: int,
) -> Recipe:
    """A planned recipe with more steps in the stages that are not over, in proportion.

    Where all are over, the last one gets them.

    Args:
        extra: what the run gets on top.
        progress: of the run.
        machine: on which hours are spent, also on what previews and measurements there are more.
        num_images: of the source; `num_train` of them are trained on.

    Raises ValueError for hours that are too few.
    """
    works = stage_work(recipe, weightless_model(recipe))
    speed = machine.speed(recipe) if extra.hours else None
    prices = _prices(recipe, works, extra, speed)
    amount = _amount(extra, num_train)
    parts = _parts(recipe, works)
    is_last = progress.stage + 1 == len(parts)
    parts = [part if i >= progress.stage else 0.0 for i, part in enumerate(parts)]
    if not is_last and progress.stage_step >= recipe.stages[progress.stage].steps:
        parts[progress.stage] = 0.0
    price, grown, apart = _price_of_flop(parts, prices, works), recipe, 0.0
    for _ in range(4):  # how often is measured depends on the length, too
        flops = (amount - apart) / price
        stages = [
            stage.model_dump()
            | {"steps": stage.steps + round(flops * part / sum(parts) / work.step_flops)}
            for stage, part, work in zip(recipe.stages, parts, works, strict=True)
        ]
        grown = changed(recipe, stages=stages)
        if speed is None:
            break
        now, before = (besides(one, num_images, progress.step).total for one in (grown, recipe))
        apart = (now - before) * speed.forward_sec
        if apart > MOST_BESIDES * amount:
            raise _too_small(extra, amount, apart, "previews and measuring", LESS_LOOKING)
    return grown


def _too_small(budget: Budget, wanted: float, apart: float, where: str, way_out: str) -> ValueError:
    return ValueError(
        f"the budget of {_text(budget, wanted)} is too small: {_text(budget, apart)} of it go to "
        f"{where}: give more, {way_out}"
    )


def _parts(recipe: Recipe, works: list[StageWork]) -> list[float]:
    """How the stages divide FLOPs: as they do now, or those without steps by their shares."""
    if recipe.is_planned:
        pairs = zip(works, recipe.stages, strict=True)
        return [float(work.step_flops * stage.steps) for work, stage in pairs]
    return [0.0 if stage.steps else stage.share for stage in recipe.stages]


def _price_of_flop(parts: list[float], prices: list[float], works: list[StageWork]) -> float:
    """A FLOP of training in a budget's unit, where stages have such parts of all FLOPs."""
    rows = zip(parts, prices, works, strict=True)
    return sum(part / sum(parts) * price / work.step_flops for part, price, work in rows)


def _amount(budget: Budget, num_train: int) -> float:
    """A budget in its unit: seconds, FLOPs or images."""
    if budget.hours:
        return 3600 * budget.hours
    return budget.flops or budget.images or (budget.epochs or 0) * num_train


def _prices(
    recipe: Recipe, works: list[StageWork], budget: Budget, speed: Speed | None
) -> list[float]:
    """A step of each stage in the budget's unit: seconds, FLOPs or images."""
    if speed is not None:
        return list(speed.step_sec)
    if budget.flops:
        return [float(work.step_flops) for work in works]
    return [float(stage.batch_size) for stage in recipe.stages]


def _of_flops(recipe: Recipe, works: list[StageWork], flops: float) -> Recipe:
    """The recipe with FLOPs for those of its stages whose length is free."""
    if recipe.is_planned:
        planned = scaled(recipe, flops / total_flops(recipe, works))
        return _with_quick_nums(changed(planned, budget=recipe.budget), works)
    parts = _parts(recipe, works)
    stages = [
        stage.model_dump()
        | {"steps": stage.steps or max(1, round(flops * part / sum(parts) / work.step_flops))}
        for stage, part, work in zip(recipe.stages, parts, works, strict=True)
    ]
    return _with_quick_nums(changed(recipe, stages=stages), works)


def _with_quick_nums(recipe: Recipe, works: list[StageWork]) -> Recipe:
    """The recipe with numbers of what is measured in training, where they are `auto`."""
    if recipe.evaluation.is_planned:
        return recipe
    times = len(set_points(recipe, recipe.evaluate_every)) or 1
    forward = weightless_model(recipe).forward_flops(works[-1].num_patches)
    evaluations = MOST_ON_MEASURING * total_flops(recipe, works) / (times * forward)
    samples = int(evaluations / recipe.preview_steps)
    samples = min(samples, MOST_SAMPLES) if samples >= FEWEST_SAMPLES else 0
    losses = int(evaluations / (2 * NUM_BUCKETS))  # of images held out, and trained on
    losses = min(max(losses, FEWEST_LOSSES), MOST_LOSSES)
    numbers = Evaluation(quick_num=samples, quick_loss_num=losses)
    return changed(recipe, evaluation=recipe.evaluation.planned_as(numbers))


def _text(budget: Budget, amount: float) -> str:
    """An amount in a budget's unit: `about 3 s`, `8 TFLOP`, `1,000 images`."""
    if budget.hours:
        return about(amount)
    return flops_text(amount) if budget.flops else f"{amount:,.0f} images"

"""What it takes to end a masked stage at its plateau (`until: plateau`): its forks, their cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from maskdm.evaluation.dense_loss import NUM_BUCKETS
from maskdm.images.order import num_held_out
from maskdm.models.backbone import Backbone
from maskdm.models.build import weightless_model
from maskdm.recipe import Recipe
from maskdm.training.work import StageWork, stage_work

PROBED_IMAGES = 256  # held-out ones, at most, on which forks are compared
POINTS = 5  # a stage is probed at every fifth of its steps
FORK_PART = 200  # half a fork takes half a percent of the stage's FLOPs,
FEWEST_STEPS = 10  # but so many steps of the next stage at least


@dataclass(frozen=True)
class Forks:
    """What a probe of a stage takes.

    Attributes:
        masked: steps of the stage in the first fork.
        following: steps of the next stage after them; the second fork takes `whole` of these.
        whole: as many steps of the next stage as cost the same.
        flops: of both forks, with measuring their losses.
        points: steps of the stage at which it is probed.
    """

    masked: int
    following: int
    whole: int
    flops: int
    points: tuple[int, ...]


def forks_of(
    recipe: Recipe, number: int, works: Sequence[StageWork], model: Backbone, num_images: int
) -> Forks:
    """The forks of a stage with `until: plateau`, of which all depends on the recipe alone.

    Args:
        recipe: planned.
        number: of the stage.
        works: of the stages.
        model: only its sizes matter.
        num_images: of the source.
    """
    stage, own, after = recipe.stages[number], *works[number : number + 2]
    part = stage.steps * own.step_flops / FORK_PART
    following = max(FEWEST_STEPS, round(part / after.step_flops))
    masked = max(1, round(following * after.step_flops / own.step_flops))
    whole = following + round(masked * own.step_flops / after.step_flops)
    num = min(PROBED_IMAGES, num_held_out(num_images, recipe.data))
    measuring = 2 * num * NUM_BUCKETS * model.forward_flops(model.num_patches)
    training = masked * own.step_flops + (following + whole) * after.step_flops
    fifths = (round(stage.steps * i / POINTS) for i in range(1, POINTS))
    points = tuple(step for step in fifths if step >= max(2, stage.warmup_steps))
    return Forks(masked, following, whole, training + measuring, points)


def probing_flops(recipe: Recipe, num_images: int) -> int:
    """The most that the forks of a planned recipe take: they are paid by the stages that follow."""
    model = weightless_model(recipe)
    works, total = stage_work(recipe, model), 0
    for i, stage in enumerate(recipe.stages):
        if stage.until == "plateau":
            forks = forks_of(recipe, i, works, model, num_images)
            total += len(forks.points) * forks.flops
    return total


def refuse_plateaus(recipe: Recipe, num_images: int) -> None:
    """Raises ValueError where probes have no images, or might leave the next stage too little."""
    model = weightless_model(recipe)
    works = stage_work(recipe, model)
    for i, stage in enumerate(recipe.stages):
        if stage.until == "steps":
            continue
        setting = f"stages.{i}.until plateau"
        if not num_held_out(num_images, recipe.data):
            raise ValueError(
                f"{setting} needs held-out images, but data.held_out {recipe.data.held_out:g} of "
                f"{num_images:,} images is none: hold out more"
            )
        forks, after = forks_of(recipe, i, works, model, num_images), recipe.stages[i + 1]
        if not forks.points:
            raise ValueError(
                f"{setting}: the warm-up of {stage.warmup_steps:,} steps leaves none of "
                f"{stage.steps:,} to probe at: use a shorter one, or until steps"
            )
        cost = math.ceil(len(forks.points) * forks.flops / works[i + 1].step_flops)
        if after.steps - cost < max(after.steps / 2, after.warmup_steps, 1):
            raise ValueError(
                f"{setting}: its forks may cost {cost:,} of the {after.steps:,} steps of stage "
                f"{after.name}, which leaves too few: train longer, hold out fewer images, or use "
                "until steps"
            )

"""Controls: what a recipe trains without masks, for as much compute as with them."""

from __future__ import annotations

from typing import Any

from maskdm.models.build import weightless_model
from maskdm.recipe import Budget, Recipe
from maskdm.settings import changed
from maskdm.training.speed import Machine
from maskdm.training.work import stage_work

# What a stage of a control has not.
BARE: dict[str, Any] = {
    "mask": {"kind": "none", "rate": 0.0},
    "until": "steps",
    "restarts": (),
    "probe_flops": 0,
}


def dense_control(recipe: Recipe, equal: str = "flops", machine: Machine | None = None) -> Recipe:
    """A planned recipe's control: its last stage's settings alone, without a mask.

    It has no primer, so that guidance by it is left out.

    Args:
        equal: `flops`, `time` or `steps`, to within a step.
        machine: needed for equal time.
    """
    stage, sampling = recipe.stages[-1].model_dump() | BARE, recipe.sampling
    if (sampling.guidance.kind, sampling.guidance.weak) == ("autoguidance", "primer"):
        sampling = changed(sampling, guidance={})
    control = changed(
        recipe, stages=[stage], sampling=sampling.model_dump(), budget=Budget().model_dump()
    )
    (price,) = _prices_of_steps(control, equal, machine)
    steps = max(1, round(sum(_spent(recipe, equal, machine)) / price))
    return changed(control, stages=[_of_steps(stage, steps) | {"name": "dense"}])


def unmasked_control(
    recipe: Recipe, equal: str = "flops", machine: Machine | None = None
) -> Recipe:
    """A planned recipe's control that differs in the masks alone: its stages, on whole images.

    Each keeps its learning rate and batch, of which a masked recipe's gain may come.

    Args:
        equal: what each stage has in common with its masked one: `flops`, `time` or `steps`.
        machine: needed for equal time.
    """
    stages = [stage.model_dump() | BARE for stage in recipe.stages]
    control = changed(recipe, stages=stages, budget=Budget())
    prices = _prices_of_steps(control, equal, machine)
    rows = zip(stages, _spent(recipe, equal, machine), prices, strict=True)
    return changed(
        control,
        stages=[_of_steps(stage, max(1, round(spent / price))) for stage, spent, price in rows],
    )


def _of_steps(stage: dict[str, Any], steps: int) -> dict[str, Any]:
    """A stage of so many steps, whose warm-up does not outlast them."""
    warmup = stage["warmup"]  # a number of steps, or a part of the stage
    return stage | {
        "steps": steps,
        "warmup": min(warmup, steps) if isinstance(warmup, int) else warmup,
    }


def _prices_of_steps(recipe: Recipe, equal: str, machine: Machine | None) -> list[float]:
    """What a step of each stage takes of what a control has in common with its recipe."""
    if equal == "steps":
        return [1.0 for _ in recipe.stages]
    if equal == "time":
        assert machine is not None
        return list(machine.speed(recipe).step_sec)
    return [float(work.step_flops) for work in stage_work(recipe, weightless_model(recipe))]


def _spent(recipe: Recipe, equal: str, machine: Machine | None) -> list[float]:
    """What each stage takes of it in all: FLOPs with those of the forks that were made."""
    rows = zip(recipe.stages, _prices_of_steps(recipe, equal, machine), strict=True)
    forks = equal == "flops"
    return [stage.steps * price + forks * stage.probe_flops for stage, price in rows]

"""What each stage of a recipe costs."""

from __future__ import annotations

from dataclasses import dataclass

from maskdm.masks import num_visible
from maskdm.models.backbone import Backbone
from maskdm.recipe import Recipe
from maskdm.tokens import grid_shape


@dataclass(frozen=True)
class StageWork:
    """A stage's mask on the grid, and the compute of a step.

    Attributes:
        num_visible: patches that the network sees, of `num_patches`.
        num_middle: those that the blocks in its middle work on; None = all of them.
        hidden: the fraction really hidden, after rounding to whole patches or blocks; or the
            fraction that passes the middle by.
        step_flops: floating-point operations of a step, over all devices; 0 without a model.
    """

    num_visible: int
    num_patches: int
    hidden: float
    step_flops: int = 0
    num_middle: int | None = None


def stage_work(recipe: Recipe, model: Backbone | None = None) -> list[StageWork]:
    """The work of each stage. Raises ValueError for a mask that the grid cannot have."""
    grid = grid_shape(*recipe.data.shape[:2], recipe.model.patch_size)
    works, num_patches = [], grid[0] * grid[1]
    for stage in recipe.stages:
        count = num_visible(stage.mask, grid)
        hidden, middle = 1 - count / num_patches, list[int]()
        if stage.mask.where == "middle":
            count, middle = num_patches, [count]
        # A step is a forward pass, and twice that for the gradients of inputs and weights.
        flops = 0 if model is None else 3 * model.forward_flops(count, *middle) * stage.batch_size
        works.append(StageWork(count, num_patches, hidden, flops, *middle))
    return works


def total_flops(recipe: Recipe, works: list[StageWork]) -> int:
    """Floating-point operations of all steps of all stages, with the forks that were made."""
    pairs = zip(works, recipe.stages, strict=True)
    return sum(work.step_flops * stage.steps + stage.probe_flops for work, stage in pairs)

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
        num_visible: patches that the mask leaves, of `num_patches`.
        hidden: the fraction really hidden, after rounding to whole patches or blocks.
        step_flops: floating-point operations of a step, over all devices; 0 without a model.
    """

    num_visible: int
    num_patches: int
    hidden: float
    step_flops: int = 0


def stage_work(recipe: Recipe, model: Backbone | None = None) -> list[StageWork]:
    """The work of each stage. Raises ValueError for a mask that the grid cannot have."""
    grid = grid_shape(*recipe.data.shape[:2], recipe.model.patch_size)
    works, num_patches = [], grid[0] * grid[1]
    for stage in recipe.stages:
        count = num_visible(stage.mask, grid)
        # A step is a forward pass, and twice that for the gradients of inputs and weights.
        flops = 3 * model.forward_flops(count) * stage.batch_size if model is not None else 0
        works.append(StageWork(count, num_patches, 1 - count / num_patches, flops))
    return works


def total_flops(recipe: Recipe, works: list[StageWork]) -> int:
    """Floating-point operations of all steps of all stages."""
    return sum(w.step_flops * s.steps for w, s in zip(works, recipe.stages, strict=True))

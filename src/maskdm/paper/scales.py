"""The scales at which the paper's experiments can be repeated: the same schedules, made smaller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from maskdm.models.build import weightless_model
from maskdm.recipe import Recipe
from maskdm.recipe_files import merged
from maskdm.training.budget import scaled
from maskdm.training.work import stage_work, total_flops

OTHER_DATA = ("ffhq", "afhq", "vggface2")  # what primers are transferred from or to
FEWEST_STEPS = 2  # of a stage


@dataclass(frozen=True)
class Scale:
    """A size of the experiments.

    Attributes:
        about: what it is for, for `--help`.
        means: what its figures mean, as a sentence for the page.
        sources: the images, and those of experiments on other data; None = the recipes' own.
        settings: changes to every recipe, as in a recipe's file.
        fewer: by what batches are divided.
        faster: by what learning rates are multiplied: narrow networks and short runs want more.
        ema: the average of all stages; None = the recipes' own, shorter as the stages are.
        flops: of the target's most expensive recipe; all others keep their ratio to it. None = as
            long as in the paper.
    """

    about: str
    means: str
    sources: tuple[str, str] | None = None
    settings: dict[str, Any] | None = None
    fewer: int = 1
    faster: float = 1.0
    flops: float | None = None
    ema: dict[str, Any] | None = None


# 32 pixels in patches of 2 have the paper's grid of 16 x 16 at 64 pixels, so that all masks fit.
_small_images = {"size": 32, "crop": "auto", "held_out": 0.05}
SCALES: dict[str, Scale] = {
    "smoke": Scale(
        "a minute or two on a CPU: it shows that everything runs",
        "These figures mean nothing: networks of 13,000 weights were trained for a few steps.",
        ("faces:1000@32", "faces:1000:1@32"),
        {
            "data": _small_images,
            "model": {"patch_size": 2, "embed_dim": 16, "depth": 3, "num_heads": 2},
            "sampling": {"sampler": "dpm-solver", "steps": 4, "eta": 0.0},
            "evaluation": {
                "features": "pca", "num": 64, "num_components": 8, "pixel_max": 1, "quick_num": 0,
            },
            "num_previews": 4,
            "preview_steps": 4,
            "evaluate_every": 0,
        },
        32,
        16.0,
        4e9,
    ),
    "small": Scale(
        "32 pixels and 0.05 M weights: an evening on two CPU cores, minutes on a GPU",
        "A network of 0.05 M weights on images of 32 pixels, for a millionth of the paper's "
        "compute, predicting x0 instead of eps, with longer averages: what holds here need not "
        "hold there.",
        ("faces:10000@32", "faces:10000:1@32"),
        {
            "data": _small_images,
            "model": {"patch_size": 2, "embed_dim": 32, "depth": 3, "num_heads": 2},
            "diffusion": {"prediction": "x0"},  # eps leaves noise in the samples of so short a run
            "sampling": {"sampler": "dpm-solver", "steps": 15, "eta": 0.0},
            "evaluation": {
                "features": "pca", "num": 1000, "num_components": 32, "pixel_max": 1,
                "quick_num": 0,
            },
            "num_previews": 16,
            "evaluate_every": 0,
        },
        8,
        32.0,
        4e12,
        {"kind": "power", "width": 0.1},  # the paper's 4 % of a run are too few steps here
    ),
    "paper": Scale("as in the paper: GPU days, and its data sets", "As in the paper."),
}  # fmt: skip


def at_scale(
    recipes: dict[str, Recipe],
    scale: Scale,
    sources: Sequence[str] = (),
    flops: float | None = None,
) -> dict[str, Recipe]:
    """The recipes of a table or figure, made smaller alike.

    Args:
        recipes: by name.
        scale: how small.
        sources: other images than the scale's: for all, or for all but other data, and for those.
        flops: of the most expensive recipe, instead of the scale's.

    Raises ValueError where that leaves a stage no step.
    """
    flops = flops or scale.flops
    smaller = {name: _smaller(recipe, scale, sources) for name, recipe in recipes.items()}
    if flops is None:
        return smaller
    most = max(total_flops(one, _works(one)) for one in smaller.values())
    return {name: _shorter(name, one, flops / most) for name, one in smaller.items()}


def _works(recipe: Recipe) -> Any:
    return stage_work(recipe, weightless_model(recipe))


def _smaller(recipe: Recipe, scale: Scale, sources: Sequence[str]) -> Recipe:
    given = list(sources) or list(scale.sources or ())
    content = merged(recipe.model_dump(mode="json"), scale.settings or {})
    if given:
        content["data"]["source"] = given[-1 if recipe.data.source in OTHER_DATA else 0]
    for stage in content["stages"]:
        stage["batch_size"] = max(1, stage["batch_size"] // scale.fewer)
        for rate in ("lr", "warmup_from"):
            stage[rate] *= scale.faster
        stage["ema"] = scale.ema or stage["ema"]
    return Recipe(**content)


def _shorter(name: str, recipe: Recipe, factor: float) -> Recipe:
    """The recipe by a factor; stages with few steps keep some, and lose what does not fit them."""
    shorter = scaled(recipe, factor).model_dump(mode="json")
    for stage in shorter["stages"]:
        stage["steps"] = max(FEWEST_STEPS, stage["steps"])
        stage["warmup"] = min(stage["warmup"], stage["steps"])
    if recipe.keep_every:
        shorter["keep_every"] = "20%"
    return Recipe(**shorter)

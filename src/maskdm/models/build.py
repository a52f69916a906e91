"""The model that a recipe asks for."""

from __future__ import annotations

import torch

from maskdm.models.adapters import GridDenoiser
from maskdm.models.uvit import UViT
from maskdm.recipe import Recipe
from maskdm.seeds import derive_seed

Backbone = UViT | GridDenoiser


def build_model(recipe: Recipe, class_names: list[str] | None = None) -> Backbone:
    """The recipe's model, with initial weights that depend on the recipe's seed alone.

    It keeps the names of its classes, where they are known, for those who ask for one.

    Raises ValueError for sizes or options that the network doesn't take, or where the names are
    not one for each class.
    """
    settings = recipe.model.model_dump()
    settings |= {"image_size": recipe.data.size, "channels": recipe.data.channels}
    settings["class_names"] = class_names
    kind, options = settings.pop("kind"), settings.pop("options")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(recipe.seed, "weights"))  # the CPU's alone
        if kind == "uvit":
            return UViT(**settings)
        del settings["mlp_ratio"], settings["final_conv"]
        return GridDenoiser(kind=kind, options=options, **settings)

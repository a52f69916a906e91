"""The model of a recipe."""

from __future__ import annotations

import torch

from maskdm.families import BACKBONES
from maskdm.models.backbone import Backbone as Backbone
from maskdm.recipe import Recipe
from maskdm.seeds import derive_seed


def build_model(recipe: Recipe, class_names: list[str] | None = None) -> Backbone:
    """The recipe's model, with initial weights that depend on the recipe's seed alone.

    It keeps the names of its classes, if they are known, so that samples can be named by them.

    Raises ValueError for sizes or options that the network does not take, or where the names are
    not one for each class.
    """
    kind = BACKBONES[recipe.model.kind]
    names = ("patch_size", "num_classes", "label_dropout", *kind.settings)
    settings = {name: getattr(recipe.model, name) for name in names}
    settings |= {"image_size": recipe.data.size, "channels": recipe.data.channels}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(recipe.seed, "weights"))  # the CPU's alone
        model: Backbone = kind.network(**settings, class_names=class_names)
    return model


def weightless_model(recipe: Recipe) -> Backbone:
    """The recipe's model without memory for its weights: for its sizes and costs."""
    with torch.device("meta"):
        return build_model(recipe)

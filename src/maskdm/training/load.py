"""Loading a trained model, wherever it lies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from maskdm.models.adapters import GridDenoiser
from maskdm.models.build import Backbone, build_model
from maskdm.models.trained import TrainedModel
from maskdm.models.uvit import UViT
from maskdm.recipe import Diffusion, Sampling
from maskdm.training.find import Found, Note, find_model, read_index
from maskdm.training.run_folder import read_class_names


@dataclass(frozen=True)
class Loaded:
    """A trained model with its averaged weights, in evaluation mode, on the CPU.

    Attributes:
        trained: the network and what it was trained under.
        sampling: how images are drawn from it unless asked otherwise.
        found: where it was.
    """

    trained: TrainedModel
    sampling: Sampling
    found: Found


def load_model(name: str | Path, note: Note = print) -> Loaded:
    """Loads the model that a user names; see `find_model` for what that may be.

    Raises ValueError where there is none, or its files are damaged.
    """
    found = find_model(name, note)
    try:
        model, diffusion = _exported(found) if found.is_exported else _checkpoint(found)
    except (OSError, SafetensorError, KeyError, RuntimeError, json.JSONDecodeError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"the model in {found.folder} is damaged: {text}") from None
    return Loaded(TrainedModel(model.eval(), diffusion), found.sampling, found)


def load_weak(strong: Found, name: str, note: Note = print) -> Loaded:
    """The weak model of autoguidance: `primer` = the run's own, from the end of the stage before.

    Raises ValueError where there is none.
    """
    if name != "primer":
        return load_model(name, note)
    if strong.run is None:
        raise ValueError(
            f"{strong.folder} is in no run's folder, where its primer would be: name a weak model "
            "with --guidance-weak RUN, or sample with --guidance none"
        )
    stages = strong.recipe.stages
    number = len(stages) - 1 if strong.is_exported else _progress(strong)["stage"]
    if number == 0:
        raise ValueError(
            f"{strong.folder} is of the run's first stage, before which there is no primer: name "
            "a weak model with --guidance-weak RUN, or sample with --guidance none"
        )
    return load_model(f"{strong.run}@{stages[number - 1].name}", note)


def diffusion_fields(index: dict[str, Any]) -> Diffusion:
    """The diffusion that an exported model's model_index.json tells."""
    return Diffusion(**{name: index[name] for name in Diffusion.model_fields if name in index})


def _exported(found: Found) -> tuple[Backbone, Diffusion]:
    folder, index = found.folder / "denoiser", read_index(found.folder)
    if index.get("_class_name") != "MaskDMPipeline":
        raise ValueError(f"{found.folder} is a model of another kind: {index.get('_class_name')}")
    kind = json.loads((folder / "config.json").read_text("utf-8"))["_class_name"]
    network: type[Any] = {"UViT": UViT, "GridDenoiser": GridDenoiser}[kind]
    model = network.from_pretrained(str(folder), use_safetensors=True)
    return model, diffusion_fields(index)


def _progress(found: Found) -> dict[str, Any]:
    """The counters of a checkpoint."""
    counters: dict[str, Any] = json.loads((found.folder / "progress.json").read_text("utf-8"))
    return counters


def _checkpoint(found: Found) -> tuple[Backbone, Diffusion]:
    recipe = found.recipe
    assert found.run is not None  # else there is no recipe
    model = build_model(recipe, read_class_names(found.run))
    model.load_state_dict(load_file(found.folder / "ema.safetensors"))
    return model, recipe.diffusion_of(recipe.stages[_progress(found)["stage"]])

"""Loading a trained model, wherever it lies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from maskdm.families import BACKBONES
from maskdm.models.adapters import NETWORKS, DiffusersDenoiser
from maskdm.models.build import Backbone, build_model
from maskdm.models.trained import TrainedModel
from maskdm.recipe import Data, Diffusion, Sampling
from maskdm.runs.averages import averaged_weights
from maskdm.runs.find import Location, Note, find_checkpoint, find_model, read_index, read_settings
from maskdm.runs.folder import read_class_names
from maskdm.words import listed, one_line

# What damaged files raise, in our reading of them or in a library's.
DAMAGE: tuple[type[Exception], ...] = (
    OSError, SafetensorError, LookupError, RuntimeError, TypeError, AttributeError,
    json.JSONDecodeError, UnicodeDecodeError,
)  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """A trained model in evaluation mode, on the CPU.

    Attributes:
        trained: the network and what it was trained under.
        sampling: how images are drawn from it by default.
        location: where it was found.
    """

    trained: TrainedModel
    sampling: Sampling
    location: Location

    @property
    def preparation(self) -> Data:
        """How the images that it was trained on were prepared, as far as is known."""
        if self.location.run is not None:
            return self.location.recipe.data
        height, width, channels = self.trained.model.image_shape
        return Data(size=(height, width), channels=channels)


def load_model(
    name: str | Path, note: Note = print, weights: str = "ema", width: float | None = None
) -> Loaded:
    """Loads the model that a user names; see `find_model` for what that may be.

    Args:
        name, note: as for `find_model`.
        weights: `ema` = averaged, `raw` = as trained.
        width: relative width of another average, made of the run's snapshots; None = its own.

    Raises ValueError where there is no such model, its files are damaged, weights are missing, NaN
    or infinite, or an exported model, which has averaged weights only, is to give raw ones.
    """
    location = find_model(name, note)
    other = weights == "raw" or width is not None
    if other and location.is_exported and location.run is not None:
        location = _newest_checkpoint(location, note)
    has_raw = not location.is_exported and (location.folder / "model.safetensors").is_file()
    if weights == "raw" and not has_raw:
        raise ValueError(f"{location.folder} has averaged weights only: use init_weights ema")
    if width is not None and location.is_exported:
        raise ValueError(f"{location.folder} has one average only: name its run's folder")
    try:
        if location.is_exported:
            model, diffusion = _load_exported(location)
        else:
            model, diffusion = _load_checkpoint(location, weights)
        if width is not None:
            _average_anew(model, location, width)
    except DAMAGE as error:
        raise ValueError(f"the model in {location.folder} is damaged: {one_line(error)}") from None
    for key, tensor in model.named_parameters():
        if not tensor.isfinite().all():
            raise ValueError(
                f"the model in {location.folder} is unusable: its weights {key} contain NaN or "
                "infinite values. Use an earlier checkpoint"
            )
    return Loaded(TrainedModel(model.eval(), diffusion), location.sampling, location)


def load_weak(strong: Location, name: str, note: Note = print) -> Loaded:
    """The weak model of autoguidance: `primer` = the run's own, from the end of the stage before.

    Raises ValueError where there is none.
    """
    if name != "primer":
        return load_model(name, note)
    way_out = "name a weak model with --guidance.weak RUN, or sample with --guidance.kind none"
    if strong.run is None:
        raise ValueError(
            f"{strong.folder} is not in a run's folder, where its primer is: {way_out}"
        )
    stages = strong.recipe.stages
    number = len(stages) - 1 if strong.is_exported else _progress(strong)["stage"]
    if number == 0:
        raise ValueError(
            f"{strong.folder} is from the run's first stage, before which there is no primer: "
            f"{way_out}"
        )
    return load_model(f"{strong.run}@{stages[number - 1].name}", note)


def _newest_checkpoint(location: Location, note: Note) -> Location:
    """The newest checkpoint of the run around an exported model, or the model itself."""
    assert location.run is not None
    checkpoint = find_checkpoint(location.run / "checkpoints", note)
    return Location(checkpoint, location.run) if checkpoint else location


def _load_exported(location: Location) -> tuple[Backbone, Diffusion]:
    index = read_index(location.folder)
    return load_network(location.folder, index), Diffusion(**index["diffusion"])


def load_network(folder: Path, index: dict[str, Any], variant: str | None = None) -> Backbone:
    """The network of an exported model.

    Args:
        folder: the exported model.
        index: its settings, from `read_index`.
        variant: in the names of the weights' files.

    Raises RuntimeError where weights are missing or damaged.
    """
    if "model" not in index:
        file = folder / "denoiser" / "config.json"
        config = read_settings(file)
        classes: dict[str, Any] = {
            row.network_class.__name__: row.network_class for row in BACKBONES.values()
        }
        name = config["_class_name"]
        network = classes[name] if name in classes else BACKBONES[config["kind"]].network_class
        model: Backbone = _whole(network, file.parent, variant)
        return model
    config = index["model"]
    network = BACKBONES[config["kind"]].network_class
    if network is not DiffusersDenoiser:  # its file's class is the same with another face
        return _whole(network, folder / "unet", variant)
    part = "unet" if (folder / "unet").is_dir() else "transformer"
    net = _whole(NETWORKS[config["kind"]], folder / part, variant)
    return DiffusersDenoiser.around(net, config)


def _whole(network: Any, folder: Path, variant: str | None) -> Any:
    try:
        model, loading = network.from_pretrained(
            str(folder), use_safetensors=True, output_loading_info=True, variant=variant
        )
    except Exception as error:  # damaged files make diffusers raise nearly anything
        raise RuntimeError(one_line(error, 200)) from None
    if missing := sorted(loading["missing_keys"]):
        raise RuntimeError(f"its file lacks {listed(missing, most=3)}")
    return model


def _average_anew(model: Backbone, location: Location, width: float) -> None:
    """Gives a checkpoint's model the average of another width."""
    counters, run = _progress(location), location.run
    assert run is not None  # a checkpoint lies in a run's folder
    stage = location.recipe.stages[counters["stage"]].name
    where = (run, stage, counters["step"], counters["stage_step"])
    model.load_state_dict(averaged_weights(*where, width), strict=False)


def _progress(location: Location) -> dict[str, Any]:
    """The counters of a checkpoint."""
    return read_settings(location.folder / "progress.json")


def _load_checkpoint(location: Location, weights: str) -> tuple[Backbone, Diffusion]:
    recipe = location.recipe
    assert location.run is not None  # else there is no recipe
    model = build_model(recipe, read_class_names(location.run))
    file = {"ema": "ema.safetensors", "raw": "model.safetensors"}[weights]
    model.load_state_dict(load_file(location.folder / file))
    return model, recipe.diffusion_of(recipe.stages[_progress(location)["stage"]])

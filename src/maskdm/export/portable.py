"""Exported folders that diffusers opens and samples without this package.

The network is one of diffusers' own, or comes with a file that holds all its code; the pipeline is
diffusers' DDIMPipeline, or comes with such a file. The files are made from this package's source.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin

from maskdm import tokens, words
from maskdm.diffusion import prediction
from maskdm.export import image_face, image_uvit, image_vit, pixel_pipeline
from maskdm.export.schedulers import PREDICTION_TYPES, flow_shift
from maskdm.models import backbone, class_names, route, uvit, vit
from maskdm.models.adapters import DiffusersDenoiser
from maskdm.models.backbone import Backbone
from maskdm.models.trained import TrainedModel
from maskdm.recipe import Sampling
from maskdm.runs.find import SETTINGS

# The modules whose code a file holds, and which of their names; all where there is None.
Parts = tuple[tuple[ModuleType, set[str] | None], ...]
COMMON: Parts = (
    (words, {"listed", "printable", "NUM_LISTED", "CONTROL"}),
    (tokens, None),
    (class_names, {"refuse_class_names"}),
    (backbone, {"Backbone"}),
    (route, None),
)
PIPELINE: Parts = ((prediction, {"x0_and_noise_from", "_unknown"}), (pixel_pipeline, None))
OMITTED = {"kind", "forward_flops"}  # methods that only training needs


@dataclass(frozen=True)
class Code:
    """A network whose code goes into the folder.

    Attributes:
        title: in words.
        face: its class there.
        parts: what the file holds.
    """

    title: str
    face: type
    parts: Parts

    @property
    def file(self) -> str:
        """The file's name, without its suffix."""
        return self.face.__module__.split(".")[-1]


# By the class of the network.
NETWORKS: dict[type, Code] = {
    uvit.UViT: Code(
        "U-ViT",
        image_uvit.ImageUViT,
        (*COMMON, (uvit, None), (image_face, None), (image_uvit, None)),
    ),
    vit.ViT: Code(
        "A vision transformer of today's parts",
        image_vit.ImageViT,
        (
            *COMMON, (uvit, {"TIME_SCALE", "timestep_embedding"}), (vit, None),
            (image_face, None), (image_vit, None),
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Component:
    """A network in the form that diffusers opens.

    Attributes:
        name: its place in a diffusers pipeline, and its folder.
        network: what is saved there.
        code: what the file with its code holds; None = it is one of diffusers' own.
    """

    name: str
    network: ModelMixin
    code: Code | None = None

    @property
    def entry(self) -> list[str]:
        """The module and the class of the network, for model_index.json."""
        return [self.code.file if self.code else "diffusers", type(self.network).__name__]


def component_of(model: Backbone) -> Component | None:
    """A network as diffusers opens it; None for one that it cannot, a user's own."""
    if (code := NETWORKS.get(type(model))) is not None:
        with torch.device("meta"):
            network = code.face(**arguments_of(model))
        network.load_state_dict(model.state_dict(), assign=True)
        return Component("unet", network, code)
    if type(model) is DiffusersDenoiser:
        name = {"unet2d": "unet", "dit": "transformer"}[model.config.kind]
        return Component(name, model.net)
    return None


def arguments_of(model: Backbone) -> dict[str, Any]:
    """The arguments that a network was made with."""
    return {name: value for name, value in model.config.items() if not name.startswith("_")}


def save_portable(
    folder: Path,
    component: Component,
    trained: TrainedModel,
    sampling: Sampling,
    scheduler: Any,
    is_followed: bool,
    **options: Any,
) -> None:
    """Writes a model into a folder that diffusers opens by itself.

    Args:
        folder: to write into.
        component: the network.
        trained: the same network, and what it was trained under.
        sampling: default settings.
        scheduler: of diffusers.
        is_followed: whether it draws, and not the sampler of the settings.
        options: of diffusers' `save_pretrained`: variant, max_shard_size, safe_serialization.

    Raises OSError where the disk refuses.
    """
    place = folder / component.name
    component.network.save_pretrained(place, **options)
    forget_origin(place / "config.json")
    if (code := component.code) is not None:
        heading = f"{code.title} on whole images: a network for pixels, as diffusers calls it."
        text = self_contained(heading, code.parts, code.face)
        (place / f"{code.file}.py").write_text(text, "utf-8")
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "DDIMPipeline",
        "_diffusers_version": diffusers.__version__,
        component.name: component.entry,
        "scheduler": ["diffusers", type(scheduler).__name__],
    }
    if not is_stock(component, trained, scheduler):
        index["_class_name"] = ["pixel_pipeline", "PixelPipeline"]
        index |= pipeline_settings(trained, sampling)
        heading = "Draws images with a network on raw pixels: classes, guidance, any noise."
        text = self_contained(heading, PIPELINE, pixel_pipeline.PixelPipeline)
        (folder / "pixel_pipeline.py").write_text(text, "utf-8")
    write_json(folder / "model_index.json", index)
    diffusion = trained.diffusion
    settings = {
        "model": {"kind": trained.model.kind, **arguments_of(trained.model)},
        "diffusion": diffusion.model_dump(
            mode="json", include={"schedule", "base_size", "prediction"}
        ),
        "sampling": sampling.model_dump(mode="json"),
        "is_scheduler_followed": is_followed,
    }
    write_json(folder / SETTINGS, settings)


def forget_origin(file: Path) -> None:
    """Removes from a network's settings where it was loaded from, as diffusers notes it."""
    settings = json.loads(file.read_text("utf-8"))
    if settings.pop("_name_or_path", None) is not None:
        write_json(file, settings)


def is_stock(component: Component, trained: TrainedModel, scheduler: Any) -> bool:
    """Whether diffusers' own DDIMPipeline samples a network."""
    known = PREDICTION_TYPES.get(trained.diffusion.prediction)
    is_plain = component.name == "unet" and not trained.model.num_classes
    return is_plain and scheduler.config.get("prediction_type") == known is not None


def pipeline_settings(trained: TrainedModel, sampling: Sampling) -> dict[str, Any]:
    """The settings of `PixelPipeline`. model_index.json holds no lists but those of modules."""
    config, guidance = trained.model.config, sampling.guidance
    is_guided = guidance.kind == "classifier-free"
    names = config.class_names
    return {
        "prediction": trained.diffusion.prediction,
        "clip_x0": sampling.clip_x0,
        "num_classes": config.num_classes,
        "knows_no_class": bool(config.num_classes and config.label_dropout),
        "id2label": {str(i): name for i, name in enumerate(names)} if names else None,
        "flow_shift": flow_shift(trained.diffusion, trained.model.image_shape[:2]),
        "num_inference_steps": sampling.steps,
        "guidance_scale": guidance.scale if is_guided else 1.0,
        "guidance_start": guidance.start if is_guided else 0.0,
        "guidance_end": guidance.end if is_guided else 1.0,
        "eta": sampling.eta,
    }


def self_contained(heading: str, parts: Parts, face: type) -> str:
    """A file of Python that holds definitions of several modules, and imports none of them.

    Args:
        heading: its first line.
        parts: the modules, in an order in which each uses only earlier ones.
        face: the class that diffusers looks for in it.
    """
    imports, definitions = [], []
    for module, names in parts:
        source = inspect.getsource(module)
        for node in ast.parse(source).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                imports.append(node)
            elif isinstance(node, ast.Expr):
                continue  # the module's docstring, or that of a constant
            elif names is None or _name_of(node) in names:
                definitions.append(_text_of(node, source.splitlines()))
    body = "\n\n\n".join(definitions)
    module_name = face.__module__.split(".")[-1]
    return f'''"""{heading}

Written by maskdm, from its own source. It needs torch and diffusers, not maskdm.
"""

{_imports_for(body, imports)}


{body}


# By this name diffusers finds the file again when the model is saved anew.
{face.__name__}.__module__ = "{module_name}"
'''


def _name_of(node: ast.stmt) -> str:
    """The name that a statement of a module defines."""
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0])
    return node.name if isinstance(node, ast.ClassDef | ast.FunctionDef) else ""


def _text_of(node: ast.stmt, lines: list[str]) -> str:
    """The lines of a definition, without the methods that are left out."""
    dropped: set[int] = set()
    for method in node.body if isinstance(node, ast.ClassDef) else []:
        if isinstance(method, ast.FunctionDef) and method.name in OMITTED:
            dropped |= {*range(_first_line(method) - 1, method.end_lineno + 1)}  # type: ignore[operator]
    kept = [
        lines[number - 1]
        for number in range(_first_line(node), node.end_lineno + 1)  # type: ignore[operator]
        if number not in dropped
    ]
    return "\n".join(kept)


def _first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))])


def _imports_for(body: str, nodes: list[ast.Import | ast.ImportFrom]) -> str:
    """The import statements whose names the code uses, without those of this package."""
    used = {node.id for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)}
    plain: dict[str, set[str]] = {}
    named: dict[str, set[str]] = {}
    for node in nodes:
        for alias in node.names:
            text = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
            module = alias.name if isinstance(node, ast.Import) else str(node.module)
            is_used = (alias.asname or alias.name.split(".")[0]) in used
            if is_used and module.split(".")[0] not in ("maskdm", "__future__"):
                kind = plain if isinstance(node, ast.Import) else named
                kind.setdefault(module, set()).add(text)
    blocks = []
    for is_pythons_own in (True, False):
        lines = [f"import {text}" for module in sorted(plain) for text in sorted(plain[module])
                 if _is_pythons(module) == is_pythons_own]  # fmt: skip
        lines += [f"from {module} import {', '.join(sorted(named[module]))}"
                  for module in sorted(named) if _is_pythons(module) == is_pythons_own]  # fmt: skip
        blocks.append("\n".join(lines))
    return "\n\n".join(block for block in blocks if block)


def _is_pythons(module: str) -> bool:
    return module.split(".")[0] in sys.stdlib_module_names


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file of UTF-8."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")

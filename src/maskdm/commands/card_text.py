"""A run's model card for the Hugging Face Hub, made from what the run's folder holds."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskdm.commands.evaluation_text import provenance
from maskdm.evaluation.records import Record
from maskdm.export.hub import SAMPLES, dataset_id, is_hub_model
from maskdm.families import BACKBONES
from maskdm.masks import effective_rate, mask_text
from maskdm.metrics import METRICS
from maskdm.recipe import Recipe, Stage
from maskdm.runs.find import training_of
from maskdm.runs.folder import read_starts
from maskdm.runs.load import Loaded
from maskdm.tokens import grid_shape
from maskdm.words import counted, duration, figure, flops_text, images_text

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

TASK = "unconditional-image-generation"
BY_CLASS = "class-conditional-image-generation"  # a tag: the Hub has no such task
CHANNELS = {1: "grey", 2: "grey with alpha", 3: "RGB", 4: "RGBA"}
PAPER = "Lei et al., *Masked Diffusion Models Are Fast Distribution Learners*, 2023"
NO_LICENSE = (
    "The author of this model has stated no licence, so it comes with no permission: ask before "
    "you use it."
)


@dataclass(frozen=True)
class Uploaded:
    """What a card is about.

    Attributes:
        repository: `owner/name`.
        folder: what is uploaded; it holds the exported model.
        recipe: as others may read it.
        samples: how the sheet of samples was drawn, in words.
        records: evaluations of these very weights, as others may read them.
        license: a licence's name on the Hub; None = its author named none.
        notes: Markdown of the author's; may be empty.
    """

    repository: str
    folder: Path
    recipe: Recipe
    samples: str
    records: Sequence[Record] = ()
    license: str | None = None
    notes: str = ""


def card_text(loaded: Loaded, uploaded: Uploaded) -> str:
    """The card: metadata in YAML, then Markdown."""
    from huggingface_hub import ModelCardData

    recipe = uploaded.recipe
    is_by_class = loaded.trained.model.num_classes > 0
    base = recipe.init if recipe.init and is_hub_model(recipe.init) else None
    dataset = dataset_id(recipe.data.source)
    is_masked = any(stage.mask.rate for stage in recipe.stages)
    results = [result for record in uploaded.records for result in eval_results(record)]
    data = ModelCardData(
        license=uploaded.license,
        library_name="diffusers" if _is_for_diffusers(uploaded.folder) else "maskdm",
        pipeline_tag=None if is_by_class else TASK,
        tags=[BY_CLASS if is_by_class else TASK, "diffusion", "maskdm"]
        + ["masked-pre-training"] * is_masked,
        datasets=[dataset] if dataset else None,
        base_model=base,
        model_name=uploaded.repository.split("/")[1],
        eval_results=results or None,
    )
    parts = [
        _introduction(loaded, uploaded),
        uploaded.notes.strip(),
        _use(uploaded),
        _data(loaded, uploaded),
        _recipe(loaded, recipe),
        _cost(loaded, recipe),
        _metrics(uploaded.records),
        _copies(uploaded.records),
        "## Licence\n\n" + (f"`{uploaded.license}`" if uploaded.license else NO_LICENSE),
        f"The method is that of {PAPER}.",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, parts)) + "\n"


def eval_results(record: Record) -> list[EvalResult]:
    """An evaluation's figures in the form that the Hub reads."""
    from huggingface_hub import EvalResult

    features, source = record["features"]["name"], record["reference"]["source"]
    results = []
    for name, one in record["metrics"].items():
        if not math.isfinite(one["value"]):
            continue
        about = {
            "features": features,
            "features_sha256": record["features"]["sha256"],
            "samples": record["samples"]["num"],
            "interval_95": one["interval"],
        }
        results.append(
            EvalResult(
                task_type=TASK,
                dataset_type=dataset_id(source) or source,
                dataset_name=source,
                metric_type="fid" if (name, features) == ("frechet", "inception") else name,
                metric_name=METRICS[name].title_in(features),
                metric_value=one["value"],
                metric_args={key: value for key, value in about.items() if value is not None},
            )
        )
    return results


def _introduction(loaded: Loaded, uploaded: Uploaded) -> str:
    model, recipe = loaded.trained.model, uploaded.recipe
    height, width, channels = model.image_shape
    num_params = sum(parameter.numel() for parameter in model.parameters())
    classes = f" of {counted(model.num_classes, 'class', 'classes')}" if model.num_classes else ""
    names = model.config.class_names or []
    text = (
        f"A diffusion model of pixels that draws images{classes}, {width}x{height} "
        f"{CHANNELS[channels]}: a {BACKBONES[model.kind].title} of {images_text(num_params)} "
        f"parameters, trained with maskdm on {recipe.data.source}."
    )
    listing = f"\n\nClasses: {', '.join(names)}." if names else ""
    return (
        f"# {uploaded.repository.split('/')[1]}\n\n{text}{listing}\n\n"
        f"![Samples]({SAMPLES})\n\n{uploaded.samples}, not selected."
    )


def _use(uploaded: Uploaded) -> str:
    name, folder = uploaded.repository, uploaded.folder
    has_code = any(folder.rglob("*.py"))  # networks and pipelines that diffusers does not have
    kind, how, more = "DiffusionPipeline", "With diffusers alone", ""
    if not _is_for_diffusers(folder):
        kind, how = "MaskDMPipeline", "As diffusers opens its pipelines, by this one's class"
    elif has_code:
        how += ", which then runs the Python files of this repository"
        more = ", trust_remote_code=True"
    package = "maskdm" if kind == "MaskDMPipeline" else "diffusers"
    ours = f'import maskdm\n\npipeline = maskdm.load("{name}")\nimages = pipeline(4, seed=0).images'
    theirs = f'from {package} import {kind}\n\npipeline = {kind}.from_pretrained("{name}"{more})'
    return (
        f"## Use\n\n```python\n{ours}\n```\n\n`maskdm sample {name} --num 64 --out grid.png` draws "
        f"a sheet, and `maskdm train RECIPE --init {name}` begins with these weights. {how}:\n\n"
        f"```python\n{theirs}\n```"
    )


def _data(loaded: Loaded, uploaded: Uploaded) -> str:
    data, run = uploaded.recipe.data, loaded.location.run
    height, width, channels = data.shape
    lines = [
        f"- Source: {data.source}",
        f"- Prepared: {width}x{height} {CHANNELS[channels]}, crop {data.crop}"
        + (", mirrored at random" if data.flip else ""),
    ]
    sha256 = (read_starts(run)[-1:] or [{}])[0].get("images_sha256") if run else None
    known = [one["reference"] for one in uploaded.records if "num" in one["reference"]]
    known = [one for one in known if one.get("sha256") == sha256]
    if known:
        lines.append(f"- Number: {counted(known[0]['num'], 'image')}")
    if data.fraction < 1 or data.limit:
        limit = f", at most {data.limit:,}" if data.limit else ""
        lines.append(f"- Trained on {100 * data.fraction:g} % of them{limit}")
    if data.held_out:
        share = f"{100 * data.held_out:g} %" if data.held_out < 1 else f"{data.held_out:,}"
        lines.append(f"- Held out from training: {share}")
    if sha256:
        lines.append(f"- SHA-256 of the prepared images: `{sha256}`")
    return "## Data\n\n" + "\n".join(lines)


def _recipe(loaded: Loaded, recipe: Recipe) -> str:
    rows = ["| stage | hidden | steps | batch | learning rate |", "|---|---|---|---|---|"]
    rows += [_row(stage, recipe) for stage in recipe.stages]
    diffusion = loaded.trained.diffusion
    training = training_of(loaded.location)
    total = sum(stage.steps for stage in recipe.stages)
    text = ""
    if training and training["step"] < total:
        text = (
            f"\n\nThese weights are from step {training['step']:,} of {total:,}, in the stage "
            f"{training['stage']}."
        )
    if recipe.init:
        text += f"\n\nThe training began with the weights of {recipe.init}."
    return (
        "## Recipe\n\n" + "\n".join(rows) + f"\n\nNoise schedule {diffusion.schedule}, prediction "
        f"{diffusion.prediction}, averaged weights. All settings are in `recipe.yaml`, with which "
        f"`maskdm train` repeats the run.{text}"
    )


def _row(stage: Stage, recipe: Recipe) -> str:
    rate = effective_rate(stage.mask, grid_shape(*recipe.data.shape[:2], recipe.model.patch_size))
    hidden = f"{100 * rate:.3g} %, {mask_text(stage.mask)}" if rate else "nothing"
    numbers = f"{stage.steps:,} | {stage.batch_size} | {stage.lr:g}"
    return f"| {stage.name} | {hidden} | {numbers} |"


def _cost(loaded: Loaded, recipe: Recipe) -> str:
    location, training = loaded.location, training_of(loaded.location)
    if training is None or location.run is None:
        return ""
    devices = []
    for start in read_starts(location.run):
        num = start.get("num_ranks", 1)
        precision = f" in {start['precision']}" if "precision" in start else ""
        devices.append(f"{f'{num} x ' if num > 1 else ''}{start['device']}{precision}")
    lines = [
        f"- Images seen: {training['images']:,}, in {training['step']:,} steps",
        f"- Compute: {flops_text(training['flops'])} of matrix products and convolutions",
        f"- Time of training: {duration(training['elapsed_sec'])}, without previews and measuring",
    ]
    lines += [f"- Device: {', then '.join(dict.fromkeys(devices))}"] if devices else []
    lines += ["- Not counted: the training of the weights it began with"] if recipe.init else []
    return "## Cost\n\n" + "\n".join(lines)


def _metrics(records: Sequence[Record]) -> str:
    if not records:
        return "## Metrics\n\nThese weights were not measured."
    parts = ["## Metrics"]
    for record in records:
        rows = ["| metric | value | 95 % interval |", "|---|---|---|"]
        for name, one in record["metrics"].items():
            title = METRICS[name].title_in(record["features"]["name"])
            interval = " to ".join(map(figure, one["interval"])) if one["interval"] else "-"
            rows.append(f"| {title} | {figure(one['value'])} | {interval} |")
        chance = record["chance"]
        if chance and "frechet" in record["metrics"]:
            title = METRICS["frechet"].title_in(record["features"]["name"])
            text = f"two disjoint parts of the real images, {chance['num']:,} each"
            rows.append(f"| {title} by chance: {text} | {figure(chance['frechet'])} | - |")
        lines = [f"- {title}: {text}" for title, text in provenance(record)]
        lines += [f"- note: {note}" for note in record["notes"]]
        parts += ["\n".join(rows), "\n".join([*lines, f"- date: {record['date']}"])]
    return "\n\n".join(parts)


def _copies(records: Sequence[Record]) -> str:
    reports = [record["memorization"] for record in records if record.get("memorization")]
    if not reports:
        return "## Copies of training images\n\nNot looked for."
    said = [reports[-1]["verdict"], reports[-1]["warning"]]
    sentences = [f"{text[0].upper()}{text[1:]}." for text in said if text]
    return "\n\n".join(["## Copies of training images", *sentences])


def _is_for_diffusers(folder: Path) -> bool:
    """Whether diffusers opens the folder without this package."""
    index: dict[str, Any] = json.loads((folder / "model_index.json").read_text("utf-8"))
    return index.get("_class_name") != "MaskDMPipeline"

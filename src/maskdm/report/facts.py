"""What a report says of one run, read from its folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskdm.evaluation.overfitting import rise_of_loss
from maskdm.evaluation.records import RECORDS, Record, most_telling_last, read_records
from maskdm.families import BACKBONES
from maskdm.masks import mask_text
from maskdm.metrics import METRICS, qualities
from maskdm.recipe import Recipe, Stage
from maskdm.recipe_files import load_recipe
from maskdm.report.charts import Band, Chart, Series, draw_chart
from maskdm.report.judgement import direction, judged, judged_loss
from maskdm.report.pictures import Picture, embedded, spread
from maskdm.runs.folder import read_class_names, read_starts
from maskdm.runs.lines import PROBES, Line, read_lines
from maskdm.runs.plan_file import read_plan
from maskdm.words import (
    COSTS,
    about,
    clock,
    counted,
    decimals_of,
    figure,
    fixed,
    flops_text,
    images_text,
    listed,
)

UNKNOWN = "–"
LABELS = {"images": "images seen", "flops": "compute", "elapsed_sec": "training time"}


@dataclass(frozen=True)
class Preview:
    """A preview of a run: at which step it was drawn, and the picture."""

    step: int
    title: str
    picture: Picture


@dataclass(frozen=True)
class Run:
    """All that lies in a run's folder and that a report shows.

    Attributes:
        name: of the run, as the report calls it.
        folder: its place.
        recipe: its settings.
        plan: what it was expected to cost; None = unknown.
        starts: of environment.json.
        lines, qualities: of metrics.jsonl and quality.jsonl.
        records: of evaluation.json.
        class_names: of its model; empty without classes.
    """

    name: str
    folder: Path
    recipe: Recipe
    plan: dict[str, Any] | None
    starts: list[dict[str, Any]]
    lines: list[Line]
    qualities: list[Line]
    records: list[Record]
    class_names: list[str]

    @property
    def step(self) -> int:
        """The last step of which something is known."""
        return max([0, *(line["step"] for line in (*self.lines, *self.qualities))])

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.recipe.num_steps > 0

    @property
    def spent(self) -> Line:
        """The newest line that knows what training has cost."""
        return max([{"step": 0}, *self.lines, *self.qualities], key=lambda line: line["step"])

    @property
    def state(self) -> str:
        """Whether the run is over, in words."""
        if self.is_finished:
            return "finished"
        if not self.step:
            return "no step logged yet"
        return f"unfinished: step {self.step:,} of {self.recipe.num_steps:,}"


def read_run(folder: Path, name: str | None = None) -> Run:
    """Reads a run's folder. Raises ValueError where it is none, or a file in it is damaged."""
    if not (folder / "recipe.yaml").is_file():
        why = "it has no recipe.yaml" if folder.exists() else "it does not exist"
        raise ValueError(f"{folder} is not a run's folder ({why})")
    keys = {"step", "stage", *(cost.key for cost in COSTS.values())}
    lines, measured = (
        [line for line in read_lines(folder / file) if keys <= line.keys()]
        for file in ("metrics.jsonl", "quality.jsonl")
    )
    return Run(
        name or folder.resolve().name,
        folder,
        load_recipe(folder / "recipe.yaml"),
        read_plan(folder),
        read_starts(folder),
        lines,
        measured,
        read_records(folder / RECORDS),
        read_class_names(folder) or [],
    )


def summary(run: Run) -> str:
    """What was trained and on what, in a sentence."""
    kind, shape = BACKBONES[run.recipe.model.kind].title, "×".join(map(str, run.recipe.data.shape))
    size = f" with {run.plan['num_params'] / 1e6:.3g} M parameters" if run.plan else ""
    num = f"{run.plan['num_train']:,} images" if run.plan else "images"
    stages = counted(len(run.recipe.stages), "stage")
    return f"{kind}{size}, trained on {num} ({shape}) from {run.recipe.data.source} in {stages}."


def tiles(run: Run) -> list[dict[str, str]]:
    """The few figures that come first: `label`, `value` and `note` of each."""
    spent = run.spent
    found = []
    for cost in COSTS.values():
        if cost.key in spent:
            found.append({"label": LABELS[cost.key], "value": cost.text(spent[cost.key])})
            found[-1]["note"] = "previews and measuring not counted" * (cost.key == "elapsed_sec")
    for line in run.qualities[-1:]:
        for name, what in (("dense_loss", "held-out images"), ("sliced", "")):
            if isinstance(line.get(name), (int, float)):
                title = METRICS[name].title_in(line.get("features", ""), short=True)
                what = what or f"{line['num']:,} samples"
                found.append(_figure_tile(title, line[name], line.get(f"{name}_error"), what))
    for record in most_telling_last(run.records)[-1:]:
        if one := record["metrics"].get("frechet"):
            title = METRICS["frechet"].title_in(record["features"]["name"])
            what = f"{record['samples']['num']:,} samples, {record['features']['name']}"
            found.append(_figure_tile(title, one["value"], one.get("error"), what))
    return found


def settings_of(run: Run) -> list[tuple[str, str]]:
    """Data, model, noise and machine: titles and texts."""
    recipe, plan = run.recipe, run.plan or {}
    data, model = recipe.data, recipe.model
    height, width, channels = data.shape
    kinds = {1: "grey", 2: "grey and alpha", 3: "RGB", 4: "RGBA"}
    images = [f"{data.source}, {height}×{width} pixels, {kinds[channels]}"]
    if plan:
        images.append(f"{plan['num_train']:,} of {plan['num_images']:,} images trained on")
    if plan.get("num_held_out"):
        images.append(f"{plan['num_held_out']:,} held out")
    images += ["mirrored at random"] * data.flip
    if run.class_names:
        num = counted(len(run.class_names), "class", "classes")
        images.append(f"{num}: {listed(run.class_names, 12)}")
    network = [BACKBONES[model.kind].title, f"patches of {model.patch_size}×{model.patch_size}"]
    if "embed_dim" in BACKBONES[model.kind].settings:
        network.append(f"width {model.embed_dim}, depth {model.depth}, {model.num_heads} heads")
    if plan:
        network.append(f"{plan['num_params']:,} parameters, {plan['num_patches']} tokens an image")
    if recipe.init:
        network.append(f"began from {recipe.init}")
    noise, sampling = recipe.diffusion, recipe.sampling
    found = [
        ("Images", "; ".join(images)),
        ("Network", "; ".join(network)),
        (
            "Noise",
            f"schedule {noise.schedule}; predicts {noise.prediction}; weight "
            f"{noise.weighting.kind}; times {noise.times.kind}",
        ),
        ("Sampling", f"{sampling.steps} steps of {sampling.sampler}"),
    ]
    if run.starts:
        last = run.starts[-1]
        machine = [f"{last.get('num_ranks', 1)} × {last.get('device', UNKNOWN)}"]
        machine += [last["precision"]] if last.get("precision") else []
        software = [f"maskdm {last.get('maskdm', UNKNOWN)}"]
        software += [f"{k} {v}" for k, v in (last.get("packages") or {}).items() if k == "torch"]
        found += [("Machine", "; ".join(machine)), ("Software", "; ".join(software))]
    return found


def starts(run: Run) -> list[dict[str, Any]]:
    """When the run was started and continued: `date`, `command` and `changes` of its settings."""
    return [
        {
            "date": (start.get("started") or "")[:16],
            "command": start.get("command") or "",
            "changes": start.get("changes") or [],
        }
        for start in run.starts
    ]


def stage_rows(run: Run) -> list[dict[str, str]]:
    """Planned against spent, a row for each stage and one for all; texts."""
    planned = {one["name"]: one for one in (run.plan or {}).get("stages", [])}
    rows, sums = [], dict.fromkeys(("steps", "images", "flops", "elapsed_sec"), 0.0)
    for stage in run.recipe.stages:
        spent = _spent_in(run, stage)
        sums = {key: sums[key] + spent[key] for key in sums}
        plan = planned.get(stage.name, {"images": stage.steps * stage.batch_size})
        plan = {**plan, "steps": stage.steps}
        name = f"{stage.name}: {_hidden_text(stage, planned.get(stage.name))}"
        rows.append(_row(name, plan, spent))
    whole = {key: (run.plan or {}).get(key) for key in ("flops", "seconds")}
    whole |= {"steps": run.recipe.num_steps}
    whole |= {"images": sum(stage.steps * stage.batch_size for stage in run.recipe.stages)}
    return [*rows, _row("in all", whole, sums)]


def budget_text(run: Run) -> str:
    """What the run was allowed to cost; empty without a budget."""
    budget = run.recipe.budget
    if budget.hours:
        return f"Budget: {about(3600 * budget.hours)}, with previews and measuring."
    if budget.flops:
        return f"Budget: {flops_text(budget.flops)}."
    if budget.images:
        return f"Budget: {images_text(budget.images)} images."
    return f"Budget: {budget.epochs:g} passes over the images." if budget.epochs else ""


def decision_text(line: Line) -> str:
    """What forks have shown: `whole gains 0.0012 ± 0.0003 more in dense loss ...: hide ends`.

    Args:
        line: of probes.jsonl.
    """
    stage, after, error = line["stage"], line["next"], line["gain_error"]
    if line["gain"] is None:
        return f"a fork of {stage} diverged: {stage} goes on"
    gain = f"{abs(line['gain']):.2g}" + ("" if error is None else f" ± {error:.1g}")
    side = "more" if line["gain"] >= 0 else "less"
    text = f"{after} gains {gain} {side} in dense loss than {stage} for the same FLOPs: {stage} "
    return text + ("ends here" if line["ends"] else "goes on")


def decisions(run: Run) -> list[str]:
    """What forks of the run have shown, in sentences; empty without `until: plateau`."""
    lines = read_lines(run.folder / PROBES)
    return [f"Step {line['step']:,}: {decision_text(line)}." for line in lines]


def warnings(run: Run) -> list[str]:
    """What a reader should know before believing the rest."""
    found = [*(run.plan or {}).get("warnings", [])]
    if run.qualities and (rise := rise_of_loss(run.qualities)):
        found.append(f"{rise[0].upper()}{rise[1:]}.")
    for record in most_telling_last(run.records)[-1:]:
        found += record.get("notes", [])
        for name, row in METRICS.items():
            report = record.get(name) if row.is_report else None
            found += [report["warning"]] if report and report["warning"] else []
    changes = [change for start in run.starts for change in start.get("changes") or []]
    if changes:
        found.append(f"settings changed while it was trained: {listed(changes, 12)}")
    return [f"{one[0].upper()}{one[1:]}" for one in dict.fromkeys(found)]


def charts(run: Run) -> list[Chart]:
    """Loss and quality over what training has cost, with the stages shaded."""
    stages = [stage.name for stage in run.recipe.stages]
    bands = stage_bands(run)
    losses = []
    for number, name in enumerate(stages):
        rows = [line for line in run.lines if line["stage"] == name]
        losses.append(series_of(name, rows, "loss", tone=number))
    found = [
        draw_chart(
            "Training loss",
            losses,
            bands,
            "The mean over the patches that the network sees: not comparable between stages."
            * (len(stages) > 1),
        )
    ]
    lines = run.qualities
    known = [
        series_of("held-out images", lines, "dense_loss", tone=0),
        series_of("training images", lines, "dense_loss_train", tone=1, is_dashed=True),
    ]
    note = "On whole images, the same for every mask and weighting."
    said = judged_loss(lines[-1]) if lines else ""
    found.append(draw_chart("Dense denoising loss", known, bands, f"{note} {said}".strip()))
    for name in qualities():
        if "model" in METRICS[name].needs or not any(name in line for line in lines):
            continue
        row, last = METRICS[name], next(line for line in lines[::-1] if name in line)
        note = f"{last['num']:,} samples, features {last['features']}. {direction(name)}"
        title = row.title_in(last["features"])
        one = series_of(title, lines, name, has_errors=True)
        found.append(draw_chart(title[0].upper() + title[1:], [one], bands, note, row.unit))
    return [chart for chart in found if chart is not None]


def series_of(
    name: str,
    lines: Sequence[Line],
    key: str,
    tone: int = 0,
    is_dashed: bool = False,
    has_errors: bool = False,
) -> Series:
    """A column of metrics.jsonl or quality.jsonl over costs, from the lines that have it."""
    kept = [line for line in lines if isinstance(line.get(key), (int, float))]
    costs = {x: [line[cost.key] for line in kept] for x, cost in COSTS.items()}
    errors = [line.get(f"{key}_error") or 0.0 for line in kept] if has_errors else None
    return Series(name, costs, [line[key] for line in kept], errors, tone, is_dashed)


def stage_bands(run: Run) -> list[Band]:
    """The stages that have begun, from where to where."""
    bands, before = [], dict.fromkeys(COSTS, 0.0)
    for number, stage in enumerate(run.recipe.stages):
        rows = [line for line in run.lines if line["stage"] == stage.name]
        if rows:
            now = {x: float(rows[-1][cost.key]) for x, cost in COSTS.items()}
            bands.append(Band(stage.name, {x: (before[x], now[x]) for x in COSTS}, number))
            before = now
    return bands


def previews(run: Run) -> list[Preview]:
    """Evenly spread previews of the run, the last one last."""
    files = sorted((run.folder / "samples").glob("step-*.png"))
    found = []
    for file in spread([one for one in files if one.stem.removeprefix("step-").isdigit()]):
        step = int(file.stem.removeprefix("step-"))
        end, stages = 0, run.recipe.stages
        ends = [end := end + stage.steps for stage in stages]
        name = next((s.name for s, e in zip(stages, ends, strict=True) if step <= e), "")
        title = f"step {step:,}" + (f", {name}" if name else "")
        if (picture := embedded(file, f"Samples at {title}")) is not None:
            found.append(Preview(step, title, picture))
    return found


def evaluations(run: Run) -> list[dict[str, Any]]:
    """The newest record in each kind of features: `title`, `rows` and `reports`."""
    newest = {record["features"]["name"]: record for record in most_telling_last(run.records)}
    return [_evaluation(record) for record in newest.values()]


def _evaluation(record: Record) -> dict[str, Any]:
    name, samples, reference = record["features"]["name"], record["samples"], record["reference"]
    at = f" at step {record['training']['step']:,}" if record.get("training") else ""
    against = f"{reference['num']:,} images" if reference.get("num") else "statistics"
    rows = []
    for metric, one in record["metrics"].items():
        title = METRICS[metric].title_in(name) if metric in METRICS else metric
        ends = one.get("interval")
        rows.append(
            {
                "title": title,
                "value": figure(one["value"]),
                "interval": f"{figure(ends[0])} to {figure(ends[1])}" if ends else UNKNOWN,
                "words": judged(metric, one, record),
            }
        )
    reports = [
        {"title": row.title, "words": record[metric]["verdict"]}
        for metric, row in METRICS.items()
        if row.is_report and record.get(metric)
    ]
    title = f"{samples['num']:,} samples{at} against {against} from {reference['source']}"
    return {"title": title, "features": name, "rows": rows, "reports": reports}


def _spent_in(run: Run, stage: Stage) -> dict[str, float]:
    """What a stage has cost so far, from the lines of metrics.jsonl."""
    keys = ("step", "images", "flops", "elapsed_sec")
    before, now = dict.fromkeys(keys, 0.0), None
    for line in run.lines:
        if line["stage"] == stage.name:
            now = line
        elif now is None:
            before = {key: float(line[key]) for key in keys}
    spent = {key: float(now[key]) - before[key] if now else 0.0 for key in keys}
    return {"steps": spent.pop("step"), **spent}


def _hidden_text(stage: Stage, plan: dict[str, Any] | None) -> str:
    """What a stage hides: `50 % hidden, patches`, as it was rounded where that is known."""
    if not stage.mask.rate:
        return "whole images"
    hidden = stage.mask.rate if plan is None else plan["hidden"]
    return f"{100 * hidden:.3g} % hidden, {mask_text(stage.mask)}"


def _row(name: str, plan: dict[str, Any], spent: dict[str, float]) -> dict[str, str]:
    def cell(key: str, text: Callable[[float], str], planned: str = "") -> str:
        known = plan.get(planned or key)
        return text(spent[key]) + ("" if known is None else f" of {text(known)}")

    return {
        "name": name,
        "steps": cell("steps", lambda num: f"{num:,.0f}"),
        "images": cell("images", images_text),
        "flops": cell("flops", flops_text),
        "time": cell("elapsed_sec", clock, "seconds"),
        "part": f"{100 * min(1.0, spent['steps'] / plan['steps']) if plan['steps'] else 0:.0f}",
    }


def _figure_tile(title: str, value: float, error: float | None, note: str) -> dict[str, str]:
    if error:
        decimals = decimals_of([error])
        note = f"± {fixed(error, decimals)} (standard error), {note}"
        return {"label": title, "value": fixed(value, decimals), "note": note}
    return {"label": title, "value": figure(value), "note": note}

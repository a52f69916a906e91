"""A table or figure of the paper, run again: every recipe, its control, seeds, and a page."""

from __future__ import annotations

import functools
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from maskdm.choices import named
from maskdm.engine import from_main
from maskdm.evaluation.evaluate import evaluate_model, measured_against
from maskdm.evaluation.records import RECORDS, Record, add_record, is_recorded, read_records
from maskdm.evaluation.samples import weights_sha256
from maskdm.paper.scales import SCALES, at_scale
from maskdm.paper.tables import experiments, paper_tables
from maskdm.recipe import Recipe
from maskdm.recipe_files import load_recipe
from maskdm.runs.find import kept_averages
from maskdm.runs.load import load_model
from maskdm.settings import changed
from maskdm.training.controls import dense_control
from maskdm.training.trainer import train
from maskdm.words import decimals_of, fixed

FIG2 = "fig2"  # which is of no images, and has no packaged recipe: `fig2.py`


@dataclass(frozen=True)
class Wanted:
    """What is to be repeated.

    Attributes:
        target: `table1a`, `fig4b`, or what several begin with: `table1`.
        scale: of `SCALES`.
        sources: other images than the scale's; the second for experiments on other data.
        flops: of the most expensive recipe, instead of the scale's.
        seeds: how many.
        with_control: whether each masked recipe's dense control is trained, too.
        only: of its recipes, these (and the primers they need); () = all.
    """

    target: str
    scale: str
    sources: tuple[str, ...] = ()
    flops: float | None = None
    seeds: int = 1
    with_control: bool = True
    only: tuple[str, ...] = ()

    @property
    def recipes(self) -> list[str]:
        """What is to be trained, in order. Raises ValueError for what the target does not have."""
        return recipes_of(self.target, self.only)


@dataclass
class Row:
    """What came of a recipe; it grows seed by seed.

    Attributes:
        recipe: its name.
        flops: that its training took.
        found: its Frechet distance, for each seed.
        half: half of the 95 % interval over samples, for each seed; None = unknown.
        control: the distance of its dense control, for each seed.
        features: in which they were measured.
        source: of the images.
        runs, controls: the folders.
    """

    recipe: str
    flops: int = 0
    found: list[float] = field(default_factory=list)
    half: list[float | None] = field(default_factory=list)
    control: list[float] = field(default_factory=list)
    features: str = ""
    source: str = ""
    runs: list[Path] = field(default_factory=list)
    controls: list[Path] = field(default_factory=list)

    def add(self, run: Path, record: Record) -> None:
        """Takes up the evaluation of another seed's run."""
        figure = record["metrics"]["frechet"]
        interval = figure["interval"]
        self.flops, self.features = record["training"]["flops"], record["features"]["name"]
        self.source = record["reference"]["source"]
        self.found.append(figure["value"])
        self.half.append(None if interval is None else (interval[1] - interval[0]) / 2)
        self.runs.append(run)

    def add_control(self, run: Path, record: Record) -> None:
        """Takes up the evaluation of its control."""
        self.control.append(record["metrics"]["frechet"]["value"])
        self.controls.append(run)

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.found)


def targets() -> list[str]:
    """What can be repeated: each table and figure, and those of one number together."""
    names = list(experiments())
    return sorted({*names, *(name.rstrip("abc") for name in names), FIG2})


def recipes_of(target: str, only: Sequence[str] = ()) -> list[str]:
    """Names of a target's recipes and of those whose primers they need, which come first.

    Args:
        target: one of `targets`.
        only: these of its recipes; none = all.

    Raises ValueError for an unknown target, and for recipes that it does not have.
    """
    named(target, dict.fromkeys(targets()), "table or figure")
    chosen = [
        recipe
        for name, one in experiments().items()
        if name == target or name.rstrip("abc") == target
        for recipe in one.recipes
    ]
    for name in only:
        named(name, dict.fromkeys(chosen), f"recipe of {target}")
    chosen = [name for name in chosen if name in only or not only]
    primers = [primer_of(name)[0] for name in chosen if name in paper_tables()["primers"]]
    return list(dict.fromkeys([*primers, *chosen]))


def primer_of(recipe: str) -> tuple[str, str]:
    """The recipe and stage whose weights another one begins with."""
    name, _, stage = str(paper_tables()["primers"][recipe]).partition("@")
    return name, stage


def reproduce(wanted: Wanted, out: Path, show: bool = False) -> Iterator[Row | None]:
    """Trains and measures what is missing, and gives the rows one after the other.

    Everything lies in `out`: RECIPE-SEED and RECIPE-SEED-dense are runs. Called again after a kill
    it goes on. Gives None, and ends, where a signal has stopped a training after saving. To be
    called on every rank.

    Args:
        wanted: what.
        out: where.
        show: whether trainings print what they do.

    Raises ValueError for what cannot be trained; what was done before remains.
    """
    recipes, alike = _recipes(wanted), _alike(wanted, out)
    for name in wanted.recipes:
        for seed in range(wanted.seeds):
            run, whole = out / f"{name}-{seed}", _seeded(recipes[name], name, out, seed)
            if not train(whole, run, show=show).finished:
                yield None
                return
            measure(run, whole)
            if wanted.with_control and name in alike:
                control = _control(alike[name], out, seed) or run.with_name(f"{run.name}-dense")
                if not train(run, control, show=show, control="dense").finished:
                    yield None
                    return
                measure(control, load_recipe(control / "recipe.yaml"))
        rows = from_main(lambda: rows_of(wanted, out))
        yield next(row for row in rows if row.recipe == name)  # noqa: B023 - used at once


def rows_of(wanted: Wanted, out: Path) -> list[Row]:
    """What has been measured in a folder of all of the target's recipes, seed by seed."""
    recipes, alike = _recipes(wanted), _alike(wanted, out)
    rows = []
    for name, recipe in recipes.items():
        row = Row(name)
        for run in sorted(out.glob(f"{name}-*")):
            seed = run.name.removeprefix(f"{name}-")
            if seed.isdigit() and (record := _last_record(run, recipe)):
                row.add(run, record)
                control = _control(alike.get(name, ()), out, int(seed))
                if control and (found := _last_record(control)):
                    row.add_control(control, found)
        rows += [row] if row.runs else []
    return rows


@functools.lru_cache(maxsize=4)  # asked for again for each row
def _recipes(wanted: Wanted) -> dict[str, Recipe]:
    """All recipes of a target at a scale, by name: where only some are wanted, in their ratio."""
    scale = named(wanted.scale, SCALES, "scale")
    if scale.flops is None and (wanted.sources or wanted.flops is not None):
        raise ValueError(f"--scale {wanted.scale} is as in the paper: leave out --source, --flops")
    if wanted.flops is not None and wanted.flops <= 0:
        raise ValueError(f"--flops {wanted.flops:g}: above 0")
    recipes = {name: load_recipe(name) for name in recipes_of(wanted.target)}
    return at_scale(recipes, scale, wanted.sources, wanted.flops)


def _seeded(recipe: Recipe, name: str, out: Path, seed: int) -> Recipe:
    """A recipe with a seed and, where another's primer is its beginning, that of this seed."""
    if name not in paper_tables()["primers"]:
        return changed(recipe, seed=seed)
    other, stage = primer_of(name)
    return changed(recipe, seed=seed, init=f"{out / f'{other}-{seed}'}@{stage}")


@functools.lru_cache(maxsize=4)
def _alike(wanted: Wanted, out: Path) -> dict[str, list[str]]:
    """For each masked recipe those that have the same dense control: one is trained for all."""
    controls = {
        name: dense_control(_seeded(recipe, name, out, 0)).to_yaml()
        for name, recipe in _recipes(wanted).items()
        if any(stage.mask.rate for stage in recipe.stages)
    }
    return {
        name: [other for other in controls if controls[other] == control]
        for name, control in controls.items()
    }


def _control(names: Sequence[str], out: Path, seed: int) -> Path | None:
    """The control of a seed that was begun for one of these recipes; None where there is none."""
    folders = [out / f"{name}-{seed}-dense" for name in names]
    return next((folder for folder in folders if (folder / "recipe.yaml").is_file()), None)


def _last_record(run: Path, recipe: Recipe | None = None) -> Record | None:
    """The evaluation of a finished run's model; None without it, or for a run of other stages."""
    if not (run / "recipe.yaml").is_file():
        return None
    own = load_recipe(run / "recipe.yaml")
    if recipe and (own.stages, own.data.source) != (recipe.stages, recipe.data.source):
        return None
    found = [
        record
        for record in read_records(run / RECORDS)
        if (record["training"] or {}).get("step") == own.num_steps
        and "frechet" in record["metrics"]
    ]
    return found[-1] if found else None


def measure(run: Path, recipe: Recipe) -> None:
    """Evaluates a run's model, and before it the averages that it has kept.

    What was measured before is not drawn again. To be called on every rank.
    """
    evaluation, path = changed(recipe.evaluation, metrics=("frechet",)), run / RECORDS
    against: Record | None = None
    for place in [*kept_averages(run), run]:
        loaded = load_model(str(place))
        against = against or measured_against(loaded, evaluation)
        sha256 = weights_sha256(loaded.trained.model)
        how = (loaded.sampling, evaluation, (0,), against)
        if not is_recorded(from_main(lambda: read_records(path)), sha256, *how):
            folder = run / "evaluation" / place.name
            record = evaluate_model(loaded, evaluation, folder=folder).record
            record["samples"]["ema"] = None
            drawn = None if place == run else folder  # those of a curve would fill the disk
            from_main(functools.partial(_keep, path, record, drawn))


def _keep(path: Path, record: Record, drawn: Path | None) -> None:
    add_record(path, record)
    if drawn is not None:
        shutil.rmtree(drawn, ignore_errors=True)


def number(values: Sequence[float]) -> str:
    """A mean, with its standard deviation where there are several: `1.23 ± 0.04`."""
    if not values:
        return ""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return fixed(mean, None)
    spread = statistics.stdev(values)
    decimals = decimals_of([spread])
    return f"{fixed(mean, decimals)} ± {fixed(spread, decimals)}"

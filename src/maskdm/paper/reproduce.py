"""A table or figure of the paper, run again: every recipe, its control, seeds, and a page."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from maskdm.choices import named
from maskdm.evaluation.evaluate import evaluate_model
from maskdm.evaluation.records import RECORDS, Record, add_record, is_recorded, read_records
from maskdm.evaluation.samples import weights_sha256
from maskdm.paper.scales import SCALES, at_scale
from maskdm.paper.tables import experiments, paper_tables
from maskdm.recipe import Recipe
from maskdm.recipe_files import load_recipe
from maskdm.runs.find import kept_averages
from maskdm.runs.load import load_model
from maskdm.settings import changed
from maskdm.training.planning import dense_control
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
        control: the same of its dense control.
        features: in which they were measured.
        runs: their folders.
    """

    recipe: str
    flops: int = 0
    found: list[float] = field(default_factory=list)
    half: list[float | None] = field(default_factory=list)
    control: list[float] = field(default_factory=list)
    features: str = ""
    runs: list[Path] = field(default_factory=list)

    def add(self, run: Path, record: Record) -> None:
        """Takes up the evaluation of another seed's run."""
        figure = record["metrics"]["frechet"]
        interval = figure["interval"]
        self.flops, self.features = record["training"]["flops"], record["features"]["name"]
        self.found.append(figure["value"])
        self.half.append(None if interval is None else (interval[1] - interval[0]) / 2)
        self.runs.append(run)

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
    it goes on. Gives None, and ends, where a signal has stopped a training after saving.

    Args:
        wanted: what.
        out: where.
        show: whether trainings print what they do.

    Raises ValueError for what cannot be trained; what was done before remains.
    """
    names, scale = wanted.recipes, named(wanted.scale, SCALES, "scale")
    recipes = {name: load_recipe(name) for name in recipes_of(wanted.target)}
    recipes = at_scale(recipes, scale, wanted.sources, wanted.flops)  # all keep their ratio
    controls: dict[str, float] = {}  # rows of equal FLOPs and fine-tuning share one
    for name in names:
        row, recipe = Row(name), recipes[name]
        for seed in range(wanted.seeds):
            run = out / f"{name}-{seed}"
            whole = changed(recipe, seed=seed, **_beginning(name, out, seed))
            if not train(whole, run, show=show).finished:
                yield None
                return
            row.add(run, measured(run, whole))
            if wanted.with_control and any(stage.mask.rate for stage in whole.stages):
                alike = dense_control(whole).to_yaml()
                if alike not in controls:
                    control = run.with_name(f"{run.name}-dense")
                    if not train(run, control, show=show, control="dense").finished:
                        yield None
                        return
                    found = measured(control, load_recipe(control / "recipe.yaml"))
                    controls[alike] = found["metrics"]["frechet"]["value"]
                row.control.append(controls[alike])
        yield row


def _beginning(name: str, out: Path, seed: int) -> dict[str, str]:
    """The setting of the weights that a recipe begins with, where these are another's primer."""
    if name not in paper_tables()["primers"]:
        return {}
    other, stage = primer_of(name)
    return {"init": f"{out / f'{other}-{seed}'}@{stage}"}


def measured(run: Path, recipe: Recipe) -> Record:
    """The evaluation of a run's model, and before it of the averages that it has kept.

    What was measured before is not drawn again.
    """
    evaluation = changed(recipe.evaluation, metrics=("frechet",))
    for place in [*kept_averages(run), run]:
        loaded, path = load_model(str(place)), run / RECORDS
        sha256, records = weights_sha256(loaded.trained.model), read_records(path)
        how = (loaded.sampling, evaluation, (0,), recipe.data.source)
        if not is_recorded(records, sha256, *how):
            folder = run / "evaluation" / place.name
            record = evaluate_model(loaded, evaluation, folder=folder).record
            record["samples"]["ema"] = None
            add_record(path, record)
            records = read_records(path)
    return next(one for one in reversed(records) if one["samples"]["weights_sha256"] == sha256)


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

"""Which recipe reaches the best quality for its FLOPs: runs a table of experiments, unattended.

    python benchmarks/quality.py benchmarks/quality.yaml [--only NAME ...] [--list] [--alone]

Each trial trains one recipe, draws samples, measures them and appends a line to
`benchmarks/results/quality.jsonl`; trials whose line is there are skipped. A killed run goes on
where it stopped. Several processes may work on one table side by side: each claims the trials that
it runs, and waits for those of others that decide what comes next. `--alone` says that nothing else
ran on the machine: only then do a line's seconds count.
The head of `benchmarks/quality.yaml` explains the table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import yaml
from filelock import FileLock, Timeout

from maskdm.evaluation.evaluate import evaluate_model
from maskdm.models.build import build_model
from maskdm.recipe import Recipe
from maskdm.recipe_files import differences, merged, migrated
from maskdm.runs.lines import read_lines
from maskdm.runs.load import load_model
from maskdm.settings import changed
from maskdm.training.trainer import train
from maskdm.training.work import stage_work

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "quality.jsonl"
WORK = Path("runs") / "quality"


@dataclass(frozen=True)
class Trial:
    """One training run.

    Attributes:
        experiment, variant: their names in the table.
        lr: peak learning rate of each stage.
        flops: budget of the whole training.
        seed: of weights, order, masks, times and noise.
        recipe: what is trained.
    """

    experiment: str
    variant: str
    lr: tuple[float, ...]
    flops: float
    seed: int
    recipe: Recipe

    @property
    def key(self) -> dict[str, Any]:
        """What tells a trial from all others."""
        return {
            "experiment": self.experiment,
            "variant": self.variant,
            "lr": list(self.lr),
            "budget": self.flops,
            "seed": self.seed,
        }

    @property
    def name(self) -> str:
        """The same in one word, for a folder."""
        rates = "+".join(f"{lr:g}" for lr in dict.fromkeys(self.lr))
        return f"{self.experiment}_{self.variant}_{rates}_{self.flops:.2g}_{self.seed}"


class Table:
    """Experiments of a file, whose later trials may depend on results of earlier ones.

    Args:
        experiments: by name, as the file has them.
        only: experiments, or trials' first letters; none = all.
    """

    def __init__(self, experiments: dict[str, Any], only: list[str]) -> None:
        starts = tuple(only)
        self._experiments = {
            name: content
            for name, content in experiments.items()
            if not only or name.startswith(starts) or any(one.startswith(name) for one in only)
        }
        self._made: dict[tuple[Any, ...], Trial] = {}
        self._work: dict[tuple[str, str], list[int]] = {}

    def trials(self, lines: list[dict[str, Any]]) -> Iterator[Trial]:
        """All trials that are known to be wanted, given these results, in the table's order."""
        for experiment, content in self._experiments.items():
            for round_ in content["rounds"]:
                flops = float(round_.get("flops", content["flops"]))
                for variant, wanted in _variants(round_):
                    key = {"experiment": experiment, "variant": variant, "budget": flops}
                    for lr in rates_wanted(wanted, tried_rates(lines, key)):
                        for seed in round_["seeds"]:
                            yield self._trial(experiment, variant, lr, flops, seed)

    def _trial(self, experiment: str, variant: str, lr: Any, flops: float, seed: int) -> Trial:
        key = (experiment, variant, tuple(lr) if isinstance(lr, list) else lr, flops, seed)
        if key not in self._made:
            content = self._experiments[experiment]
            changes = content["variants"][variant] or {}
            stages = changes.get("stages", [{"share": 1}])
            rates = tuple(lr) if isinstance(lr, list) else (lr,) * len(stages)
            rows = [
                {"name": f"stage-{i}", "steps": 1, "lr": rate, **content["stage"], **stage}
                for i, (stage, rate) in enumerate(zip(stages, rates, strict=True))
            ]
            rows[-1].setdefault("lr_schedule", "cosine")
            shares = [row.pop("share") for row in rows]
            settings = merged(content["recipe"], {k: changes[k] for k in changes if k != "stages"})
            recipe = Recipe(**settings, stages=rows, seed=seed, log_every=50, preview_every=10**9)
            for row, share, work in zip(
                rows, shares, self._step_flops(experiment, variant, recipe), strict=True
            ):
                row["steps"] = max(1, round(flops * share / sum(shares) / work))
            every = max(1, sum(row["steps"] for row in rows) // content.get("evaluations", 6))
            recipe = Recipe(**{**recipe.model_dump(), "stages": rows, "checkpoint_every": every,
                               "evaluate_every": every, "keep_checkpoints": 1})  # fmt: skip
            self._made[key] = Trial(experiment, variant, rates, flops, seed, recipe)
        return self._made[key]

    def _step_flops(self, experiment: str, variant: str, recipe: Recipe) -> list[int]:
        """FLOPs of a step of each stage, whatever the rates and the budget."""
        key = experiment, variant
        if key not in self._work:
            self._work[key] = [one.step_flops for one in stage_work(recipe, build_model(recipe))]
        return self._work[key]


def tried_rates(lines: list[dict[str, Any]], key: dict[str, Any]) -> dict[float, float]:
    """Distances by learning rate of the trials with seed 0 whose stages share one rate."""
    return {
        line["lr"][0]: line["metrics"]["frechet"]["value"]
        for line in lines
        if line["seed"] == 0
        and len(set(line["lr"])) == 1
        and all(line[name] == value for name, value in key.items())
    }


def rates_wanted(wanted: Any, tried: dict[float, float]) -> list[Any]:
    """The learning rates that a round asks for, as far as they are known.

    Args:
        wanted: a list of rates; `{bracket: [...]}`: these, then half and twice the best, until the
            best one lies between two that are worse; `best`: the best one, once it does.
        tried: distances by rate.
    """
    if isinstance(wanted, list):
        return wanted
    best = min(tried, key=tried.__getitem__, default=0.0)
    around = [best / 2, best * 2]
    if wanted == "best":
        return [best] if tried and set(around) <= tried.keys() else []
    first = [float(rate) for rate in wanted["bracket"]]
    return list(dict.fromkeys(first + around)) if set(first) <= tried.keys() else first


def _variants(round_: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """A round's variants with their learning rates: all share one list, or each has its own."""
    variants = round_["variants"]
    if isinstance(variants, dict):
        yield from variants.items()
    else:
        yield from ((variant, round_["lr"]) for variant in variants)


def is_done(trial: Trial, lines: list[dict[str, Any]]) -> bool:
    """Whether the results hold a trial. Raises ValueError where its settings have changed since."""
    for line in lines:
        if all(line[name] == value for name, value in trial.key.items()):
            changed = differences(Recipe(**migrated(line["recipe"])), trial.recipe)
            if changed:
                raise ValueError(
                    f"{trial.name} was run with other settings ({'; '.join(map(str, changed))}): "
                    "give the variant another name"
                )
            return True
    return False


def run_trial(trial: Trial, work: Path, data: Path, alone: bool, how: str) -> dict[str, Any] | None:
    """Trains and measures a trial; None = stopped by a signal after saving."""
    folder, recipe = work / trial.name, changed(trial.recipe, compile=how)
    if recipe.init is not None:  # another trial's name
        recipe = changed(recipe, init=str(work / recipe.init))
    if (path := data / recipe.data.source).exists():
        recipe = changed(recipe, data=changed(recipe.data, source=str(path)))
    if (path := data / recipe.evaluation.features).exists():
        recipe = changed(recipe, evaluation=changed(recipe.evaluation, features=str(path)))
    if not train(recipe, folder, show=False).finished:
        return None
    evaluated = evaluate_model(load_model(folder))
    record, quality = evaluated.record, read_lines(folder / "quality.jsonl")
    last = quality[-1]
    copies = record["memorization"] or {}
    line = {
        **common.facts("quality"),
        **trial.key,
        "alone": alone,
        "steps": [stage.steps for stage in trial.recipe.stages],
        "images": last["images"],
        "flops": last["flops"],
        "train_sec": round(last["elapsed_sec"], 1),
        "num_params": sum(p.numel() for p in build_model(trial.recipe).parameters()),
        "dense_loss": last["dense_loss"],
        "dense_loss_train": last["dense_loss_train"],
        "by_time": last["dense_loss_by_time"],
        "metrics": {
            name: {key: one[key] for key in ("value", "interval")}
            for name, one in record["metrics"].items()
        },
        "chance": record["chance"],
        "num_samples": record["samples"]["num"],
        "copies": {key: copies.get(key) for key in ("flagged", "expected", "probability")},
        "curve": [[one["flops"], one["dense_loss"]] for one in quality],
        "recipe": trial.recipe.model_dump(mode="json", exclude_defaults=True),
    }
    for part in ("checkpoints", "evaluation"):
        shutil.rmtree(folder / part, ignore_errors=True)
    return line


def _chosen(trials: list[Trial], only: list[str]) -> list[Trial]:
    """The trials whose names begin so, in the order of these beginnings; all without any."""
    named = {t.name: t for start in only for t in trials if t.name.startswith(start)}
    return list(named.values()) if only else trials


def main() -> int:
    """Runs what is missing; gives 3 where a signal stopped it, 1 where trials failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("table", type=Path, help="YAML file of experiments")
    parser.add_argument(
        "--only", nargs="+", default=[], help="experiments, or trials' first letters, in order"
    )
    parser.add_argument("--list", action="store_true", help="list the trials, and which are done")
    parser.add_argument("--alone", action="store_true", help="nothing else runs on this machine")
    parser.add_argument("--compile", default="off", help="as a recipe's: auto, on, off or graphs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines")
    parser.add_argument("--data", type=Path, default=Path(), help="folder of the images' files")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for the runs")
    args = parser.parse_args()
    table = Table(yaml.safe_load(args.table.read_text("utf-8")), args.only)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.list:
        lines = common.results(args.results)
        for trial in _chosen(list(table.trials(lines)), args.only):
            steps = "+".join(str(stage.steps) for stage in trial.recipe.stages)
            print(f"{'done' if is_done(trial, lines) else '    '} {trial.name}: {steps} steps")
        return 0
    failed = set[str]()
    has_waited = False
    while True:
        lines = common.results(args.results)
        wanted = _chosen(list(table.trials(lines)), args.only)
        missing = [t for t in wanted if t.name not in failed and not is_done(t, lines)]
        if not missing:
            return 1 if failed else 0
        for trial in missing:
            outcome = _claimed(trial, args)
            if outcome == "stopped":
                common.say("stopped after saving: the same command goes on")
                return 3
            if outcome == "failed":
                failed.add(trial.name)
            if outcome != "taken":  # the results may ask for other trials now
                break
        else:
            if not has_waited:
                common.say(f"waiting for other processes' trials, or what {missing[0].name} needs")
            has_waited = True
            time.sleep(2)


def _claimed(trial: Trial, args: argparse.Namespace) -> str:
    """Runs a trial and keeps its line: `done`, `stopped` or `failed`.

    `taken`: another process has it, or trains what it begins from.
    """
    if trial.recipe.init is not None and not (args.work / trial.recipe.init / "model").is_dir():
        return "taken"
    try:
        with FileLock(args.work / f"{trial.name}.lock", timeout=0):
            if is_done(trial, common.results(args.results)):
                return "done"
            common.say(f"{trial.name}: {sum(stage.steps for stage in trial.recipe.stages)} steps")
            line = run_trial(trial, args.work, args.data, args.alone, args.compile)
            if line is None:
                return "stopped"
            line["command"] = f"python benchmarks/quality.py benchmarks/{args.table.name}"
            with FileLock(args.results.with_suffix(".lock")), args.results.open("a") as file:
                file.write(json.dumps(line) + "\n")
    except Timeout:
        return "taken"
    except Exception:  # the others are run all the same
        common.say(f"{trial.name} failed:\n{traceback.format_exc()}")
        return "failed"
    frechet = line["metrics"]["frechet"]["value"]
    common.say(
        f"  {frechet:.4g}, held-out loss {line['dense_loss']:.5f}, "
        f"{line['train_sec']:.0f} s, {line['flops'] / 1e12:.2f} TFLOP"
    )
    return "done"


if __name__ == "__main__":
    sys.exit(main())

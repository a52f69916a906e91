"""Which recipe reaches the best quality for its FLOPs: runs a table of experiments, unattended.

    python benchmarks/quality.py benchmarks/quality.yaml [--only NAME ...] [--list] [--alone]

Each trial trains one recipe, draws samples, measures them and appends a line to
`benchmarks/results/quality.jsonl`; trials whose line is there are skipped. A killed run goes on
where it stopped. Several processes may work on one table side by side: each claims the trials that
it runs. `--alone` says that nothing else ran on the machine: only then do a line's seconds count.
The head of `benchmarks/quality.yaml` explains the table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
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


def trials_of(table: dict[str, Any]) -> Iterator[Trial]:
    """All trials of a table, in its order."""
    for experiment, content in table.items():
        for round_ in content["rounds"]:
            for variant, lr_of_variant in _variants(round_):
                for lr in lr_of_variant:
                    for seed in round_["seeds"]:
                        yield _trial(experiment, content, variant, lr, round_, seed)


def _variants(round_: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """A round's variants with their learning rates: all share one list, or each has its own."""
    variants = round_["variants"]
    if isinstance(variants, dict):
        yield from variants.items()
    else:
        yield from ((variant, round_["lr"]) for variant in variants)


def _trial(
    experiment: str,
    content: dict[str, Any],
    variant: str,
    lr: Any,
    round_: dict[str, Any],
    seed: int,
) -> Trial:
    changes = content["variants"][variant] or {}
    stages = changes.get("stages", [{"share": 1}])
    rates = tuple(lr) if isinstance(lr, list) else (lr,) * len(stages)
    flops = float(round_.get("flops", content["flops"]))
    settings = merged(content["recipe"], {k: v for k, v in changes.items() if k != "stages"})
    rows = [
        {"name": f"stage-{i}", "steps": 1, "lr": rate, **content["stage"], **stage}
        for i, (stage, rate) in enumerate(zip(stages, rates, strict=True))
    ]
    rows[-1].setdefault("lr_schedule", "cosine")
    shares = [row.pop("share") for row in rows]
    recipe = Recipe(**settings, stages=rows, seed=seed, log_every=50, preview_every=10**9)
    for row, share, work in zip(rows, shares, stage_work(recipe, build_model(recipe)), strict=True):
        row["steps"] = max(1, round(flops * share / sum(shares) / work.step_flops))
    every = max(1, sum(row["steps"] for row in rows) // 6)
    recipe = Recipe(**{**recipe.model_dump(), "stages": rows, "checkpoint_every": every,
                       "evaluate_every": every, "keep_checkpoints": 1})  # fmt: skip
    return Trial(experiment, variant, rates, flops, seed, recipe)


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


def run_trial(trial: Trial, work: Path, data: Path, alone: bool) -> dict[str, Any] | None:
    """Trains and measures a trial; None = stopped by a signal after saving."""
    folder, recipe = work / trial.name, trial.recipe
    if recipe.init is not None:  # another trial's name
        recipe = changed(recipe, init=str(work / recipe.init))
    if (path := data / recipe.data.source).exists():
        recipe = changed(recipe, data=changed(recipe.data, source=str(path)))
    if not train(recipe, folder, show=False).finished:
        return None
    evaluated = evaluate_model(load_model(folder))
    record, quality = evaluated.record, read_lines(folder / "quality.jsonl")
    last = quality[-1]
    copies = record["memorization"] or {}
    line = {
        **common.facts("quality"),
        "command": "python benchmarks/quality.py benchmarks/quality.yaml",  # of any folders
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
    """Runs what is missing; gives 3 where a signal stopped it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("table", type=Path, help="YAML file of experiments")
    parser.add_argument(
        "--only", nargs="+", default=[], help="experiments, or trials' first letters, in order"
    )
    parser.add_argument("--list", action="store_true", help="list the trials, and which are done")
    parser.add_argument("--alone", action="store_true", help="nothing else runs on this machine")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines")
    parser.add_argument("--data", type=Path, default=Path(), help="folder of the images' files")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for the runs")
    args = parser.parse_args()
    table = yaml.safe_load(args.table.read_text("utf-8"))
    args.work.mkdir(parents=True, exist_ok=True)
    for trial in _chosen(list(trials_of(table)), args.only):
        if args.list:
            done = "done" if is_done(trial, common.results(args.results)) else "    "
            steps = "+".join(str(stage.steps) for stage in trial.recipe.stages)
            print(f"{done} {trial.name}: {steps} steps")
            continue
        try:
            with FileLock(args.work / f"{trial.name}.lock", timeout=0):
                if is_done(trial, common.results(args.results)):
                    continue
                common.say(
                    f"{trial.name}: {sum(stage.steps for stage in trial.recipe.stages)} steps"
                )
                line = run_trial(trial, args.work, args.data, args.alone)
                if line is None:
                    common.say("stopped after saving: the same command goes on")
                    return 3
                with FileLock(args.results.with_suffix(".lock")), args.results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                frechet = line["metrics"]["frechet"]["value"]
                common.say(
                    f"  {frechet:.4g}, held-out loss {line['dense_loss']:.5f}, "
                    f"{line['train_sec']:.0f} s, {line['flops'] / 1e12:.2f} TFLOP"
                )
        except Timeout:  # another process has it
            continue
    return 0


if __name__ == "__main__":
    sys.exit(main())

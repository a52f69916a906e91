"""Figure 2 of the paper: a primer of a 2-D Swiss roll, its fine-tuning and its dense control.

A point (x, y) is an image of two pixels, each a patch. Pre-training hides one of the two, so only
the marginals p(x) and p(y) can be learned; fine-tuning then shows both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from maskdm.choices import named
from maskdm.paper.reproduce import FIG2, Wanted, number
from maskdm.paper.scales import SCALES
from maskdm.recipe import Recipe
from maskdm.runs.lines import read_lines
from maskdm.runs.load import load_model
from maskdm.sampling.generate import generate
from maskdm.seeds import derive_seed
from maskdm.training.budget import scaled
from maskdm.training.trainer import train
from maskdm.words import flops_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Figure 2: a primer of a Swiss roll"
NUM_TRAIN, NUM_FRESH, NUM_SAMPLES = 100_000, 20_000, 5_000
# Of the length below: the paper gives no numbers for its figure.
LENGTHS = {"smoke": 0.01, "small": 1.0}
DATA, PRIMER, JOINT, TUNED, DENSE = (
    "data",
    "primer, one patch at a time",
    "primer, both at once",
    "fine-tuned",
    "dense, same FLOPs",
)
_STAGE: dict[str, Any] = {
    "batch_size": 256,
    "lr": 4e-3,
    "lr_schedule": "cosine",
    "betas": (0.9, 0.99),
    "clip": 1.0,
    "ema": {"decay": 0.995},
}
RECIPE: dict[str, Any] = {
    "data": {"size": (1, 2), "channels": 1},
    "model": {"patch_size": 1, "embed_dim": 32, "depth": 3, "num_heads": 1},
    # A point settles on one of the roll's arms at times around 0.25: these are drawn most often.
    "diffusion": {
        "schedule": "flow",
        "prediction": "flow",
        "times": {"kind": "logit-normal", "mean": -1.0},
    },
    "stages": [
        {"name": "pre-train", "mask": {"kind": "patch", "rate": 0.5}, "steps": 1500, **_STAGE},
        {"name": "fine-tune", "steps": 4800, **_STAGE},
    ],
    "sampling": {"sampler": "dpm-solver", "steps": 50, "clip_x0": False, "batch_size": 1000},
    "num_previews": 0,
    "evaluate_every": 0,
}


@dataclass(frozen=True)
class Distances:
    """How far points are from fresh points of the roll.

    Attributes:
        energy: energy distance, 2 E|X - Y| - E|X - X'| - E|Y - Y'|; 0 for equal distributions.
        x, y: Wasserstein distances of the marginals.
    """

    energy: float
    x: float
    y: float


@dataclass(frozen=True)
class Row:
    """What came of a seed.

    Attributes:
        panels: points by their origin, float (n, 2).
        distances: theirs from fresh points.
        flops: of pre-training and fine-tuning together.
    """

    panels: Mapping[str, np.ndarray]
    distances: Mapping[str, Distances]
    flops: int


def reproduce_fig2(wanted: Wanted, out: Path, show: bool = False) -> Iterator[Row | None]:
    """Trains what is missing, and gives a row for each seed; None where a signal has stopped it.

    Args:
        wanted: scale, seeds, and whether the dense control is trained.
        out: where the runs lie: fig2-SEED and fig2-SEED-dense, and their points.
        show: whether trainings print what they do.

    Raises ValueError for settings that this figure does not have.
    """
    if wanted.scale not in LENGTHS and named(wanted.scale, SCALES, "scale"):
        raise ValueError(f"{FIG2} at scale {wanted.scale}: the paper gives no numbers; use small")
    if wanted.sources or wanted.flops or wanted.only:
        raise ValueError(
            f"{FIG2} has its own points and length: leave out --source, --flops and --only"
        )
    factor = LENGTHS[wanted.scale]
    num = max(100, round(factor * NUM_SAMPLES))
    out.mkdir(parents=True, exist_ok=True)
    for seed in range(wanted.seeds):
        points = out / f"swiss-roll-{seed}.npy"
        if not points.exists():
            pixels = np.clip((roll(NUM_TRAIN, seed, "train") + 1) * 127.5 + 0.5, 0, 255)
            np.save(points, pixels.astype(np.uint8)[:, None, :, None])  # (N, 1, 2, 1)
        recipe = fig2_recipe(points, seed, factor)
        run = out / f"{FIG2}-{seed}"
        if not train(recipe, run, show=show).finished:
            yield None
            return
        panels = {
            DATA: roll(num, seed, "data"),
            PRIMER: points_of(f"{run}@pre-train", num, seed, [[0], [1]]),
            JOINT: points_of(f"{run}@pre-train", num, seed, [[0, 1]]),
            TUNED: points_of(str(run), num, seed, [[0, 1]]),
        }
        if wanted.with_control:
            control = out / f"{run.name}-dense"
            if not train(run, control, show=show, control="dense").finished:
                yield None
                return
            panels[DENSE] = points_of(str(control), num, seed, [[0, 1]])
        fresh = roll(round(max(num / NUM_SAMPLES, 0.1) * NUM_FRESH), seed, "fresh")
        spent = int(read_lines(run / "metrics.jsonl")[-1]["flops"])
        yield Row(panels, {name: distances(one, fresh) for name, one in panels.items()}, spent)


def fig2_recipe(points: Path, seed: int, factor: float) -> Recipe:
    """The recipe: a U-ViT of 40,000 weights, and what spends about a teraFLOP times a factor."""
    content = {**RECIPE, "seed": seed, "data": {**RECIPE["data"], "source": str(points.resolve())}}
    whole = Recipe(**{**content, "stages": [{**row, "warmup": 100} for row in content["stages"]]})
    return whole if factor == 1 else scaled(whole, factor)


def roll(num: int, seed: int, stream: str) -> np.ndarray:
    """Points (t cos t, t sin t) of the roll with noise 0.5, over 4.5 pi: float64 (num, 2).

    t is uniform from 1.5 pi to 4.5 pi, as in scikit-learn's `make_swiss_roll`.
    """
    random = np.random.default_rng(derive_seed(seed, f"swiss-roll-{stream}"))
    t = 1.5 * np.pi * (1 + 2 * random.random(num))
    points = t[:, None] * np.stack([np.cos(t), np.sin(t)], 1)
    return (points + 0.5 * random.standard_normal((num, 2))) / (4.5 * np.pi)


def points_of(model: str, num: int, seed: int, groups: list[list[int]]) -> np.ndarray:
    """Points that a model draws: float32 (num, 2).

    Args:
        model: a run, or RUN@STAGE.
        groups: of pixels that the network sees together: [[0, 1]] draws points, [[0], [1]] each
            pixel from its own marginal.
    """
    loaded = load_model(model)
    drawn = np.zeros((num, 2), np.float32)
    for group in groups:
        visible = torch.tensor(group).repeat(num, 1)
        how: dict[str, Any] = {"visible": visible, "finish": lambda images: images}
        images = generate(loaded.trained, loaded.sampling, list(range(num)), seed, **how)
        drawn[:, group] = images.reshape(num, 2)[:, group]
    return drawn


def distances(points: np.ndarray, fresh: np.ndarray) -> Distances:
    """Distances of points (n, 2) from fresh points (m, 2); n divides m."""
    x, y = (_wasserstein(points[:, i], fresh[:, i]) for i in (0, 1))
    return Distances(energy_distance(points, fresh), x, y)


def energy_distance(a: np.ndarray, b: np.ndarray) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| over all pairs of two sets of points, (n, D), (m, D)."""

    def mean_distance(u: np.ndarray, v: np.ndarray) -> float:
        exact = "donot_use_mm_for_euclid_dist"  # matrix products lose small distances to rounding
        rows, columns = torch.from_numpy(u).double(), torch.from_numpy(v).double()
        parts = (torch.cdist(part, columns, compute_mode=exact) for part in rows.split(100))
        return math.fsum(float(part.sum()) for part in parts) / (len(u) * len(v))

    return 2 * mean_distance(a, b) - mean_distance(a, a) - mean_distance(b, b)


def write_fig2(wanted: Wanted, rows: list[Row], out: Path) -> list[Path]:
    """Writes the page and its picture, of the first seed; gives their paths."""
    page, picture = out / "README.md", out / "picture.png"
    figure_of(rows[0]).savefig(picture, dpi=100)
    means = "The paper gives no figures."
    if wanted.scale == "smoke":
        means = "These figures mean nothing: networks were trained for a few steps."
    seeds = f"{len(rows)} seeds, ± their standard deviation" if len(rows) > 1 else "one seed"
    lines = [
        f"# {TITLE}",
        "",
        f"{means} Distances of {len(rows[0].panels[DATA]):,} points from fresh ones; {seeds}; "
        f"{flops_text(rows[0].flops)} for pre-training and fine-tuning.",
        "",
        "| points | energy distance | Wasserstein distance of x | of y |",
        "|---|---|---|---|",
    ]
    for name in rows[0].panels:
        found = [row.distances[name] for row in rows]
        cells = ([one.energy for one in found], [one.x for one in found], [one.y for one in found])
        lines.append(f"| {name} | {' | '.join(map(number, cells))} |")
    page.write_text("\n".join([*lines, "", f"![{TITLE}]({picture.name})"]) + "\n", "utf-8")
    return [page, picture]


def figure_of(row: Row) -> Figure:
    """Densities of the points side by side, in the same colours."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(row.panels), 3.5), layout="constrained")
    all_axes = figure.subplots(1, len(row.panels), sharex=True, sharey=True)
    for axes, (name, points) in zip(all_axes, row.panels.items(), strict=True):
        colours = PowerNorm(0.5, 0, max(1, len(points) / 300), clip=True)
        bins, limits = 90, [[-1.2, 1.2]] * 2
        axes.hist2d(points[:, 0], points[:, 1], bins, range=limits, cmap="magma", norm=colours)
        title = f"{name}\nenergy distance {row.distances[name].energy:.4f}"
        axes.set_title(title, fontsize=10)
        axes.set(aspect="equal", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    return figure


def _wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    """Wasserstein distance of two sets of numbers, (n,) and (m,), n a divisor of m."""
    return float(np.abs(np.repeat(np.sort(a), len(b) // len(a)) - np.sort(b)).mean())

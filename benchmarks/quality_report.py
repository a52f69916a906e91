"""Tables and figures of docs/does-masking-pay.md, from the results of `benchmarks/quality.py`.

    python benchmarks/quality_report.py [--results FILE] [--docs FILE ...]

Rewrites what stands between `<!-- NAME -->` and `<!-- end -->` in that page and in
docs/masking-trials.md, and the figures.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import common
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

from maskdm.recipe import Recipe
from maskdm.recipe_files import migrated

HERE = Path(__file__).parent
DOCS = [HERE.parent / "docs" / name for name in ("does-masking-pay.md", "masking-trials.md")]
IMAGES = HERE.parent / "docs" / "images"
COLOURS = {
    "dense": "#b3432b", "half": "#2b5fb3", "recipe": "#2b5fb3", "three-quarters": "#2f8f5b"
}  # fmt: skip
TITLES = {
    "dense": "dense",
    "half": "50 % hidden, then whole",
    "recipe": "50 % hidden, then whole",
    "three-quarters": "75 % hidden, then whole",
}
MASKED = ("half", "recipe")  # variants that are compared with `dense` over seeds
SIDES = {  # pairs of variants in the tables of fresh seeds, by what a row calls them
    "seeds": {
        "": (("dense",), MASKED),
        ", `vit`": (("vit",), ("vit-half", "vit-recipe")),
        ", batches of 16": (("dense-batch-16",), ("half-batch-16", "recipe-batch-16")),
        ", `vit`, batches of 16": (("vit-batch-16",), ("vit-recipe-batch-16",)),
        ", batches of 8": (("dense-batch-8",), ("half-batch-8",)),
        ", batches of 8, three quarters": (("dense-batch-8",), ("three-quarters-batch-8",)),
    },
    "batches": {  # with the two batch sizes
        ", whole images, {} and {}": (("dense",), ("dense-batch-16", "dense-batch-8")),
        ", masked, {} and {}": (MASKED, ("half-batch-16", "recipe-batch-16", "half-batch-8")),
        ", `vit`, whole images, {} and {}": (("vit",), ("vit-batch-16",)),
        ", `vit`, masked, {} and {}": (("vit-recipe",), ("vit-recipe-batch-16",)),
    },
    "blocks": {
        ", whole images": (("dense",), ("vit",)),
        ", masked": (MASKED, ("vit-half", "vit-recipe")),
        ", whole images, batches of 16": (("dense-batch-16",), ("vit-batch-16",)),
        ", masked, batches of 16": (("recipe-batch-16",), ("vit-recipe-batch-16",)),
    },
}
BUDGETS = {  # experiments that differ only in their budget: the figures' panels
    "CIFAR-10, 64 tokens": ("cifar-recipes-3", "cifar-recipes", "cifar-recipes-24"),
    "faces, 16 tokens": ("budget-16-3", "budget-16-8", "budget-16-24"),
    "faces, 64 tokens": ("budget-64-5", "parts-64", "budget-64-48"),
    "faces, 256 tokens": ("budget-256-8", "budget-256-24", "budget-256-72"),
}
BATCHES = {  # the panels of distance by batch: an experiment, and its two sides
    "CIFAR-10, 64 tokens, 8 TFLOP": ("cifar-recipes", ("dense", "recipe")),
    "CIFAR-10, 8 TFLOP, today's blocks": ("cifar-recipes", ("vit", "vit-recipe")),
    "faces, 64 tokens, 5.3 TFLOP": ("budget-64-5", ("dense", "half")),
    "faces, 256 tokens, 8 TFLOP": ("budget-256-8", ("dense", "half", "three-quarters")),
    "faces, 256 tokens, 24 TFLOP": ("budget-256-24", ("dense", "half")),
    "faces, 1,024 tokens, 72 TFLOP": ("budget-1024-72", ("dense", "half", "three-quarters")),
}
MANY_TOKENS = ("budget-1024-72", "budget-1024-216")  # the panels of a figure of their own
Line = dict[str, Any]


def distance(line: Line) -> float:
    """The Frechet distance of a trial."""
    return float(line["metrics"]["frechet"]["value"])


def tokens_seen(line: Line) -> float:
    """Tokens of the images that a trial saw, hidden ones too, for each of its parameters."""
    recipe = Recipe(**migrated(line["recipe"]))
    tokens = math.prod(recipe.data.shape[:2]) / recipe.model.patch_size**2
    return float(line["images"] * tokens / line["num_params"])


def batch_size(line: Line) -> int:
    """Images in a batch of a trial's last stage."""
    return Recipe(**migrated(line["recipe"])).stages[-1].batch_size


def rates_text(line: Line) -> str:
    """`0.004`, or `0.004, 0.008` where stages differ."""
    return ", ".join(f"{lr:g}" for lr in dict.fromkeys(line["lr"]))


def label(line: Line, lines: list[Line]) -> str:
    """The variant, with its FLOPs where most trials of its experiment have others."""
    usual = statistics.median(one["flops"] for one in lines)
    is_usual = 0.9 < line["flops"] / usual < 1.1
    return line["variant"] + ("" if is_usual else f", {line['flops'] / 1e12:.3g} TFLOP")


def by_experiment(lines: list[Line]) -> dict[str, list[Line]]:
    """Lines by experiment, in the order of their first ones."""
    groups: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        groups[line["experiment"]].append(line)
    return groups


def bracket_table(lines: list[Line]) -> str:
    """Every trial of the first seed, or of all without one: variants and learning rates."""
    rows = [
        "| variant | learning rate | Fréchet distance | held-out loss | images |",
        "|---|---|---|---|---|",
    ]
    first = [line for line in lines if line["seed"] == 0] or lines
    order = list(dict.fromkeys(label(line, lines) for line in first))
    best = {
        name: min((line for line in first if label(line, lines) == name), key=distance)
        for name in order
    }
    for line in sorted(first, key=lambda line: (order.index(label(line, lines)), line["lr"])):
        name = label(line, lines)
        low, high = line["metrics"]["frechet"]["interval"]
        value = f"{distance(line):.3f}"
        value = f"**{value}**" if line is best[name] else value
        seed = f", seed {line['seed']}" if line["seed"] else ""
        rows.append(
            f"| {name}{seed} | {rates_text(line)} | {value} ({low:.3f} to {high:.3f}) | "
            f"{line['dense_loss']:.5f} | {line['images']:,} |"
        )
    return "\n".join(rows)


def best_rates(lines: list[Line], variant: str) -> list[float] | None:
    """The learning rates of a variant's best trial with the first seed."""
    first = [line for line in lines if line["seed"] == 0 and label(line, lines) == variant]
    rates: list[float] | None = min(first, key=distance)["lr"] if first else None
    return rates


def fresh_seeds(lines: list[Line], variant: str) -> list[Line]:
    """Trials at a variant's best rates with seeds that did not choose them.

    Where the rates come from another experiment, there is no first seed: all count.
    """
    rates = best_rates(lines, variant)
    fresh = [line for line in lines if label(line, lines) == variant and line["seed"] > 0]
    return [line for line in fresh if rates is None or line["lr"] == rates]


def ratio_of(
    one: list[Line], other: list[Line], value: Any = distance
) -> tuple[float, float, float]:
    """Mean ratio of two groups of seeds, with a 95 % interval by Welch's t on the logarithms."""
    a, b = (np.log([value(line) for line in lines]) for lines in (one, other))
    test = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    middle = a.mean() - b.mean()
    return math.exp(middle), math.exp(test.low), math.exp(test.high)


def saving(dense: list[Line], masked: list[Line]) -> tuple[float, float, float] | None:
    """How many times fewer FLOPs masked runs need to reach the dense runs' last held-out loss.

    Seed by seed where both sides have it, between measurements in straight lines on logarithms;
    the mean with a 95 % interval. The learning rate decays towards the end of a run: one that is
    planned to end there would reach it sooner, so that this says too little of what is saved.
    None where a masked run does not get there.
    """
    logs = []
    masked_by_seed = {line["seed"]: line for line in masked}
    for one in dense:
        if (other := masked_by_seed.get(one["seed"])) is None:
            continue
        flops, losses = np.log(np.array(other["curve"])).T
        falling = np.minimum.accumulate(losses)
        if falling[-1] > math.log(one["dense_loss"]):
            return None
        reached = np.interp(-math.log(one["dense_loss"]), -falling, flops)
        logs.append(math.log(one["flops"]) - reached)
    mean, error = np.mean(logs), stats.sem(logs)
    half = stats.t.ppf(0.975, len(logs) - 1) * error
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def sides(
    lines: list[Line], one: tuple[str, ...] = ("dense",), other: tuple[str, ...] = MASKED
) -> tuple[list[Line], list[Line]]:
    """The fresh seeds of two sides, each the first of its variants that has some."""
    first, second = (
        next((fresh for name in names if (fresh := fresh_seeds(lines, name))), [])
        for names in (one, other)
    )
    return first, second


def seeds_table(groups: dict[str, list[Line]], table: str, titles: tuple[str, str]) -> str:
    """Two sides at their best rates, over seeds that did not choose them.

    Args:
        groups: lines by experiment.
        table: whose sides, of `SIDES`.
        titles: of the sides.
    """
    rows = [
        f"| experiment | tokens per parameter | {titles[0]} | {titles[1]} | "
        f"{' / '.join(titles)} | of held-out losses | of FLOPs to equal loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for experiment, lines in groups.items():
        for name, pair in SIDES[table].items():
            one, other = sides(lines, *pair)
            if len({line["seed"] for line in one} & {line["seed"] for line in other}) < 2:
                continue
            cells = [
                f"{np.mean([*map(distance, group)]):.3f} ("
                + ", ".join(f"{distance(line):.3f}" for line in group)
                + ")"
                for group in (one, other)
            ]
            for value in (distance, lambda line: float(line["dense_loss"])):
                middle, low, high = ratio_of(one, other, value)
                cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
            saved = saving(one, other)
            cells.append("{:.2f} ({:.2f} to {:.2f})".format(*saved) if saved else "not reached")
            row = experiment + name.format(batch_size(one[0]), batch_size(other[0]))
            rows.append(f"| {row} | {tokens_seen(one[0]):.2g} | {' | '.join(cells)} |")
    return "\n".join(rows)


def variants_table(groups: dict[str, list[Line]]) -> str:
    """Every variant with fresh seeds at its best rates: mean and spread over seeds."""
    rows = [
        "| experiment | variant | learning rate | TFLOP | distances | mean | held-out loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for experiment, lines in groups.items():
        for variant in dict.fromkeys(label(line, lines) for line in lines):
            fresh = fresh_seeds(lines, variant)
            if len(fresh) < 2:
                continue
            values = [distance(line) for line in fresh]
            each = ", ".join(f"{value:.3f}" for value in values)
            name = variant.split(",")[0]
            rows.append(
                f"| {experiment} | {name} | {rates_text(fresh[0])} | "
                f"{fresh[0]['flops'] / 1e12:.3g} "
                f"| {each} | {np.mean(values):.3f} ± {np.std(values, ddof=1):.3f} | "
                f"{np.mean([line['dense_loss'] for line in fresh]):.5f} |"
            )
    return "\n".join(rows)


def _figure(num: int) -> tuple[Figure, list[Axes]]:
    """A figure of panels, at most three in a row."""
    rows = -(-num // 3)
    columns = -(-num // rows)
    figure = Figure(figsize=(4.3 * columns, 3.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(np.ravel(figure.subplots(rows, columns)))
    for empty in panels[num:]:
        empty.remove()
    return figure, panels[:num]


def _dress(axes: Axes, title: str, xlabel: str) -> None:
    """A panel's title, label and grid."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(xlabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _tick(axes: Axes, values: list[float]) -> None:
    """Four ticks on a logarithmic y axis, over the range of some values."""
    axes.set_yscale("log")
    ticks = [float(f"{tick:.2g}") for tick in np.geomspace(min(values), max(values), 4)]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _save(figure: Figure, panels: list[Axes], ylabel: str, path: Path) -> None:
    """Writes a figure, with its legend in the last panel and y labels at the left."""
    panels[-1].legend(frameon=False, fontsize=9)
    for axes in panels[:: figure.axes[0].get_gridspec().ncols]:
        axes.set_ylabel(ylabel)
    figure.savefig(path, dpi=100)


def panels_of(groups: dict[str, list[Line]]) -> dict[str, list[Line]]:
    """The experiments of `BUDGETS` that were run, by title."""
    return {
        f"{title}, {groups[name][0]['budget'] / 1e12:g} TFLOP": groups[name]
        for title, names in BUDGETS.items()
        for name in names
        if name in groups
    }


def draw_rates(groups: dict[str, list[Line]], path: Path) -> None:
    """Distance against learning rate, a panel for each experiment with several on both sides."""
    shown = {
        title: (lines, masked[0])
        for title, lines in panels_of(groups).items()
        if (masked := [one for one in MASKED if one in {x["variant"] for x in lines}])
        and len({x["lr"][0] for x in lines if x["variant"] == masked[0]}) > 1
    }
    if not shown:
        return
    figure, panels = _figure(len(shown))
    for axes, (name, (lines, masked)) in zip(panels, shown.items(), strict=True):
        for variant in ("dense", masked):
            same = [x for x in lines if label(x, lines) == variant and len({*x["lr"]}) == 1]
            tried = sorted((x for x in same if x["seed"] == 0), key=lambda x: x["lr"])
            rates = [x["lr"][0] for x in tried]
            errors = [distance(x) - x["metrics"]["frechet"]["interval"][0] for x in tried]
            axes.errorbar(rates, [*map(distance, tried)], errors, marker="o", capsize=3,
                          color=COLOURS[variant], label=TITLES[variant])  # fmt: skip
            seeds = [x for x in same if x["seed"] > 0]
            axes.plot([x["lr"][0] for x in seeds], [*map(distance, seeds)], "x",
                      color=COLOURS[variant])  # fmt: skip
        axes.set_xscale("log", base=2)
        ticks = sorted({x["lr"][0] for x in lines if x["variant"] in ("dense", masked)})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        _dress(axes, name, "learning rate")
    _save(figure, panels, "Fréchet distance, lower is better", path)


def draw_losses(groups: dict[str, list[Line]], path: Path) -> None:
    """The loss on held-out images against FLOPs: a line for each fresh seed of either side."""
    shown = {
        title: [*both[0], *both[1]]
        for title, lines in panels_of(groups).items()
        if all(both := sides(lines))
    }
    _draw_curves(shown, path)


def draw_many_tokens(groups: dict[str, list[Line]], path: Path) -> None:
    """The same for 1,024 tokens and two masks: all trials at the best rate of each side."""
    shown = {
        f"{groups[name][0]['budget'] / 1e12:g} TFLOP": [
            line
            for variant in ("dense", "half", "three-quarters")
            for line in groups[name]
            if line["variant"] == variant and line["lr"] == best_rates(groups[name], variant)
        ]
        for name in MANY_TOKENS
        if name in groups
    }
    _draw_curves(shown, path)


def _draw_curves(shown: dict[str, list[Line]], path: Path) -> None:
    """Losses on held-out images against FLOPs: a panel for each title, a line for each trial."""
    if not shown:
        return
    figure, panels = _figure(len(shown))
    for axes, (name, lines) in zip(panels, shown.items(), strict=True):
        named = set[str]()
        for line in lines:
            flops, losses = np.array(line["curve"]).T
            title = TITLES[line["variant"]]
            axes.plot(flops / 1e12, losses, marker=".", color=COLOURS[line["variant"]],
                      alpha=0.8, label=None if title in named else title)  # fmt: skip
            named.add(title)
        _tick(axes, [loss for line in lines for _, loss in line["curve"]])
        _dress(axes, name, "TFLOP of training")
    _save(figure, panels, "loss on held-out images", path)


def draw_budgets(groups: dict[str, list[Line]], path: Path) -> None:
    """Distance against the budget, a panel for each series: the means of fresh seeds, and each."""
    shown = {
        title: both
        for title, names in BUDGETS.items()
        if len(both := [b for name in names if all(b := sides(groups.get(name, [])))]) > 1
    }
    if not shown:
        return
    figure, panels = _figure(len(shown))
    for axes, (title, series) in zip(panels, shown.items(), strict=True):
        for i, variant in enumerate(("dense", "half")):
            side = [both[i] for both in series]
            colour = COLOURS[variant]
            budgets = [lines[0]["budget"] / 1e12 for lines in side]
            means = [np.exp(np.mean([*map(math.log, map(distance, lines))])) for lines in side]
            axes.plot(budgets, means, color=colour, label=TITLES[variant])
            for budget, lines in zip(budgets, side, strict=True):
                values = [*map(distance, lines)]
                axes.plot([budget] * len(lines), values, "o", ms=4, color=colour, alpha=0.6)
        axes.set_xscale("log")
        axes.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
        _tick(axes, [distance(line) for both in series for side in both for line in side])
        _dress(axes, title, "TFLOP of training")
    _save(figure, panels, "Fréchet distance, lower is better", path)


def by_batch(lines: list[Line], side: str) -> dict[int, list[Line]]:
    """The trials of a variant and of its `-batch-N` at their best rates, by images in a batch.

    Fresh seeds, or the first one where there are no others.
    """
    groups = {}
    for variant in {line["variant"] for line in lines}:
        if re.fullmatch(rf"{side}(-batch-\d+)?", variant):
            rates = best_rates(lines, variant)
            fresh = fresh_seeds(lines, variant) or [
                line for line in lines if line["variant"] == variant and line["lr"] == rates
            ]
            groups[batch_size(fresh[0])] = fresh
    return dict(sorted(groups.items()))


def draw_batches(groups: dict[str, list[Line]], path: Path) -> None:
    """Distance against the batch: the means of fresh seeds, and each seed."""
    shown = {
        title: [by_batch(groups[name], side) for side in both]
        for title, (name, both) in BATCHES.items()
        if name in groups
    }
    shown = {title: series for title, series in shown.items() if len(series[0]) > 1}
    if not shown:
        return
    figure, panels = _figure(len(shown))
    for axes, (title, series) in zip(panels, shown.items(), strict=True):
        for variant, batches in zip(("dense", "half", "three-quarters"), series, strict=False):
            means = [np.exp(np.mean([math.log(distance(x)) for x in b])) for b in batches.values()]
            axes.plot([*batches], means, color=COLOURS[variant], label=TITLES[variant])
            for batch, lines in batches.items():
                axes.plot([batch] * len(lines), [*map(distance, lines)], "o", ms=4,
                          color=COLOURS[variant], alpha=0.6)  # fmt: skip
        axes.set_xscale("log", base=2)
        ticks = sorted({batch for batches in series for batch in batches})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        _tick(axes, [distance(x) for batches in series for b in batches.values() for x in b])
        _dress(axes, title, "images in a batch")
    _save(figure, panels, "Fréchet distance, lower is better", path)


def replace(texts: dict[Path, str], name: str, content: str) -> None:
    """Puts other content between `<!-- name -->` and `<!-- end -->`, in the page that has it.

    Raises ValueError where not exactly one has such a place.
    """
    pattern = rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)"
    total = 0
    for path, text in texts.items():
        texts[path], count = re.subn(
            pattern, lambda m: f"{m[1]}{content}\n{m[2]}", text, flags=re.S
        )
        total += count
    if total != 1:
        raise ValueError(f"the pages need one place for {name}, and have {total}")


def main() -> None:
    """Rewrites the pages' tables and figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results" / "quality.jsonl")
    parser.add_argument("--docs", nargs="+", type=Path, default=DOCS, help="the pages")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder of the figures")
    args = parser.parse_args()
    groups = by_experiment(common.results(args.results))
    texts = {path: path.read_text("utf-8") for path in args.docs}
    replace(texts, "seeds", seeds_table(groups, "seeds", ("dense", "masked")))
    replace(texts, "blocks", seeds_table(groups, "blocks", ("U-ViT", "vit")))
    replace(texts, "batches", seeds_table(groups, "batches", ("larger", "smaller")))
    replace(texts, "variants", variants_table(groups))
    for name, lines in groups.items():
        replace(texts, name, bracket_table(lines))
    for path, text in texts.items():
        path.write_text(text, "utf-8")
    draw_rates(groups, args.images / "masking-rates.png")
    draw_budgets(groups, args.images / "masking-budgets.png")
    draw_losses(groups, args.images / "masking-losses.png")
    draw_batches(groups, args.images / "masking-batches.png")
    draw_many_tokens(groups, args.images / "masking-1024.png")


if __name__ == "__main__":
    main()

"""What a figure says, in plain words: against chance where that is known, else what is better."""

from __future__ import annotations

from typing import Any

from maskdm.evaluation.records import Record
from maskdm.metrics import METRICS
from maskdm.runs.lines import Line
from maskdm.words import figure

# Frechet distance over that of a perfect model by chance -> a word for it.
WORDS = ((2.0, "very near"), (10.0, "near"), (50.0, "some way off"), (float("inf"), "far off"))
SMALL_GAP = 0.02  # of a loss, relative: held-out and training images are called equal within it


def judged(name: str, one: dict[str, Any], record: Record) -> str:
    """A sentence on a metric of a record.

    Args:
        name: of the metric; others than those known here get the direction alone.
        one: its value and interval, as the record has them.
        record: the whole of it, which may know the distance by chance.
    """
    value, chance = one["value"], by_chance(name, record)
    if chance:
        return _against_chance(value / chance, chance)
    if name == "kid" and one.get("interval") and one["interval"][0] <= 0 <= one["interval"][1]:
        return "No difference from real images shows with so many samples."
    if name == "precision":
        return f"{100 * value:.0f} of 100 samples lie among the real images."
    if name == "recall":
        return f"{100 * value:.0f} of 100 real images lie among the samples."
    return direction(name)


def by_chance(name: str, record: Record) -> float | None:
    """The distance that a perfect model would have by chance alone; None where that is unknown.

    Between two parts of the real images, n each, it is known. It falls with the size of both sets,
    as 1/N + 1/M, and those of the evaluation may be larger.
    """
    known = record.get("chance") or {}
    if not known.get(name):
        return None
    real = record["reference"].get("num") or known["num"]
    share = (1 / record["samples"]["num"] + 1 / real) / (2 / known["num"])
    return float(known[name] * share)


def direction(name: str) -> str:
    """Which values of a metric are better, and the best one where there is one."""
    row = METRICS.get(name)
    if row is None:
        return ""
    if row.higher_is_better:
        best = "" if row.limits[1] == float("inf") else f"; at most {row.limits[1]:g}"
        return f"Higher is better{best}."
    at_zero = row.limits[0] == 0 or name == "kid"
    return "Lower is better" + ("; 0 = no difference from real images." if at_zero else ".")


def judged_loss(line: Line) -> str:
    """What the losses on held-out and on training images say together; empty without both."""
    held_out, train = line.get("dense_loss"), line.get("dense_loss_train")
    if not held_out or not train:
        return ""
    gap = held_out / train - 1
    if gap < SMALL_GAP:
        return "Held-out images lose no more than training images: no sign of memorising."
    return (
        f"Held-out images lose {two_digits(100 * gap)} % more than training images: the model "
        "knows those better."
    )


def _against_chance(ratio: float, chance: float) -> str:
    """A word for so many times the distance by chance."""
    if ratio <= 1:
        return f"As near as as many other real images would be by chance: {figure(chance)}."
    word = next(word for most, word in WORDS if ratio <= most)
    return (
        f"{word.capitalize()}: {two_digits(ratio)} times the distance by chance, {figure(chance)}."
    )


def two_digits(value: float) -> str:
    """`2.1`, `150`: two significant digits, without an exponent."""
    return f"{float(f'{value:.2g}'):,.10g}"

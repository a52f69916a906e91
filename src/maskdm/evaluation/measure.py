"""What a metric is computed from and what it gives; measuring those that apply."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import numpy as np
from scipy.special import stdtrit

import maskdm
from maskdm.evaluation.features import Features
from maskdm.evaluation.reference import ReferenceFeatures
from maskdm.images.joined import Array
from maskdm.metrics import METRICS, qualities
from maskdm.models.trained import TrainedModel
from maskdm.recipe import Evaluation, Sampling

NORMAL_95 = 1.96  # standard errors on either side of a 95 % interval
NO_LIMITS = (-math.inf, math.inf)

# How an error message names what a metric needs (`Metric.needs`), and the way out.
MISSING = {
    "images": "the reference's images, but only their mean and covariance are available: give the "
    "images themselves with --reference",
    "logits": "the classes of the Inception network: use --features inception, or leave it out",
    "training": "the images that the model was trained on: evaluate a run, without another "
    "--reference",
}


@dataclass(frozen=True)
class Measured:
    """A figure with its standard error over samples.

    The error is the standard deviation between sets of as many samples; None = not estimated. The
    spread is that between subsets, which the field prints beside the kernel distance and the
    Inception score, or between repetitions of the drawing. The ends of the 95 % interval are given
    where the normal approximation is poor.
    """

    value: float
    error: float | None = None
    spread: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)  # columns NAME_KEY of quality.jsonl
    ends: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("value", "error", "spread"):  # NumPy's numbers cannot be written as JSON
            if (number := getattr(self, name)) is not None:
                object.__setattr__(self, name, float(number))

    def interval(self, limits: tuple[float, float] = NO_LIMITS) -> list[float] | None:
        """Ends of the 95 % interval: those given, or else by the normal approximation.

        Args:
            limits: of the metric. What lies beyond them cannot be true, so leaving it out costs
                no confidence.
        """
        ends = self.ends
        if ends is None and self.error is not None:
            ends = self.value - NORMAL_95 * self.error, self.value + NORMAL_95 * self.error
        return None if ends is None else [min(max(end, limits[0]), limits[1]) for end in ends]

    def as_json(self, limits: tuple[float, float] = NO_LIMITS) -> dict[str, Any]:
        """Everything except details, for machines. Limits as for `interval`."""
        figures = {"value": self.value, "error": self.error}
        return {**figures, "interval": self.interval(limits), "spread": self.spread}


@dataclass(frozen=True)
class TrainedOn:
    """Which of the reference's images a model has seen."""

    rows: np.ndarray  # those that it was trained on, int64 (n,)
    held_out: np.ndarray  # those that were kept out of its training, int64 (m,)
    flip: bool  # whether they were mirrored at random


@dataclass(frozen=True)
class ModelInTraining:
    """A model in training, and images that were held out from it."""

    trained: TrainedModel  # on the device to use
    images: np.ndarray  # uint8 (n, H, W, C), n at least 1
    labels: np.ndarray | None  # their classes, int64 (n,); None for a model without classes
    sampling: Sampling  # how many images at a time


@dataclass(frozen=True)
class Compared:
    """Samples and what they are compared with, for the functions in `metrics.METRICS`.

    Images are uint8 (N, H, W, C), their vectors (the features) float32 (N, D), their logits of the
    Inception network float32 (N, classes), where available. Where only a model in training is
    measured, on every rank, there are no samples and no reference; all else is measured on the
    first rank.
    """

    settings: Evaluation
    features: Features | None = None
    images: Array = field(default_factory=lambda: np.empty((0, 0, 0, 0), np.uint8))
    vectors: Array = field(default_factory=lambda: np.empty((0, 0), np.float32))
    logits: Array | None = None
    reference: ReferenceFeatures = field(default_factory=ReferenceFeatures)
    trained_on: TrainedOn | None = None  # None = unknown
    model: ModelInTraining | None = None
    is_quick: bool = False  # whether it is measured in training: a metric should take seconds

    @property
    def available(self) -> set[str]:
        """What there is of the `needs` of metrics."""
        has = {
            "images": len(self.reference.vectors) > 0,
            "logits": self.features is not None and self.features.num_logits > 0,
            "training": self.trained_on is not None,
            "model": self.model is not None,
        }
        return {need for need, is_there in has.items() if is_there}


def metrics_to_measure(compared: Compared) -> tuple[str, ...]:
    """The metrics that the settings name, by default all that can be measured; in METRICS' order.

    In training they are those of the model, or the cheap figures of its samples.
    The samples may still be missing. Raises ValueError for a named metric that needs more than
    there is.
    """
    settings, available = compared.settings, compared.available
    in_pca = compared.features is not None and compared.features.name == "pca"
    named = () if compared.is_quick else settings.metrics
    for name in named:
        for need in METRICS[name].needs - available:
            raise ValueError(f"metric {name} needs {MISSING.get(need, need)}")
    return tuple(
        name
        for name, row in METRICS.items()
        if row.needs <= available
        and ("model" in row.needs) == ("model" in available)
        and (name in named if named else row.in_pca or not in_pca)
        and (name in qualities() or not compared.is_quick)
    )


def measure(compared: Compared, names: Sequence[str]) -> dict[str, Measured]:
    """The figures among these metrics; those that prove impossible to compute are left out."""
    figures: dict[str, Measured] = {}
    for name in names:
        if not METRICS[name].is_report and name not in figures:
            answer = METRICS[name].compute(compared)
            figures |= answer if isinstance(answer, dict) else {name: answer}
    return {name: figures[name] for name in names if name in figures}


def over_seeds(measured: Sequence[dict[str, Measured]]) -> dict[str, Measured]:
    """The mean of each metric over repetitions of the drawing, with the spread between them.

    From three repetitions on, the error is that of their mean (Student's t, so that the interval
    holds for few), or that which follows from the errors over samples, as for two, if it is larger:
    three equal values are no certainty.
    """
    num = len(measured)
    if num == 1:
        return measured[0]
    joined = {}
    for name in measured[0]:
        values = [one[name].value for one in measured]
        errors = [error for one in measured if (error := one[name].error) is not None]
        spread = float(np.std(values, ddof=1))
        error = math.hypot(*errors) / num if len(errors) == num else None
        if num >= 3:
            students = float(stdtrit(num - 1, 0.975) * spread / math.sqrt(num) / NORMAL_95)
            error = max(students, error or 0.0)
        joined[name] = Measured(float(np.mean(values)), error, spread)
    return joined


def as_record(figures: Mapping[str, Measured]) -> dict[str, dict[str, Any]]:
    """Figures in the form of a record; see `records.py`."""
    record = {}
    for name, one in figures.items():
        package = METRICS[name].library
        version = maskdm.__version__ if package == "maskdm" else metadata.version(package)
        record[name] = {**one.as_json(METRICS[name].limits), "library": f"{package} {version}"}
    return record

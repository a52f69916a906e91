"""All metrics of samples against a reference, in one kind of features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy as np
from scipy.special import stdtrit

import maskdm
from maskdm.evaluation.distances import (
    NORMAL_95,
    Measured,
    frechet,
    inception_score,
    kid,
    part_distance,
    precision_recall,
    sliced,
)
from maskdm.evaluation.reference import Known
from maskdm.images.joined import Array
from maskdm.recipe import Evaluation

SMALL_DIM = 512  # up to which ten splits of the reference cost seconds


def measure(
    vectors: Array, logits: Array | None, known: Known, settings: Evaluation
) -> dict[str, Measured]:
    """The metrics that were asked for, or all that can be had.

    Args:
        vectors: features of the samples, float32 (N, D).
        logits: of the Inception network, float32 (N, classes); or None.
        known: the reference.
        settings: metrics, resampled sets.

    What can't be had is left out: see `refuse_metrics`.
    """
    wanted = wanted_metrics(settings)
    found = {}
    if "frechet" in wanted:
        found["frechet"] = frechet(vectors, known.statistics, settings.bootstrap)
    if known.vectors is not None:
        if "kid" in wanted:
            found["kid"] = kid(vectors, known.vectors)
        if "sliced" in wanted:
            found["sliced"] = sliced(vectors, known.vectors)
        if "precision-recall" in wanted:
            found["precision"], found["recall"] = precision_recall(vectors, known.vectors)
    if "inception-score" in wanted and logits is not None and len(logits) >= 10:
        found["inception_score"] = inception_score(logits)
    return found


def wanted_metrics(settings: Evaluation) -> tuple[str, ...]:
    """Those asked for, or all; of pixels not the kernel distance, whose kernel wants others."""
    if settings.metrics:
        return settings.metrics
    every = Evaluation.all_metrics()
    return tuple(name for name in every if name != "kid" or settings.features != "pca")


def refuse_metrics(
    settings: Evaluation, has_logits: bool, has_images: bool, has_training: bool
) -> None:
    """Raises ValueError for metrics that were asked for by name and can't be had."""
    for name in settings.metrics:
        if name == "inception-score" and not has_logits:
            raise ValueError("the Inception score is of features inception: add them, or drop it")
        if name == "memorization" and not has_training:
            raise ValueError(
                "memorization is looked for among a run's own images: name a run, and no other "
                "--reference"
            )
        if name in ("kid", "sliced", "precision-recall") and not has_images:
            raise ValueError(
                f"metric {name} needs the reference's images, and it has only their mean and "
                "covariance: name the images themselves with --reference"
            )


def over_seeds(measured: Sequence[dict[str, Measured]]) -> dict[str, Measured]:
    """The mean of each metric over repetitions of the drawing, with the spread between them.

    Of three or more the error is theirs (Student's t, so that the interval holds for few); of
    two it follows from the errors over samples.
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
            half = stdtrit(num - 1, 0.975) * spread / math.sqrt(num)
            error = float(half / NORMAL_95)
        joined[name] = Measured(float(np.mean(values)), error, spread)
    return joined


def chance(known: Known, num: int) -> dict[str, Any] | None:
    """What chance alone gives: the distance of two disjoint random parts of the reference."""
    if known.vectors is None or len(known.vectors) < 4:
        return None
    part = max(2, min(num, len(known.vectors) // 2))
    num_splits = 10 if known.dim <= SMALL_DIM else 2
    return {"frechet": part_distance(known.vectors, part, num_splits), "num": part}


def told(metrics: dict[str, Measured]) -> dict[str, dict[str, Any]]:
    """Metrics as they stand in a record."""
    ours = f"maskdm {maskdm.__version__}"
    theirs = f"torch-fidelity {metadata.version('torch-fidelity')}"
    return {
        name: {
            "value": one.value,
            "error": one.error,
            "interval": None if one.interval is None else list(one.interval),
            "spread": one.spread,
            "library": ours if name in ("frechet", "sliced") else theirs,
        }
        for name, one in metrics.items()
    }

"""Comparing images with real ones, and writing down all that the figures depend on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

import maskdm
from maskdm.engine import device_name, main_first, process_state
from maskdm.evaluation.features import Features, features_of, make_features
from maskdm.evaluation.measure import (
    chance,
    measure,
    over_seeds,
    refuse_metrics,
    told,
    wanted_metrics,
)
from maskdm.evaluation.memorization import ImageSet, check_memorization
from maskdm.evaluation.pairs_sheet import draw_pairs
from maskdm.evaluation.records import Record
from maskdm.evaluation.reference import Known, Reference, in_features, reference_facts
from maskdm.evaluation.samples import Samples
from maskdm.evaluation.statistics import Statistics
from maskdm.images.joined import SelectedRows
from maskdm.recipe import Evaluation
from maskdm.training.monitor import source_commit

FEW = 10_000  # samples below which a FID is biased so much that papers don't compare it


@dataclass(frozen=True)
class TrainedOn:
    """Which of the reference's images a model has seen.

    Attributes:
        rows: those it was trained on, int64 (n,).
        held_out: those kept out of its training, int64 (m,).
        flip: whether they were mirrored at random.
    """

    rows: np.ndarray
    held_out: np.ndarray
    flip: bool


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation gives; on ranks other than the first its record is incomplete.

    Attributes:
        record: see `records.py`; without what only the caller knows: model, seeds, training,
            recipe.
        statistics: of the reference.
        sheet: the samples closest to training images, beside these; or None.
    """

    record: Record
    statistics: Statistics
    sheet: Image.Image | None


def evaluate(
    draw: Sequence[Callable[[], Samples]],
    shape: tuple[int, ...],
    reference: Reference,
    settings: Evaluation,
    trained_on: TrainedOn | None = None,
    show: bool = False,
) -> Evaluated:
    """Measures samples against a reference. To be called on every rank.

    Everything that can be refused is, before the first image is drawn.

    Args:
        draw: gives the samples, once for each repetition (`--seeds`).
        shape: height, width and channels of their images.
        reference: the real images.
        settings: features, metrics, resampled sets.
        trained_on: which of the reference's images the model has seen, to look for copies; None =
            not known.
        show: show the progress.

    Raises:
        ValueError: features that can't be had, metrics that can't, fewer than 4 real images,
            unlike shapes.
    """
    start = time.perf_counter()
    features, known = _compared_in(shape, reference, settings, trained_on is not None, show)
    prepare_sec = time.perf_counter() - start

    drawn, vectors, measured, draw_sec = [], [], [], 0.0
    for one in draw:
        before = time.perf_counter()
        drawn.append(one())
        draw_sec += time.perf_counter() - before
        answers = features_of(drawn[-1].images, features, drawn[-1].folder, show)
        vectors.append(features.vectors(answers))
        if process_state().is_main_process:
            if show:
                print("measuring", file=sys.stderr)
            measured.append(measure(vectors[-1], features.logits(answers), known, settings))
    metrics = over_seeds(measured) if measured else {}
    memorization, sheet = None, None
    if measured and trained_on is not None and "memorization" in wanted_metrics(settings):
        assert known.vectors is not None and reference.store is not None
        real = ImageSet(reference.store.images, known.vectors)
        own = ImageSet(drawn[0].images, vectors[0])
        memorization, sheet = _look_for_copies(own, real, trained_on, features)
    first = drawn[0]
    record = {
        "metrics": told(metrics),
        "per_seed": [{name: m.value for name, m in one.items()} for one in measured],
        "chance": chance(known, len(first.images)) if measured else None,
        "features": _features_facts(features, known, settings),
        "samples": {
            "num": len(first.images),
            "shape": list(first.images.shape[1:]),
            **first.facts,
        },
        "reference": reference.facts(),
        "memorization": memorization,
        "notes": [
            *reference.notes,
            *first.notes,
            *_cautions(features, known, len(first.images)),
        ],
        **_process_facts(),
        "generate_sec": round(draw_sec, 2),
        "measure_sec": round(time.perf_counter() - start - draw_sec, 2),
        "reference_sec": round(prepare_sec, 2),
    }
    facts = reference_facts(reference, features)
    statistics = Statistics(known.statistics.mean, known.statistics.cov, facts)
    return Evaluated(record, statistics, sheet)


def _compared_in(
    shape: tuple[int, ...],
    reference: Reference,
    settings: Evaluation,
    has_training: bool,
    show: bool,
) -> tuple[Features, Known]:
    """The features, and the reference in them; refuses what cannot be compared."""
    store = reference.store
    if store is not None and len(store) < 4:
        raise ValueError(f"the reference has {len(store)} images: a distance needs at least 4")
    if store is not None and store.images.shape[1:] != shape:
        raise ValueError(
            f"the samples are images of {'x'.join(map(str, shape))}, but the reference has "
            f"{'x'.join(map(str, store.images.shape[1:]))} (height, width, channels)"
        )
    features = main_first(lambda: make_features(settings, store, process_state().device))
    refuse_metrics(settings, features.num_logits > 0, store is not None, has_training)
    dim = features.dim_of(shape)
    known = in_features(reference, features, show)
    if known.dim != dim:
        raise ValueError(
            f"features {features.name} have {dim} values, but the statistics in {reference.name} "
            f"are of {known.dim}: they are of other features"
        )
    return features, known


def _look_for_copies(
    samples: ImageSet, real: ImageSet, trained_on: TrainedOn, features: Features
) -> tuple[Record, Image.Image]:
    """The memorisation check's record, and the sheet of the closest pairs."""

    def chosen(rows: np.ndarray) -> ImageSet:
        return ImageSet(SelectedRows(real.images, rows), SelectedRows(real.vectors, rows))

    train, held_out = chosen(trained_on.rows), chosen(trained_on.held_out)
    record = check_memorization(samples, train, held_out, features, trained_on.flip)
    return record, draw_pairs(samples.images, train.images, record)


def _features_facts(features: Features, known: Known, settings: Evaluation) -> dict[str, Any]:
    facts = {
        "name": features.name,
        "sha256": features.sha256,
        "library": features.library,
        "dim": known.dim,
    }
    return facts | ({"pixel_max": settings.pixel_max} if features.name == "pca" else {})


def _process_facts() -> dict[str, Any]:
    """Versions, hardware, time."""
    state = process_state()
    return {
        "maskdm": maskdm.__version__,
        "commit": source_commit(),
        "torch": torch.__version__,
        "device": device_name(state.device),
        "num_ranks": state.num_processes,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _cautions(features: Features, known: Known, num: int) -> list[str]:
    """What a reader of the Fréchet distance should know of it."""
    cautions = []
    if num <= known.dim:
        cautions.append(
            f"{num:,} samples cannot fix a covariance of {known.dim:,} features: the Frechet "
            "distance is far too large, and compares only with that of as many samples"
        )
    elif features.name == "inception" and num < FEW:
        cautions.append(
            f"the FID of {num:,} samples is too large: it compares only with that of as many; "
            "papers use 50,000, ablations 10,000"
        )
    return cautions

"""Comparing a model's samples, or any images, with real ones, and recording how."""

from __future__ import annotations

import functools
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import maskdm
from maskdm.engine import device_name, main_first, process_state
from maskdm.evaluation.distances import part_distance
from maskdm.evaluation.features import Features, available_features, features_of
from maskdm.evaluation.measure import (
    Compared,
    TrainedOn,
    as_record,
    measure,
    metrics_to_measure,
    over_seeds,
)
from maskdm.evaluation.memorization import closest_pairs
from maskdm.evaluation.records import Record
from maskdm.evaluation.reference import (
    Reference,
    ReferenceFeatures,
    Shape,
    other_reference,
    reference_features,
    reference_of_run,
)
from maskdm.evaluation.samples import Samples, class_counts, drawn_samples, given_samples
from maskdm.evaluation.statistics import Statistics
from maskdm.families import GUIDANCE
from maskdm.images.joined import SelectedRows
from maskdm.images.known import crop_of
from maskdm.images.order import held_out_subset, training_subset
from maskdm.images.store import cache_dir
from maskdm.metrics import METRICS
from maskdm.recipe import Data, Evaluation, Sampling
from maskdm.runs.environment import source_commit
from maskdm.runs.find import Location, training_of
from maskdm.runs.load import Loaded, load_weak
from maskdm.sampling.guidance import refuse_guidance
from maskdm.sampling.samplers import refuse_settings
from maskdm.settings import changed

FEW = 10_000  # samples below which a FID is so biased that papers don't compare it
SMALL_DIM = 512  # features up to which ten splits of the reference take seconds


@dataclass(frozen=True)
class Evaluated:
    """The result of an evaluation; on ranks other than the first its record is incomplete."""

    record: Record  # see `records.py`
    statistics: Statistics  # of the reference's features
    # Samples and the training images nearest to them, uint8 (n, H, W, C) each, in the order of the
    # record's pairs; None where copies were not looked for.
    pairs: tuple[np.ndarray, np.ndarray] | None
    folder: Path | None = None  # where samples that were drawn from a model are kept


def evaluate_model(
    loaded: Loaded,
    settings: Evaluation | None = None,
    sampling: Sampling | None = None,
    weak: Loaded | None = None,
    reference: str | None = None,
    seeds: Sequence[int] = (0,),
    folder: Path | None = None,
    show: bool = False,
) -> Evaluated:
    """Draws images from a model and compares them with real ones. To be called on every rank.

    Args:
        loaded: the model.
        settings: features, number of images, metrics; None = those of its run.
        sampling: how images are drawn; None = the model's own.
        weak: the weak model of autoguidance; None = the one that `sampling` names.
        reference: the real images, any source; None = all images of the run's own source,
            prepared as for training. Where these have changed, its name takes them as others.
        seeds: images 0..num-1 are drawn once for each.
        folder: where drawn images are kept; None = RUN/evaluation, or the cache for a model
            outside of a run's folder.
        show: show the progress.

    Raises ValueError as `evaluate`, and without a reference for a model outside of a run's folder,
    or one whose images have changed since it was trained.

    Example:
        >>> evaluate_model(load_model("runs/digits")).record["metrics"]  # doctest: +SKIP
    """
    location, trained = loaded.location, loaded.trained
    if location.run is None and reference is None:
        raise ValueError(
            f"{location.folder} is not in a run's folder: name the real images with --reference"
        )
    if settings is None:
        settings = location.recipe.evaluation if location.run else Evaluation()
    sampling = sampling or loaded.sampling
    if weak is None and GUIDANCE[sampling.guidance.kind].needs_model:
        weak = load_weak(location, sampling.guidance.weak)
    weaker = weak.trained if weak else None
    for one in (trained, weaker):
        if one is not None:
            one.model.to(process_state().device)
    refuse_settings(trained.schedule, sampling)
    refuse_guidance(trained, sampling.guidance, weaker)
    show = show and process_state().is_main_process
    shape, num = trained.model.image_shape, settings.num
    real, trained_on = _real_images(location, shape, reference, show)
    kept = folder or (location.run or cache_dir()) / "evaluation"
    counts = class_counts(real.store, trained.model)
    draw = [
        functools.partial(drawn_samples, trained, sampling, num, seed, kept, weaker, show, counts)
        for seed in seeds
    ]
    evaluated = evaluate(draw, shape, real, settings, trained_on, show)
    record = evaluated.record
    record["samples"] |= {"model": str(location.folder), "weights": "ema", "seeds": [*seeds]}
    record["training"] = training_of(location)
    record["recipe"] = location.recipe.model_dump(mode="json") if location.run else None
    return replace(evaluated, folder=kept)


def measured_against(
    loaded: Loaded, settings: Evaluation, reference: str | None = None, show: bool = False
) -> Record:
    """Features and reference as the record of a model's evaluation will have them.

    Arguments and errors as for `evaluate_model`. To be called on every rank.
    """
    real, _ = _real_images(loaded.location, loaded.trained.model.image_shape, reference, show)
    device = process_state().device
    features, _ = main_first(lambda: available_features(settings, real.store, device))
    return {"features": _facts_of(features, settings), "reference": real.facts()}


def evaluate_images(
    name: str,
    reference: str,
    settings: Evaluation | None = None,
    num: int | None = None,
    show: bool = False,
) -> Evaluated:
    """Compares images of any origin with real ones. To be called on every rank.

    Args:
        name, reference: the images, which are not changed, and the real ones; any source.
        settings: features and metrics.
        num: how many of the images, a fixed random part; None = all.
        show: show the progress.

    Raises ValueError as `evaluate` and `given_samples`.
    """
    show = show and process_state().is_main_process
    samples = main_first(lambda: given_samples(name, num, show))
    height, width, channels = samples.images.shape[1:]
    data = Data(size=(height, width), channels=channels)
    real = main_first(lambda: other_reference(reference, data, False, show))
    evaluated = evaluate([lambda: samples], data.shape, real, settings or Evaluation(), None, show)
    evaluated.record.update(training=None, recipe=None)
    return evaluated


def evaluate(
    draw: Sequence[Callable[[], Samples]],
    shape: Shape,
    reference: Reference,
    settings: Evaluation,
    trained_on: TrainedOn | None = None,
    show: bool = False,
) -> Evaluated:
    """Measures samples against a reference. To be called on every rank.

    Whatever can be refused is refused before the first image is drawn.

    Args:
        draw: each gives the samples of one repetition.
        shape: height, width and channels of their images.
        reference: the real images.
        settings: features, metrics, resampled sets.
        trained_on: which of the reference's images the model has seen; None = unknown.
        show: show the progress.

    Raises ValueError for features or metrics that are not available, fewer than 4 real images, or
    images of different shapes.
    """
    start = time.perf_counter()
    features, real, notes = _prepared(shape, reference, settings, show)
    compared = Compared(settings, features, reference=real, trained_on=trained_on)
    names = metrics_to_measure(compared)
    prepare_sec, draw_sec = time.perf_counter() - start, 0.0
    drawn, every = [], []
    for one in draw:
        before = time.perf_counter()
        samples = one()
        draw_sec += time.perf_counter() - before
        drawn.append(samples)
        answers = features_of(samples.images, features, samples.folder, show)
        vectors, logits = features.vectors(answers), features.logits(answers)
        every.append(replace(compared, images=samples.images, vectors=vectors, logits=logits))

    is_main, first = process_state().is_main_process, drawn[0]
    if show:
        print("measuring", file=sys.stderr)
    figures = [measure(one, names) for one in every if is_main]
    reports = {name: None for name, row in METRICS.items() if row.is_report}
    if is_main:  # about the first drawing
        reports |= {name: METRICS[name].compute(every[0]) for name in names if name in reports}
    num, dim = len(first.images), len(real.statistics.mean)
    cautions = _cautions(features.name, dim, num) if "frechet" in names else []
    record = {
        "metrics": as_record(over_seeds(figures)) if is_main else {},
        "per_seed": [{name: one.value for name, one in each.items()} for each in figures],
        "chance": _chance(real, num) if is_main and "frechet" in names else None,
        "features": {**_facts_of(features, settings), "dim": dim},
        "samples": {"num": num, "shape": list(first.images.shape[1:]), **first.facts},
        "reference": reference.facts(),
        **reports,
        "notes": [*notes, *reference.notes, *first.notes, *cautions],
        "maskdm": maskdm.__version__,
        "commit": source_commit(),
        "torch": torch.__version__,
        "device": device_name(process_state().device),
        "num_ranks": process_state().num_processes,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "generate_sec": round(draw_sec, 2),
        "measure_sec": round(time.perf_counter() - start - draw_sec, 2),
        "reference_sec": round(prepare_sec, 2),
    }
    pairs = None
    if trained_on is not None and (memorization := reports["memorization"]) is not None:
        train = SelectedRows(real.images, trained_on.rows)
        pairs = closest_pairs(first.images, train, memorization)
    return Evaluated(record, real.statistics, pairs)


def _facts_of(features: Features, settings: Evaluation) -> dict[str, Any]:
    pixel_max = {"pixel_max": settings.pixel_max} if features.name == "pca" else {}
    return {**features.facts, **pixel_max}


def _real_images(
    location: Location, shape: Shape, name: str | None, show: bool
) -> tuple[Reference, TrainedOn | None]:
    """The real images for a model, and which of them it has seen, if they are its own."""
    from_run = location.run is not None
    data = location.recipe.data if from_run else Data(size=shape[:2], channels=shape[2])
    run = location.run
    if run is not None and name in (None, data.source):
        real, is_unchanged = main_first(lambda: reference_of_run(run, data, show))
        assert real.store is not None
        if is_unchanged:
            num = len(real.store)
            rows = training_subset(num, data), held_out_subset(num, data)
            recipe = location.recipe
            return real, TrainedOn(*rows, any(recipe.flips(stage) for stage in recipe.stages))
        if name is None:
            raise ValueError(
                f"the images of {real.name} are not those that the run in {run} was trained on "
                "(by their SHA-256): bring them back, or evaluate against them as against any "
                f"others, without the check for copies, with --reference {shlex.quote(real.name)}"
            )
    assert name is not None
    data = changed(data, crop=crop_of(data))
    return main_first(lambda: other_reference(name, data, from_run, show)), None


def _prepared(
    shape: Shape, reference: Reference, settings: Evaluation, show: bool
) -> tuple[Features, ReferenceFeatures, list[str]]:
    """The features, the reference in them, and notes. Raises ValueError for what does not fit."""
    store = reference.store
    if store is not None and len(store) < 4:
        raise ValueError(f"a distance needs at least 4 real images, but there are {len(store)}")
    if store is not None and store.images.shape[1:] != shape:
        raise ValueError(
            f"the samples are images of {'x'.join(map(str, shape))}, but the reference has "
            f"{'x'.join(map(str, store.images.shape[1:]))} (height, width, channels)"
        )
    device = process_state().device
    features, note = main_first(lambda: available_features(settings, store, device))
    dim = features.dim_of(shape)
    real = reference_features(reference, features, show)
    if len(real.statistics.mean) != dim:
        raise ValueError(
            f"features {features.name} have {dim} values, but the statistics in {reference.name} "
            f"have {len(real.statistics.mean)}: they are of other features"
        )
    return features, real, [one for one in (note, features.note) if one]


def _chance(real: ReferenceFeatures, num: int) -> dict[str, Any] | None:
    """The distance by chance alone: between two disjoint random parts of the reference."""
    if len(real.vectors) < 4:
        return None
    part = max(2, min(num, len(real.vectors) // 2))
    num_splits = 10 if real.vectors.shape[1] <= SMALL_DIM else 2
    return {"frechet": part_distance(real.vectors, part, num_splits), "num": part}


def _cautions(features: str, dim: int, num: int) -> list[str]:
    """What a reader of the Fréchet distance of so few samples should know."""
    if num <= dim:
        return [
            f"{num:,} samples do not determine a covariance of {dim:,} features: the Frechet "
            "distance is far too large, and comparable only with that of as many samples"
        ]
    if features == "inception" and num < FEW:
        return [
            f"the FID of {num:,} samples is too large, and comparable only with that of as many; "
            "papers use 50,000, ablations 10,000"
        ]
    return []

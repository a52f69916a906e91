"""`maskdm evaluate`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from maskdm.commands.common import (
    DONE,
    OptionalInt,
    SamplingFlags,
    changed,
    is_main_process,
    load,
    quiet,
    say_note,
)
from maskdm.commands.evaluation_text import evaluation_text
from maskdm.recipe import Data, Evaluation, Sampling
from maskdm.recipe_evaluation import Metric
from maskdm.training.find import Found, find_model, is_model, training_of

if TYPE_CHECKING:
    from maskdm.evaluation.evaluate import Evaluated, TrainedOn
    from maskdm.evaluation.reference import Reference

OptionalSource = Annotated[str | None, quiet(metavar="SOURCE")]
OptionalFeatures = Annotated[str | None, quiet(metavar="NAME|FILE")]
OptionalFile = Annotated[Path | None, quiet(metavar="FILE")]
Metrics = Annotated[tuple[Metric, ...], quiet(metavar="METRIC ...")]
Subject = Annotated[str, tyro.conf.Positional, quiet(metavar="RUN|IMAGES")]


def evaluate(
    run: Subject,
    *,
    settings: SamplingFlags,
    reference: OptionalSource = None,
    features: OptionalFeatures = None,
    weights: OptionalFile = None,
    num: OptionalInt = None,
    metrics: Metrics = (),
    seed: int = 0,
    seeds: int = 1,
    save_statistics: Annotated[Path | None, quiet(metavar="NPZ")] = None,
    out: OptionalFile = None,
    json_output: Annotated[bool, quiet(name="json"), tyro.conf.FlagCreatePairsOff] = False,
) -> int:
    """Measure how far images are from real ones, and say how sure that is.

    Of a run: draws images 0..num-1, and compares them with all images of the run's own source,
    prepared in the same way, never mirrored. Writes RUN/evaluation.json (of RUN@STAGE
    RUN/evaluation-STAGE.json). A killed evaluation continues where it was; drawn images are kept
    in RUN/evaluation, so that other features or a larger --num draw no image twice.

    Of images of any origin (a folder, zip, .npz, ...): compares them, as they are, with
    --reference. Writes ./evaluation.json.

    Args:
        run: a run's folder, RUN@STAGE, a checkpoint; or, with a reference, an exported model, a
            Hub id, or images.
        reference: other real images, any source, prepared as the samples were; or an .npz with mu
            and sigma, as other tools write it.
        features: in what images are compared; default: the recipe's. pca (of pixels), inception
            (FID's), dinov2, clip, or a file: TorchScript or .pt2, uint8 (N, C, H, W) to (N, D).
        weights: file of the weights of inception, dinov2 or clip, where they can't be downloaded.
        num: images to draw; default: the recipe's. Of given images: a random part.
        metrics: frechet, kid, sliced, precision-recall, inception-score, memorization; default:
            all that the features and the reference allow.
        seed: names the drawn images.
        seeds: draw so many times, with seeds from --seed up; gives means, and the spread.
        save_statistics: write the reference's mean and covariance there (mu, sigma).
        out: write the record there instead.
        json_output: print the whole record as JSON instead of a table.
    """
    sampling = settings.checked()
    if seeds < 1:
        raise ValueError(f"--seeds {seeds}: at least one")
    wanted = functools.partial(
        changed,
        features=features,
        weights=None if weights is None else str(weights),
        metrics=metrics or None,
    )

    from maskdm.evaluation.records import add_record, read_records

    path = out or _record_path(run)
    read_records(path)  # a damaged one is refused now
    if is_model(run):
        draw = functools.partial(wanted, num=num)
        found, folder = _of_model(
            run, sampling, reference, draw, range(seed, seed + seeds), save_statistics
        )
    else:
        if sampling != Sampling() or (seed, seeds) != (0, 1):
            raise ValueError(f"{run} holds images, not a model: flags of drawing do nothing here")
        found, folder = _of_images(run, num, reference, wanted, save_statistics), None
    if not is_main_process():
        return DONE
    record = found.record
    add_record(path, record)
    own_name = path.stem.replace("evaluation", "memorization")
    sheet = path.with_name(
        f"{own_name if own_name != path.stem else f'{path.stem}-memorization'}.png"
    )
    if found.sheet is not None:
        found.sheet.save(sheet)
    if json_output:
        print(json.dumps(record))
        return DONE
    print(evaluation_text(record))
    print(f"written to {path}" + (f", and {sheet}" if found.sheet is not None else ""))
    if folder is not None:
        print(f"the images are kept in {folder} ({_size(folder)}); remove them when you are done")
    return DONE


def _of_model(
    run: str,
    sampling: Sampling,
    reference: str | None,
    wanted: Callable[[Evaluation], Evaluation],
    seeds: range,
    save_statistics: Path | None,
) -> tuple[Evaluated, Path]:
    """The evaluation of a model, and the folder of its images."""
    found = find_model(run, say_note)
    if found.run is None and reference is None:
        raise ValueError(f"{run} is in no run's folder, so name the real images with --reference")
    evaluation = wanted(found.recipe.evaluation if found.run is not None else Evaluation())

    from maskdm.evaluation.evaluate import evaluate as measured
    from maskdm.evaluation.samples import drawn_samples
    from maskdm.evaluation.statistics import save_statistics as save
    from maskdm.images.store import cache_dir

    strong, weak = load(run, sampling)
    show, shape = is_main_process(), strong.trained.model.image_shape
    real, trained_on = _real_images(found, shape, reference, show)
    folder = _kept_images(run, found) or cache_dir() / "evaluation"
    draw = [
        functools.partial(
            drawn_samples,
            strong.trained,
            sampling,
            evaluation.num,
            seed,
            folder,
            weak.trained if weak else None,
            show,
        )
        for seed in seeds
    ]
    evaluated = measured(draw, shape, real, evaluation, trained_on, show)
    record = evaluated.record
    record["samples"] |= {"model": str(found.folder), "weights": "ema", "seeds": list(seeds)}
    record["training"] = training_of(found)
    record["recipe"] = found.recipe.model_dump(mode="json") if found.run is not None else None
    if save_statistics is not None and is_main_process():
        save(evaluated.statistics, save_statistics)
    return evaluated, folder


def _real_images(
    found: Found, shape: tuple[int, int, int], name: str | None, show: bool
) -> tuple[Reference, TrainedOn | None]:
    """The real images for a model, and which of them it has seen, where they are its own."""
    from maskdm.engine import main_first
    from maskdm.evaluation.evaluate import TrainedOn
    from maskdm.evaluation.reference import other_reference, own_reference
    from maskdm.images.known import crop_of
    from maskdm.images.order import held_out_subset, training_subset

    height, width, channels = shape
    if found.run is not None:
        data = found.recipe.data
    else:
        data = Data(size=(height, width), channels=channels)
    if found.run is None or name not in (None, data.source):
        assert name is not None  # else it was refused
        given, data = name, changed(data, crop=crop_of(data))
        return main_first(lambda: other_reference(given, data, found.run is not None, show)), None
    real = main_first(lambda: own_reference(data, show))
    assert real.store is not None
    num = len(real.store)
    return real, TrainedOn(training_subset(num, data), held_out_subset(num, data), data.flip)


def _of_images(
    name: str,
    num: int | None,
    reference: str | None,
    wanted: Callable[[Evaluation], Evaluation],
    save_statistics: Path | None,
) -> Evaluated:
    """The evaluation of images of any origin."""
    if reference is None:
        raise ValueError(f"{name} holds images: name the real ones with --reference SOURCE")
    evaluation = wanted(Evaluation())

    from maskdm.engine import main_first
    from maskdm.evaluation.evaluate import evaluate as measured
    from maskdm.evaluation.reference import other_reference
    from maskdm.evaluation.samples import given_samples
    from maskdm.evaluation.statistics import save_statistics as save

    show = is_main_process()
    samples = main_first(lambda: given_samples(name, num, show))
    height, width, channels = samples.images.shape[1:]
    data = Data(size=(height, width), channels=channels)
    real = main_first(lambda: other_reference(reference, data, False, show))
    evaluated = measured([lambda: samples], data.shape, real, evaluation, None, show)
    evaluated.record.update(training=None, recipe=None)
    if save_statistics is not None and is_main_process():
        save(evaluated.statistics, save_statistics)
    return evaluated


def _record_path(run: str) -> Path:
    if Path(run).is_dir() and is_model(run):
        return Path(run) / "evaluation.json"
    if "@" in run and is_model(run):  # RUN@STAGE
        folder, stage = run.rsplit("@", 1)
        return Path(folder) / f"evaluation-{stage}.json"
    return Path("evaluation.json")


def _kept_images(run: str, found: Found) -> Path | None:
    """Where drawn images are kept: beside the model, where it lies in a folder of the user's."""
    if found.run is not None:
        return found.run / "evaluation"
    return Path(run) / "evaluation" if Path(run).is_dir() else None


def _size(folder: Path) -> str:
    from maskdm.images.problems import size_text

    return size_text(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))

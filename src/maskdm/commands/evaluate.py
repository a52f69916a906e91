"""`maskdm evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from maskdm.commands.common import (
    DONE,
    JsonFlag,
    OptionalInt,
    SamplingFlags,
    is_main_process,
    load,
    quiet,
    refuse_among_images,
    say_how_long,
    say_note,
)
from maskdm.commands.evaluation_text import evaluation_text
from maskdm.families import MetricName
from maskdm.files import expanded, refuse_unwritable
from maskdm.recipe import Evaluation, Sampling
from maskdm.runs.find import is_model
from maskdm.settings import changed
from maskdm.words import size_text

if TYPE_CHECKING:
    from maskdm.evaluation.evaluate import Evaluated

OptionalFile = Annotated[Path | None, quiet(metavar="FILE")]
Metrics = Annotated[
    tuple[MetricName, ...],
    quiet(metavar="METRIC ...", help=Evaluation.model_fields["metrics"].description),
]


def evaluate(
    run: Annotated[str, tyro.conf.Positional, quiet(metavar="RUN|IMAGES")],
    *,
    settings: SamplingFlags,
    reference: Annotated[str | None, quiet(metavar="SOURCE")] = None,
    features: Annotated[str | None, quiet(metavar="NAME|FILE")] = None,
    weights: OptionalFile = None,
    num: OptionalInt = None,
    metrics: Metrics = (),
    seed: int = 0,
    seeds: int = 1,
    ema: Annotated[tuple[float, ...], quiet(metavar="FLOAT ...")] = (),
    save_statistics: Annotated[Path | None, quiet(metavar="NPZ")] = None,
    out: OptionalFile = None,
    json_output: JsonFlag = False,
) -> int:
    """Measure how far images are from real ones, with intervals.

    RUN: draws images 0..num-1, and compares them with all images of the run's own source, prepared
    in the same way, never mirrored. Writes RUN/evaluation.json (RUN@STAGE:
    RUN/evaluation-STAGE.json). A killed evaluation continues where it was; drawn images are kept
    in RUN/evaluation, so that other features or a larger --num draw no image twice.

    IMAGES of any origin (a folder, zip, .npz, ...): compares them, unchanged, with --reference.
    Writes ./evaluation.json.

    Args:
        run: a run's folder, RUN@STAGE, a checkpoint; or, with a reference, an exported model, a
            Hub id, or images.
        reference: other real images, any source, prepared as the samples were; or an .npz with mu
            and sigma, as other tools write it.
        features: features in which images are compared; default: the recipe's. pca (of pixels),
            inception (FID's), dinov2, clip, or a file: TorchScript or .pt2, uint8 (N, C, H, W) to
            (N, D).
        weights: file of the weights of inception, dinov2 or clip, if they cannot be downloaded.
        num: images to draw; default: the recipe's. For given images: a random part of them.
        seed: names the drawn images.
        seeds: draw so many times, with seeds from --seed up; gives means, and the spread.
        ema: relative widths of other averages of the weights, each evaluated by itself: a sweep for
            runs with ema.kind power. Default: the run's own.
        save_statistics: write the reference's mean and covariance there (mu, sigma).
        out: write the record there instead.
        json_output: print the whole record as JSON instead of a table.
    """
    sampling = settings.checked()
    if seeds < 1:
        raise ValueError(f"--seeds {seeds}: at least one")
    _refuse_places(out, save_statistics)

    from maskdm.evaluation.evaluate import evaluate_images
    from maskdm.evaluation.records import RECORDS, add_record, read_records, records_file

    path = out or (records_file(run) if is_model(run) else None) or Path(RECORDS)
    read_records(path)  # a damaged one is refused now
    refuse_unwritable(path, "--out")
    changes: dict[str, Any] = {
        "features": features,
        "weights": None if weights is None else str(weights),
        "metrics": metrics or None,
    }
    if not is_model(run):
        if sampling != Sampling() or (seed, seeds, ema) != (0, 1, ()):
            raise ValueError(f"{run} holds images, not a model: flags for sampling have no effect")
        if reference is None:
            raise ValueError(f"{run} holds images: name the real ones with --reference SOURCE")
        wanted = changed(Evaluation(), **changes)
        results = [evaluate_images(run, reference, wanted, num, show=True)]
    else:
        refuse_among_images(run, path)  # a sheet is saved beside it
        how = (sampling, {**changes, "num": num}, reference, range(seed, seed + seeds))
        results = [_of_model(run, width, *how) for width in ema or (None,)]
    if not is_main_process():
        return DONE
    for result in results:
        add_record(path, result.record)
        if ema and not json_output:
            print(f"average of relative width {result.record['samples']['ema']:g}")
        _report(result, path, json_output)
    if path == expanded(run) / RECORDS and (path.parent / "recipe.yaml").is_file():
        from maskdm.report.page import update_report

        update_report(path.parent, say_note)
    if save_statistics is not None:
        from maskdm.evaluation import statistics

        statistics.save_statistics(results[0].statistics, save_statistics)
    return DONE


def _of_model(
    run: str,
    width: float | None,
    sampling: Sampling,
    changes: dict[str, Any],
    reference: str | None,
    seeds: range,
) -> Evaluated:
    """Evaluates a model, or its average of another width."""
    from maskdm.evaluation.evaluate import evaluate_model

    strong, weak = load(run, sampling, width)
    location = strong.location
    wanted = changed(location.recipe.evaluation if location.run else Evaluation(), **changes)
    copied = expanded(run) if location.run is None and expanded(run).is_dir() else None
    folder = None if copied is None else copied / "evaluation"
    say_how_long(strong, sampling, wanted.num * len(seeds), weak, is_kept=True)
    result = evaluate_model(strong, wanted, sampling, weak, reference, seeds, folder, True)
    result.record["samples"]["ema"] = width
    return result


def _refuse_places(out: Path | None, statistics: Path | None) -> None:
    """Raises ValueError for a record or statistics that cannot be written there."""
    if out is not None and out.is_dir():
        raise ValueError(f"--out {out} is a folder: use the name of a file")
    if statistics is not None:
        if statistics.suffix != ".npz" or statistics.is_dir():
            raise ValueError(f"--save-statistics {statistics}: use a file name that ends in .npz")
        refuse_unwritable(statistics, "--save-statistics")


def _report(result: Evaluated, path: Path, json_output: bool) -> None:
    """Saves the sheet of pairs beside the record, and prints the result."""
    written = str(path)
    if result.pairs is not None:
        from maskdm.report.sheets import pairs_sheet

        name = path.stem.replace("evaluation", "memorization")
        name = name if name != path.stem else f"{path.stem}-memorization"
        sheet = path.with_name(f"{name}.png")
        pairs_sheet(*result.pairs, result.record["memorization"]).save(sheet)
        written += f", and {sheet}"
    if json_output:
        print(json.dumps(result.record))
        return
    print(evaluation_text(result.record))
    print(f"written to {written}")
    if (folder := result.folder) is not None:
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        print(f"the images are kept in {folder} ({size_text(size)}): remove them when you are done")

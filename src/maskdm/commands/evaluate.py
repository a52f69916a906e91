"""`maskdm evaluate`."""

from __future__ import annotations

import json
import shutil
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
from maskdm.commands.compare import with_control
from maskdm.commands.evaluation_text import evaluation_text, figures_text
from maskdm.files import expanded, refuse_unwritable
from maskdm.metrics import MetricName
from maskdm.recipe import Evaluation, Sampling
from maskdm.recipe_files import load_recipe
from maskdm.runs.find import is_model, kept_averages
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
    curve: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
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
        curve: evaluate the averages that RUN has kept (keep_every) instead, each once, without
            keeping images; compare RUN RUN --x flops --metric frechet draws them. --metrics is
            frechet unless given.
        save_statistics: write the reference's mean and covariance there (mu, sigma).
        out: write the record there instead.
        json_output: print the whole record as JSON instead of a table.
    """
    sampling = settings.checked()
    if seeds < 1:
        raise ValueError(f"--seeds {seeds}: at least one")
    _refuse_weights(features, weights)
    _refuse_places(out, save_statistics)

    from maskdm.evaluation.evaluate import evaluate_images
    from maskdm.evaluation.records import RECORDS, read_records, records_file

    path = out or (records_file(run) if is_model(run) else None) or Path(RECORDS)
    read_records(path)  # a damaged one is refused now
    refuse_unwritable(path, "--out")
    changes: dict[str, Any] = {
        "features": features,
        "weights": None if weights is None else str(weights),
        "metrics": metrics or None,
    }
    if not is_model(run):
        if sampling != Sampling() or (seed, seeds, ema, curve) != (0, 1, (), False):
            raise ValueError(f"{run} holds images, not a model: flags for sampling have no effect")
        if reference is None:
            raise ValueError(f"{run} holds images: name the real ones with --reference SOURCE")
        wanted = changed(Evaluation(), **changes)
        results = [evaluate_images(run, reference, wanted, num, show=True)]
        if is_main_process():
            _write(results[0], path, json_output)
    else:
        refuse_among_images(run, path)  # a sheet is saved beside it
        how = (sampling, {**changes, "num": num}, reference, range(seed, seed + seeds))
        if curve:
            _refuse_with_curve(ema, save_statistics, json_output)
            return _measure_curve(run, path, *how)
        for width in ema or (None,):
            results = [_of_model(run, width, *how)]
            if is_main_process():  # at once: a later width may fail
                _write(results[0], path, json_output)
    if is_main_process():
        if save_statistics is not None:
            from maskdm.evaluation import statistics

            statistics.save_statistics(results[0].statistics, save_statistics)
        _conclude(run, path, json_output)
    return DONE


def _write(result: Evaluated, path: Path, json_output: bool) -> None:
    """Adds a record to its file, and prints it."""
    from maskdm.evaluation.records import add_record

    add_record(path, result.record)
    width = result.record["samples"].get("ema")
    if width is not None and not json_output:
        print(f"average of relative width {width:g}")
    _report(result, path, json_output)


def _conclude(run: str, path: Path, json_output: bool) -> None:
    """Brings the run's report up to date, and names the next command."""
    from maskdm.evaluation.records import RECORDS

    own = expanded(run)
    is_run = (own / "recipe.yaml").is_file()
    if is_run and path == own / RECORDS:
        from maskdm.report.page import update_report

        update_report(own, say_note)
    if is_run and not json_output:
        print(f"next      {_next(own)}")


def _next(run: Path) -> str:
    """The command to go on with: the control without masks, or what it shows."""
    if len(with_control((str(run),))) > 1:
        return f"maskdm compare {run}"
    if any(stage.mask.rate for stage in load_recipe(run / "recipe.yaml").stages):
        return f"maskdm train {run} --control dense"
    return f"maskdm sample {run} --num 64 --out grid.png"


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
    wanted = _settings_of(location.recipe.evaluation if location.run else Evaluation(), changes)
    copied = expanded(run) if location.run is None and expanded(run).is_dir() else None
    folder = None if copied is None else copied / "evaluation"
    say_how_long(strong, sampling, wanted.num * len(seeds), weak, is_kept=True)
    result = evaluate_model(strong, wanted, sampling, weak, reference, seeds, folder, True)
    result.record["samples"]["ema"] = width
    return result


def _settings_of(own: Evaluation, changes: dict[str, Any]) -> Evaluation:
    """A recipe's settings with those of the flags; its weights are of its own features."""
    if changes["features"] not in (None, own.features):
        own = Evaluation(**{**own.model_dump(), "weights": None})
    return changed(own, **changes)


def _measure_curve(
    run: str,
    path: Path,
    sampling: Sampling,
    changes: dict[str, Any],
    reference: str | None,
    seeds: range,
) -> int:
    """Evaluates the averages that a run has kept, except those that were evaluated so before."""
    from maskdm.evaluation.evaluate import evaluate_model, measured_against
    from maskdm.evaluation.records import add_record, is_recorded, read_records
    from maskdm.evaluation.samples import weights_sha256

    folder = expanded(run)
    kept = kept_averages(folder) if folder.is_dir() else []
    if not kept:
        raise ValueError(
            f"{run} has kept no averages for a curve: train with --keep-every 10000, say, which a "
            "run that goes on takes, too"
        )
    changes = {**changes, "metrics": changes["metrics"] or ("frechet",)}
    records = read_records(path)  # as all ranks see them, before the first one writes
    against = None
    for place in kept:
        strong, weak = load(str(place), sampling)
        recipe = strong.location.recipe
        wanted = _settings_of(recipe.evaluation, changes)
        against = against or measured_against(strong, wanted, reference, show=True)
        sha256 = weights_sha256(strong.trained.model)
        if is_recorded(records, sha256, sampling, wanted, seeds, against):
            _say_point(place, "evaluated before")
            continue
        say_how_long(strong, sampling, wanted.num * len(seeds), weak, is_kept=True)
        # A folder for each: the first rank removes it while others may draw for the next.
        drawn = folder / "evaluation" / "curve" / place.name
        result = evaluate_model(strong, wanted, sampling, weak, reference, seeds, drawn, True)
        result.record["samples"]["ema"] = None
        if is_main_process():
            add_record(path, result.record)
            shutil.rmtree(drawn, ignore_errors=True)
            _say_point(place, figures_text(result.record))
    if is_main_process():
        shutil.rmtree(folder / "evaluation" / "curve", ignore_errors=True)
        print(f"written to {path}")
        first = changes["metrics"][0].replace("_", "-")
        print(f"next    maskdm compare {run} OTHER --x flops --metric {first}")
    return DONE


def _say_point(place: Path, text: str) -> None:
    if is_main_process():
        print(f"step {int(place.name.removeprefix('step-')):>9,}  {text}", flush=True)


def _refuse_with_curve(ema: tuple[float, ...], statistics: Path | None, json_output: bool) -> None:
    """Raises ValueError for flags that mean nothing beside --curve."""
    flags = {"--ema": bool(ema), "--save-statistics": statistics is not None, "--json": json_output}
    if useless := [flag for flag, is_given in flags.items() if is_given]:
        raise ValueError(f"{useless[0]} has no effect with --curve: leave it out")


def _refuse_weights(features: str | None, weights: Path | None) -> None:
    """Raises ValueError for weights of features that have none."""
    if features == "pca" and weights is not None:
        raise ValueError("features pca have no weights: leave out --weights")


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

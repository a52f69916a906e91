"""`maskdm evaluate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from maskdm.commands.common import (
    DONE,
    OptionalInt,
    Run,
    SamplingFlags,
    changed,
    is_main_process,
    load,
    quiet,
    sampling_text,
    say_note,
)
from maskdm.recipe import Data, Evaluation, Sampling

OptionalSource = Annotated[str | None, quiet(metavar="SOURCE")]
OptionalFeatures = Annotated[Literal["pca"] | None, quiet(metavar="{pca}")]


def evaluate(
    run: Run,
    *,
    settings: SamplingFlags,
    features: OptionalFeatures = None,
    num: OptionalInt = None,
    reference: OptionalSource = None,
    seed: int = 0,
    json_output: Annotated[bool, quiet(name="json"), tyro.conf.FlagCreatePairsOff] = False,
) -> int:
    """Measure how far generated images are from real ones; writes RUN/evaluation.json.

    (Of RUN@STAGE it writes RUN/evaluation-STAGE.json; of a Hub id ./evaluation.json.)

    The real images are the run's own source, prepared in the same way, never mirrored (all of
    it, also where the run was trained on a fraction).

    Args:
        run: a run's folder, RUN@STAGE, a checkpoint; or, with a reference, an exported model or
            a Hub id.
        features: in what the images are compared; default: the recipe's.
            pca = the leading principal components of the real images' pixels.
        num: images to generate; default: the recipe's.
        reference: other real images: a folder or zip, prepared as the recipe says.
        seed: names the generated images.
        json_output: print the whole record as JSON instead of a summary.
    """
    sampling = settings.checked()

    from maskdm.training.find import find_model

    found = find_model(run, say_note)
    if found.run is None and reference is None:
        raise ValueError(f"{run} is in no run's folder, so name the real images with --reference")

    from maskdm.evaluation import evaluate as evaluation
    from maskdm.images.store import open_store

    strong, weak = load(run, sampling)
    height, width, channels = strong.trained.model.image_shape
    data, wanted = Data(size=(height, width), channels=channels), Evaluation()
    if found.run is not None:
        data, wanted = found.recipe.data, found.recipe.evaluation
    data = changed(data, source=reference)
    wanted = changed(wanted, features=features, num=num)
    store = open_store(data, progress=sys.stderr.isatty())
    record = evaluation.evaluate(
        strong.trained,
        store,
        wanted,
        sampling,
        seed,
        weak.trained if weak else None,
        show=sys.stderr.isatty(),
    )
    record = {"model": str(found.folder), **record}
    if not is_main_process():
        return DONE
    if Path(run).is_dir():
        path = Path(run) / "evaluation.json"
    elif found.run is not None:  # RUN@STAGE
        path = found.run / f"evaluation-{run.rsplit('@', 1)[1]}.json"
    else:  # fetched from the Hub
        path = Path("evaluation.json")
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    if json_output:
        print(json.dumps(record))
        return DONE
    _print(record, sampling)
    print(f"written to {path}")
    return DONE


def _print(record: dict[str, Any], sampling: Sampling) -> None:
    """The record of an evaluation in a few lines, with all that the number stands on."""
    num_real, source = record["reference"]["shape"][0], record["reference"]["source"]
    print(f"Frechet distance {record['distance']:.2f}")
    print(f"  {record['num']:,} images from {record['model']},")
    print(f"  seed {record['seed']}, {sampling_text(sampling)}")
    print(f"  against {num_real:,} real images from {source}, in {record['num_components']}")
    print(f"  principal components of pixels from 0 to {record['pixel_max']:g}")
    print(f"two halves of the real images differ by {record['reference_halves']:.2f};")
    print("  sets of their whole number, as real as they are, would by about half of it")

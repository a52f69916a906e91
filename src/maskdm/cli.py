"""The `maskdm` command: one function a command; its signature and docstring are its help."""

from __future__ import annotations

import difflib
import errno
import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import maskdm
from maskdm.recipe import Evaluation, Recipe
from maskdm.recipe_files import load_recipe, recipe_names, recipe_text
from maskdm.settings import unchecked

# torch and diffusers take seconds to import: each command imports what it needs, so that help
# and mistakes answer at once.

DONE, FAILED, WRONG_USAGE, STOPPED = 0, 1, 2, 3  # exit codes

# How arguments read in the help. Where None means "as the recipe says", the text says so.
_quiet = functools.partial(tyro.conf.arg, help_behavior_hint="")
RecipeName = Annotated[str, tyro.conf.Positional, _quiet(metavar="RECIPE")]
Run = Annotated[str, tyro.conf.Positional, _quiet(metavar="RUN")]
OptionalName = Annotated[str | None, tyro.conf.Positional, _quiet(metavar="[NAME]")]
OptionalInt = Annotated[int | None, _quiet(metavar="INT")]
OptionalFloat = Annotated[float | None, _quiet(metavar="FLOAT")]
OptionalSource = Annotated[str | None, _quiet(metavar="SOURCE")]
OptionalFeatures = Annotated[Literal["pca"] | None, _quiet(metavar="{pca}")]

HELP = """\
usage: maskdm COMMAND ...

Train raw-pixel diffusion models cheaply: masked pre-training, then denoising fine-tuning.

  recipes [NAME]              list the packaged recipes, or print one
  train RECIPE --out RUN      run a recipe's stages; the same command again continues them
  sample RUN --out FILE       draw images: a grid (.png), an array (.npz), or a folder of PNGs
  evaluate RUN                distance between generated and real images

`maskdm COMMAND --help` tells more. A first try, five minutes on a laptop:

  maskdm train digits --out runs/digits
  maskdm sample runs/digits --num 64 --out digits.png
"""


def recipes(name: OptionalName = None) -> int:
    """List the packaged recipes, or print one (save it to a file, change it, and train that).

    Args:
        name: the recipe to print.
    """
    if name is not None:
        print(recipe_text(name), end="")
        return DONE
    for known in recipe_names():
        comment = recipe_text(known).splitlines()[0].removeprefix("# ")
        print(f"{known:14} {comment}")
    return DONE


def train(
    recipe: RecipeName,
    *,
    out: Path,
    settings: Annotated[Recipe, tyro.conf.arg(name="")],
    resume: Literal["auto", "never"] = "auto",
) -> int:
    """Run a recipe's stages. Every setting of the recipe is a flag, and the flag wins.

    On a folder that holds an unfinished run of the same settings it continues that run, exactly.
    Exit codes: 0 done, 1 failed, 2 wrong input, 3 stopped by a signal after saving.

    Args:
        recipe: name of a packaged recipe (`maskdm recipes`), or a YAML file.
        out: the run's folder.
        resume: auto continues a run in the folder; never refuses one.
    """
    from accelerate import Accelerator

    from maskdm.hub import make_pipeline, save_pipeline
    from maskdm.images.output import save_grid
    from maskdm.models.uvit import UViT
    from maskdm.report import plot_loss
    from maskdm.sampling.generate import generate_on_all_ranks
    from maskdm.sampling.samplers import make_scheduler
    from maskdm.training import trainer

    settings = settings.checked()
    for_previews = _changed(settings.sampling, steps=settings.preview_steps)

    def preview(accelerator: Accelerator, model: UViT, file: Path) -> None:
        images = generate_on_all_ranks(
            model, make_scheduler(settings.diffusion), for_previews, settings.num_previews
        )
        if accelerator.is_main_process:
            save_grid(images, file)

    result = trainer.train(settings, out, resume, preview if settings.num_previews else None)
    if not result.finished:
        return STOPPED
    if not _is_main_process():
        return DONE
    save_pipeline(make_pipeline(result.ema, settings), out / "model")
    print(f"model   {out / 'model'}")
    print(f"loss    {plot_loss(out)}")
    for file in sorted((out / "samples").glob("step-*.png"))[-1:]:
        print(f"preview {file}")
    print(f"next    maskdm sample {out} --num 64 --out grid.png")
    return DONE


def sample(
    run: Run,
    *,
    out: Path,
    num: int = 64,
    seed: int = 0,
    steps: OptionalInt = None,
    eta: OptionalFloat = None,
    batch_size: OptionalInt = None,
) -> int:
    """Draw images from a model. Image i depends on the seed and i alone.

    Args:
        run: a run's folder, a checkpoint, or an exported model.
        out: grid.png = one sheet; images.npz = uint8 (N, H, W, C) under arr_0 (labels of a
            conditional model under arr_1); any other name = a new folder of PNG files.
        num: number of images.
        seed: another seed, other images.
        steps: network evaluations per image; default: the recipe's.
        eta: DDIM's noise, 0 to 1; default: the recipe's.
        batch_size: images at a time per device; default: the recipe's.
    """
    if num < 1:
        raise ValueError(f"--num {num}: at least one image")

    from maskdm.images.output import refuse_output, save_images
    from maskdm.sampling.generate import default_labels, generate_on_all_ranks

    refuse_output(out)
    pipeline, origin = _load(run)
    settings = _changed(pipeline.settings, steps=steps, eta=eta, batch_size=batch_size)
    images = generate_on_all_ranks(
        pipeline.denoiser, pipeline.scheduler, settings, num, seed, progress=sys.stderr.isatty()
    )
    if not _is_main_process():
        return DONE
    save_images(images, out, default_labels(pipeline.denoiser, range(num)))
    print(f"{num} images from {origin}, seed {seed}, {settings.steps} steps -> {out}")
    return DONE


def evaluate(
    run: Run,
    *,
    features: OptionalFeatures = None,
    num: OptionalInt = None,
    reference: OptionalSource = None,
    seed: int = 0,
    steps: OptionalInt = None,
    eta: OptionalFloat = None,
    json_output: Annotated[bool, _quiet(name="json"), tyro.conf.FlagCreatePairsOff] = False,
) -> int:
    """Measure how far generated images are from real ones; writes RUN/evaluation.json.

    The real images are the run's own training set, prepared in the same way, never mirrored.

    Args:
        run: a run's folder, or its model or one of its checkpoints.
        features: in what the images are compared; default: the recipe's.
            pca = the leading principal components of the real images' pixels.
        num: images to generate; default: the recipe's.
        reference: other real images: a folder or zip, prepared as the recipe says.
        seed: names the generated images.
        steps: network evaluations per image; default: the recipe's.
        eta: DDIM's noise, 0 to 1; default: the recipe's.
        json_output: print the whole record as JSON instead of a summary.
    """
    near = [Path(run).resolve(), *Path(run).resolve().parents[:2]]  # RUN/checkpoints/step-...
    known = [folder / "recipe.yaml" for folder in near if (folder / "recipe.yaml").is_file()]
    if not known:
        raise ValueError(f"{run} is no run folder, nor in one: there is no recipe.yaml")
    recipe = load_recipe(known[0])
    settings: Evaluation = _changed(recipe.evaluation, features=features, num=num)
    sampling = _changed(recipe.sampling, steps=steps, eta=eta)
    data = _changed(recipe.data, source=reference)

    from maskdm.evaluation import evaluate as evaluation
    from maskdm.images.store import open_store

    pipeline, origin = _load(run)
    store = open_store(data, progress=sys.stderr.isatty())
    record = evaluation.evaluate(
        pipeline.denoiser,
        pipeline.scheduler,
        store,
        settings,
        sampling,
        seed,
        show=sys.stderr.isatty(),
    )
    record = {"model": origin, **record}
    if not _is_main_process():
        return DONE
    path = Path(run) / "evaluation.json"
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    if json_output:
        print(json.dumps(record))
        return DONE
    _print_evaluation(record)
    print(f"written to {path}")
    return DONE


COMMANDS: dict[str, Callable[..., int]] = {
    "recipes": recipes,
    "train": train,
    "sample": sample,
    "evaluate": evaluate,
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command line (default: this process's) and gives its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    # Spinning threads slow small models tenfold on a busy CPU (docs/log.md); set before torch is.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return DONE if arguments else WRONG_USAGE
    if arguments[0] == "--version":
        print(f"maskdm {maskdm.__version__}")
        return DONE
    try:
        return _run(arguments[0], arguments[1:])
    except SystemExit as leaving:  # tyro has printed its help or its error
        return leaving.code if isinstance(leaving.code, int) else WRONG_USAGE
    except KeyboardInterrupt:
        print("maskdm: interrupted", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # the reader of our output left (`maskdm recipes | head`)
        sys.stderr.close()
        return FAILED
    except (ValueError, RuntimeError, OSError) as error:
        if not _is_ours(error):
            raise
        print(f"maskdm: {_text(error)}", file=sys.stderr)
        return WRONG_USAGE if isinstance(error, ValueError) else FAILED


def _run(name: str, arguments: list[str]) -> int:
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(COMMANDS)}"
        raise ValueError(f"unknown command {name!r}: {hint}")
    command = _deferred(COMMANDS[name])
    if name == "train":
        command = functools.partial(command, settings=_named_recipe(arguments))
    with unchecked():
        call = tyro.cli(command, prog=f"maskdm {name}", args=arguments)
    code = call()
    if "maskdm.engine" in sys.modules:
        sys.modules["maskdm.engine"].leave()
    return code


def _deferred(command: Callable[..., int]) -> Callable[..., Callable[[], int]]:
    """A command that, given its arguments, is ready to run: parsing ends before work begins."""

    @functools.wraps(command)
    def prepare(*args: Any, **kwargs: Any) -> Callable[[], int]:
        return functools.partial(command, *args, **kwargs)

    return prepare


def _named_recipe(arguments: list[str]) -> Recipe:
    """The recipe that `train`'s arguments begin with: its stages decide which flags there are."""
    if arguments and not arguments[0].startswith("-"):
        return load_recipe(arguments[0])
    if "-h" in arguments or "--help" in arguments:
        return load_recipe("digits")
    raise ValueError(
        "the recipe comes first: maskdm train RECIPE --out RUN, where RECIPE is "
        f"{', '.join(recipe_names())}, or a YAML file"
    )


def _load(run: str) -> tuple[Any, str]:
    """The pipeline that a user names, on this process's device."""
    from diffusers.utils import logging

    from maskdm.engine import process_state
    from maskdm.hub import load_pipeline

    logging.disable_progress_bar()
    pipeline, origin = load_pipeline(run, functools.partial(print, "note:", file=sys.stderr))
    pipeline.to(process_state().device)
    return pipeline, origin


def _print_evaluation(record: dict[str, Any]) -> None:
    """The record of an evaluation in a few lines, with all that the number stands on."""
    num_real, source = record["reference"]["shape"][0], record["reference"]["source"]
    print(f"Frechet distance {record['distance']:.2f}")
    print(f"  {record['num']:,} images from {record['model']},")
    print(f"  seed {record['seed']}, {record['sampling']['steps']} steps")
    print(f"  against {num_real:,} real images from {source}, in {record['num_components']}")
    print(f"  principal components of pixels from 0 to {record['pixel_max']:g}")
    print(f"two halves of the real images differ by {record['reference_halves']:.2f};")
    print("  sets of their whole number, as real as they are, would by about half of it")


def _changed(settings: Any, **changes: object) -> Any:
    """A group of settings with those flags that were given (are not None), checked again."""
    given = {name: value for name, value in changes.items() if value is not None}
    return type(settings)(**{**settings.model_dump(), **given})


def _is_main_process() -> bool:
    from maskdm.engine import process_state

    return process_state().is_main_process


def _is_ours(error: Exception) -> bool:
    """Whether this package raised it on purpose, or the operating system refused something.

    Anything else is a defect, and keeps its traceback.
    """
    if isinstance(error, OSError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parent)


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" at {error.filename}" if error.filename else ""
        return f"the disk is full{where}; saved checkpoints are intact: make room and run again"
    return " ".join(str(error).split()) or type(error).__name__

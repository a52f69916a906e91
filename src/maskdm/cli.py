"""The `maskdm` command: which command, with what settings, and what its failure means."""

from __future__ import annotations

import errno
import functools
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

import maskdm
from maskdm.commands.app import app
from maskdm.commands.check import check
from maskdm.commands.common import DONE, FAILED, WRONG_USAGE
from maskdm.commands.compare import compare
from maskdm.commands.evaluate import evaluate
from maskdm.commands.export import export
from maskdm.commands.import_model import import_model
from maskdm.commands.inpaint import inpaint
from maskdm.commands.pack import pack
from maskdm.commands.plan import plan
from maskdm.commands.push import push
from maskdm.commands.recipes import recipes
from maskdm.commands.report import report
from maskdm.commands.reproduce import reproduce
from maskdm.commands.sample import sample
from maskdm.commands.search import search
from maskdm.commands.short_help import short_help
from maskdm.commands.train import train
from maskdm.files import expanded
from maskdm.recipe import Recipe, Sampling
from maskdm.recipe_files import load_recipe, recipe_names
from maskdm.runs.find import find_model, is_model
from maskdm.settings import unchecked
from maskdm.words import one_line, suggestion

# torch and diffusers take seconds to import: each command imports what it needs, so that help
# and mistakes answer at once.

HELP = """\
usage: maskdm COMMAND ...

Train raw-pixel diffusion models cheaply: masked pre-training, then denoising fine-tuning.

  recipes [NAME]              list the packaged recipes, or print one
  check SOURCE                inspect images before training on them
  pack SOURCE OUT --size 64   decode images ahead of time, into a store
  plan RECIPE                 say what a run will cost: time, memory, disk
  train RECIPE --out RUN      run a recipe's stages; the same command again continues them
  search RECIPE --hours N     find the masks, shares and learning rates that pay
  sample RUN --out FILE       draw images: a grid (.png), an array (.npz), or a folder of PNGs
  inpaint RUN IMAGE --mask M  draw the missing parts of an image
  evaluate RUN                measure how far generated (or any) images are from real ones
  compare RUN RUN ...         which run is better, and is it more than noise; curves
  reproduce TABLE             a table or figure of the paper, at a scale that one has
  report RUN [RUN ...]        all of it on one page, an HTML file without a network
  app RUN [RUN ...]           a web page on this machine: sample, watch, inpaint, compare
  import FILE OUT             take over a checkpoint of U-ViT's or of the paper's authors
  export RUN OUT              write the network for other runtimes: .pt2 (torch.export), .onnx
  push RUN OWNER/NAME         upload a model to the Hugging Face Hub, with its card

`maskdm COMMAND --help` explains a command. A first try, three minutes on a laptop:

  maskdm train digits --out runs/digits
  maskdm sample runs/digits --num 64 --out digits.png
"""

COMMANDS: dict[str, Callable[..., int]] = {
    "recipes": recipes,
    "check": check,
    "pack": pack,
    "plan": plan,
    "train": train,
    "search": search,
    "sample": sample,
    "inpaint": inpaint,
    "evaluate": evaluate,
    "compare": compare,
    "reproduce": reproduce,
    "report": report,
    "app": app,
    "import": import_model,
    "export": export,
    "push": push,
}


# What other tools call a setting -> what to use here.
OTHER_NAMES = {
    "--lr": "--stages.all.lr",
    "--learning-rate": "--stages.all.lr",
    "--batch-size": "--stages.all.batch-size",
    "--train-batch-size": "--stages.all.batch-size",
    "--num-epochs": "--epochs",
    "--num-train-epochs": "--epochs",
    "--max-train-steps": "--stages.0.steps and so on, or a budget such as --hours",
    "--train-num-steps": "--stages.0.steps and so on, or a budget such as --hours",
    "--steps-per-epoch": "a budget: --epochs, --images or --hours",
    "--resolution": "--data.size",
    "--image-size": "--data.size",
    "--data-dir": "--data.source",
    "--train-data-dir": "--data.source",
    "--dataset-name": "--data.source hf:OWNER/NAME",
    "--output-dir": "--out",
    "--outdir": "--out",
    "--config": "the file as the first argument: maskdm train FILE.yaml",
    "--mixed-precision": "--precision",
    "--ema-decay": "--stages.all.ema.decay",
    "--resume-from-checkpoint": "the same command again, or maskdm train RUN",
    "--num-images": "--num",
    "--num-samples": "--num",
    "--num-inference-steps": "--steps",
    "--guidance-scale": "--guidance.scale, with --guidance.kind",
    "--mask-ratio": "--stages.0.mask.rate",
}
OF_SAMPLING, SAMPLES = ("--batch-size",), ("sample", "inpaint", "evaluate")
OF_IMAGES = ("check", "pack")  # whose flags are those of a recipe's data, without `--data.`
OF_PLAN = ("--gpu", "--gpus", "--share", "--json")  # flags that train does not have
_usual_format = warnings.formatwarning
NEEDS_NO_RUN = (
    "recipes check pack plan compare report app import reproduce export push search".split()
)


def main(argv: list[str] | None = None) -> int:
    """Runs a command line (default: this process's) and gives its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return DONE if arguments else WRONG_USAGE
    if arguments[0] == "--version":
        print(f"maskdm {maskdm.__version__}")
        return DONE
    warnings.formatwarning = _formatted
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


def _formatted(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """A warning as it is printed: this package's own in one line, without the place in the code."""
    if category is UserWarning and Path(filename).is_relative_to(Path(__file__).parent):
        return f"maskdm: note: {message}\n"
    return _usual_format(message, category, filename, lineno, line)


def _run(name: str, arguments: list[str]) -> int:
    if name not in COMMANDS:
        raise ValueError(f"unknown command {name!r}: {suggestion(name, COMMANDS)}")
    _point_out_other_names(name, arguments)
    command = _deferred(COMMANDS[name])
    # The first argument decides which flags there are, and what they are by default.
    if name in ("train", "plan", "search"):
        if {"-h", "--help"} & {*arguments}:
            print(short_help(name))
            return DONE
        arguments = ["--help" if one == "--help-all" else one for one in arguments]
        recipe = _named_recipe(arguments)
        command = functools.partial(command, settings=recipe)
        if name == "plan":
            command = functools.partial(command, training=_for_training(arguments))
        arguments = _keeping_batches(_for_all_stages(arguments, len(recipe.stages)))
    elif name not in NEEDS_NO_RUN:
        command = functools.partial(command, settings=_named_run(name, arguments))
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
        named = {name: _expanded(value) for name, value in kwargs.items()}
        return functools.partial(command, *map(_expanded, args), **named)

    return prepare


def _expanded(value: Any) -> Any:
    """A path with the home folder for `~`, which a shell leaves in `--out=~/x`; else the value."""
    return expanded(value) if isinstance(value, Path) else value


def _named_recipe(arguments: list[str]) -> Recipe:
    """The recipe that arguments begin with: its stages decide which flags there are."""
    if arguments and not arguments[0].startswith("-"):
        own = expanded(arguments[0]) / "recipe.yaml"
        return load_recipe(own if own.is_file() else arguments[0])
    if "-h" in arguments or "--help" in arguments:
        return load_recipe("digits")
    raise ValueError(
        "the recipe comes first: maskdm train RECIPE --out RUN, where RECIPE is "
        f"{', '.join(recipe_names())}, or a YAML file"
    )


def _point_out_other_names(command: str, arguments: list[str]) -> None:
    """Raises ValueError for the names that other tools have for a setting, with the one here."""
    for argument in arguments:
        flag = argument.split("=")[0].replace("_", "-")
        if flag in OTHER_NAMES and not (flag in OF_SAMPLING and command in SAMPLES):
            here = OTHER_NAMES[flag]
            if command in OF_IMAGES:
                here = here.replace("--data.", "--")
            elif command not in SAMPLES and flag in ("--num-inference-steps", "--guidance-scale"):
                here = here.replace("--", "--sampling.")
            raise ValueError(f"unknown flag {argument.split('=')[0]}: use {here}")


def _for_all_stages(arguments: list[str], num_stages: int) -> list[str]:
    """Arguments with each `--stages.all.NAME VALUE ...` written out for every stage."""
    written: list[str] = []
    for flag, *values in _flags(arguments):
        for number in range(num_stages if flag.startswith("--stages.all.") else 1):
            written += [flag.replace("--stages.all.", f"--stages.{number}.", 1), *values]
    return written


def _keeping_batches(arguments: list[str]) -> list[str]:
    """Arguments that also say, of each stage's batch that they give, that a budget leaves it so."""
    flags = [group[0].split("=")[0].replace("_", "-") for group in _flags(arguments)]
    smallest = [flag.replace(".batch-size", ".smallest-batch") for flag in flags
                if flag.startswith("--stages.") and flag.endswith(".batch-size")]  # fmt: skip
    return arguments + [one for flag in smallest if flag not in flags for one in (flag, "None")]


def _for_training(arguments: list[str]) -> tuple[str, ...]:
    """The arguments of `plan` that `train` takes, too."""
    groups = [group for group in _flags(arguments) if group[0].split("=")[0] not in OF_PLAN]
    return tuple(one for group in groups for one in group)


def _flags(arguments: list[str]) -> list[list[str]]:
    """Arguments in groups: what comes before the first flag one by one, then flags with values."""
    groups: list[list[str]] = []
    for one in arguments:
        if one.startswith("--") or not groups or not groups[-1][0].startswith("--"):
            groups.append([])
        groups[-1].append(one)
    return groups


def _named_run(command: str, arguments: list[str]) -> Sampling:
    """How the model that the arguments begin with is sampled, unless flags change it."""
    if arguments and not arguments[0].startswith("-"):
        if command == "evaluate" and not is_model(arguments[0]):
            return Sampling()  # images of any origin
        sampling = find_model(arguments[0], note=lambda text: None).sampling  # it is said later
        return sampling.for_inpainting() if command == "inpaint" else sampling
    if "-h" in arguments or "--help" in arguments:
        return Sampling().for_inpainting() if command == "inpaint" else Sampling()
    raise ValueError(
        f"the model comes first: maskdm {command} RUN ..., where RUN is a run's folder, RUN@STAGE, "
        "a checkpoint, an exported model or a Hub id"
    )


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
    return one_line(error)

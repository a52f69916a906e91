"""What several commands share: arguments, loading a model, which process reports."""

from __future__ import annotations

import contextlib
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from maskdm.families import GUIDANCE
from maskdm.recipe import Guidance, Sampling
from maskdm.words import about, counted

if TYPE_CHECKING:
    from maskdm.runs.load import Loaded

WORTH_SAYING_SEC, LONG_SEC = 10, 300  # of drawing images
MANY_STEPS = 100  # of a solver
DONE, FAILED, WRONG_USAGE, STOPPED = 0, 1, 2, 3  # exit codes
PHOTOS = (32, 64, 128, 256)  # sizes of the photos recipes

# How arguments read in the help. Where None means "as the recipe says", the text says so.
quiet = functools.partial(tyro.conf.arg, help_behavior_hint="")
RecipeName = Annotated[str, tyro.conf.Positional, quiet(metavar="RECIPE")]
Source = Annotated[str, tyro.conf.Positional, quiet(metavar="SOURCE")]
Run = Annotated[str, tyro.conf.Positional, quiet(metavar="RUN")]
OptionalInt = Annotated[int | None, quiet(metavar="INT")]
OptionalFloat = Annotated[float | None, quiet(metavar="FLOAT")]
OptionalClass = Annotated[str | None, quiet(metavar="CLASS")]
JsonFlag = Annotated[bool, quiet(name="json"), tyro.conf.FlagCreatePairsOff]
Amount = Annotated[str | None, quiet(metavar="N|+N")]
SamplingFlags = Annotated[Sampling, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class LengthFlags:
    """How long a run is, for `train` and `plan`."""

    hours: Amount = None
    """How long the run may take on the machine, with previews and measuring."""
    minutes: Amount = None
    """The same in minutes."""
    flops: Amount = None
    """Floating-point operations of all training steps."""
    images: Amount = None
    """Images seen in all stages together."""
    epochs: Amount = None
    """Passes over the training images."""
    shrink: float = 1.0
    """Scales all stages, and warm-ups, averages and intervals with them."""
    control: Literal["none", "dense", "unmasked"] = "none"
    """dense = the recipe's control instead: its last stage's settings alone, without masks;
    unmasked = all of its stages, without masks."""
    control_equal: Literal["flops", "time", "steps"] = "flops"
    """What the control has in common with the recipe."""


NoPrefix = tyro.conf.arg(name="")


def photos_size(side: int) -> int:
    """The size of the largest photos recipe whose images are not enlarged ones of that side."""
    return max([size for size in PHOTOS if size <= side], default=PHOTOS[0])


def say_note(text: str) -> None:
    """Prints a note beside the command's output."""
    print(f"note: {text}", file=sys.stderr)


def load(run: str, sampling: Sampling, ema: float | None = None) -> tuple[Loaded, Loaded | None]:
    """The model that a user names, and the weak one if its guidance needs one.

    Both on this process's device. Raises ValueError where one is not available.
    """
    from diffusers.utils import logging

    from maskdm.engine import process_state
    from maskdm.runs.load import load_model, load_weak

    guidance = sampling.guidance
    if guidance.kind == "none" and guidance != Guidance():
        useless = [name for name, value in guidance if value != getattr(Guidance(), name)]
        say_note(
            f"guidance.{', guidance.'.join(useless)} has no effect while guidance.kind is none"
        )
    logging.disable_progress_bar()
    device = process_state().device
    strong, weak = load_model(run, say_note, width=ema), None
    strong.trained.model.to(device)
    if GUIDANCE[guidance.kind].needs_model:
        weak = load_weak(strong.location, guidance.weak, say_note)
        weak.trained.model.to(device)
    return strong, weak


def say_how_long(
    strong: Loaded,
    settings: Sampling,
    num: int,
    weak: Loaded | None,
    factor: int = 1,
    *,
    is_kept: bool = False,
) -> None:
    """Says how long drawing images takes, where it is more than seconds, and what is faster.

    Args:
        num: images.
        factor: how often each step of the solver is taken.
        is_kept: whether images of before may be there already.
    """
    from maskdm.engine import process_state
    from maskdm.sampling.speed import seconds_of_sampling

    weak_model = weak.trained if weak else None
    seconds = factor * seconds_of_sampling(strong.trained, settings, num, weak_model)
    seconds /= process_state().num_processes
    if not is_main_process() or seconds < WORTH_SAYING_SEC:
        return
    text = f"drawing {counted(num, 'image')} by {sampling_text(settings)}: {about(seconds)} here"
    text += ", less what is drawn already" * is_kept
    if seconds > LONG_SEC:
        fewer = int(float(f"{num * LONG_SEC / seconds:.1g}"))
        steps = settings.steps * factor > MANY_STEPS
        ways = [f"--num {fewer:,}".replace(",", "")] * (fewer >= 4)
        ways += ["--sampler unipc --steps 20"] * (steps and factor == 1)
        text += f"; for a faster look: {' or '.join(ways)}" if ways else ""
    print(text, file=sys.stderr)


def refuse_out(out: Path, run: str) -> None:
    """Raises ValueError where images of a run's model cannot or should not be written to `out`."""
    from maskdm.images.output import refuse_output

    refuse_output(out)
    if out.suffix.lower() != ".npz":  # which is no image among images
        refuse_among_images(run, out)


def refuse_among_images(run: str, path: Path, flag: str = "--out") -> None:
    """Raises ValueError for a place in the image folder that a run was trained on.

    Args:
        run: as the user names it; other models, and runs whose recipe is damaged, say nothing.
        path, flag: as for `refuse_inside`.
    """
    from maskdm.images.open import refuse_inside
    from maskdm.runs.find import find_model
    from maskdm.runs.folder import own_sources

    location = find_model(run, note=lambda text: None)
    sources = list[str]()
    with contextlib.suppress(ValueError):  # a damaged recipe
        sources = own_sources(location.run) if location.run else []
    for source in sources:
        refuse_inside(source, path, flag)


def is_main_process() -> bool:
    """Whether this is the process that reports and writes."""
    from maskdm.engine import process_state

    return process_state().is_main_process


def sampling_text(sampling: Sampling) -> str:
    """How images were drawn, in a few words: `50 steps of ddim, sparse guidance 1.5`."""
    text = f"{sampling.steps} steps of {sampling.sampler}"
    if sampling.guidance.kind == "none":
        return text
    kind = sampling.guidance.kind
    return f"{text}, {kind}{'' if 'guidance' in kind else ' guidance'} {sampling.guidance.scale:g}"

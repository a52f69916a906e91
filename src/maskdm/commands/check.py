"""`maskdm check`."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from maskdm.commands.common import DONE, WRONG_USAGE, Source, changed, quiet
from maskdm.recipe import Recipe
from maskdm.recipe_files import load_recipe

if TYPE_CHECKING:
    import numpy as np

    from maskdm.images.diagnosis import Report

WIDTH = 80
NUM_LISTED = 5  # of names, groups, classes
NUM_ON_SHEET = 36
UNBROKEN = "\u00a0"  # a space at which no line is broken
Crop = Literal["auto", "center", "resize", "celeba", "celeba140", "none"]
Size = Annotated[int | tuple[int, int] | None, quiet(metavar="INT|INT INT")]
Channels = Annotated[Literal[1, 2, 3, 4] | None, quiet(metavar="{1,2,3,4}")]
Crops = "{auto,center,resize,celeba,celeba140,none}"


def check(
    source: Source,
    *,
    recipe: Annotated[str | None, quiet(metavar="RECIPE")] = None,
    size: Size = None,
    channels: Channels = None,
    crop: Annotated[Crop | None, quiet(metavar=Crops)] = None,
    background: Annotated[str | None, quiet(metavar="COLOUR")] = None,
    on_bad: Annotated[
        Literal["auto", "error", "skip"] | None, quiet(metavar="{auto,error,skip}")
    ] = None,
    sheet: Annotated[Path | None, quiet(metavar="PNG")] = None,
    json_output: Annotated[bool, quiet(name="json"), tyro.conf.FlagCreatePairsOff] = False,
) -> int:
    """Look images through before days of training: what is there, what is wrong, what it takes.

    Every image is decoded once; nothing is kept. Exit code 0 = usable, 2 = not.

    Args:
        source: a folder, zip, tar, .npz, .npy, hf:OWNER/NAME, ...: see docs/data.md.
        recipe: whose settings and masks are taken, a packaged name or a file; default: celeba64.
        size: side of the square images, in pixels; or height and width; default: the recipe's.
        channels: 1 = grey, 2 = grey and alpha, 3 = RGB, 4 = RGBA; default: the recipe's.
        crop: how images come to the size (see `maskdm train RECIPE --help`); default: the recipe's.
        background: colour under transparent images; default: the recipe's.
        on_bad: unreadable images: skip, error, or auto = skip up to 1 %; default: the recipe's.
        sheet: draw images as the model would see them, plain and under the recipe's masks.
        json_output: print the whole report as JSON instead of a summary.
    """
    settings = load_recipe(recipe or "celeba64")
    data = changed(
        settings.data,
        source=source,
        size=size,
        channels=channels,
        crop=crop,
        background=background,
        on_bad=on_bad,
    )
    settings = changed(settings, data=data)  # refuses what training would
    if sheet is not None:
        _refuse_sheet(sheet)

    from maskdm.images import store
    from maskdm.images.check import Samples, examine

    if store.is_store(Path(source).expanduser()):
        raise ValueError(f"{source} is a packed store: check the images that it was made from")
    samples = Samples(NUM_ON_SHEET if sheet else 0)
    report = examine(data, sys.stderr.isatty(), samples)
    if sheet is not None and report.num_readable:
        _draw(sheet, samples.images(), settings)
    if json_output:
        print(json.dumps({**dataclasses.asdict(report), "usable": report.usable}))
    else:
        _print(report)
        if sheet is not None and report.num_readable:
            print(f"-> {sheet}")
    return DONE if report.usable else WRONG_USAGE


def _refuse_sheet(path: Path) -> None:
    """Raises ValueError where a sheet could not be written, before hours of looking."""
    if path.suffix != ".png" or path.is_dir():
        raise ValueError(f"--sheet {path}: name a file that ends in .png")
    if path.parent.exists() and not os.access(path.parent, os.W_OK):
        raise ValueError(f"--sheet {path}: {path.parent} cannot be written to")


def _draw(path: Path, images: list[np.ndarray], recipe: Recipe) -> None:
    from maskdm.commands.check_sheet import draw_sheet

    path.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(images, recipe).save(path)


def _print(report: Report) -> None:
    """The report in lines of at most 80 columns (but for long names): facts, then findings."""
    from maskdm.images.diagnosis import counted
    from maskdm.images.problems import printable

    images = counted(report.num_images, "image")
    if report.unreadable:
        images += f", {report.num_readable:,} readable"
    print(f"{printable(report.source)}: {report.kind}, {images}")
    for title, lines in _facts(report).items():
        for i, line in enumerate(lines):
            _print_wrapped(line, f"  {'' if i else title:12}")
    if report.findings:
        print()
    for level, text in report.findings:
        _print_wrapped(f"{text}.", f"{level:9}")
    errors = sum(level == "error" for level, _ in report.findings)
    print(f"\n{'usable' if report.usable else 'not usable: ' + counted(errors, 'error')}")


def _print_wrapped(text: str, start: str) -> None:
    """Prints text after `start`, further lines below its own beginning."""
    wrapper = textwrap.TextWrapper(WIDTH, start, " " * len(start))
    wrapper.break_long_words = wrapper.break_on_hyphens = False  # names stay whole
    print(wrapper.fill(text).replace(UNBROKEN, " "))


def _facts(report: Report) -> dict[str, list[str]]:
    """Lines of the report's first part, by title."""
    from maskdm.images.diagnosis import counted, some
    from maskdm.images.problems import size_text

    height, width, channels = report.shape
    size = f"{width}x{height}" if width == height else f"{width} wide and {height} high"
    ground = f", on {report.background}" if channels in (1, 3) else ""
    facts = {
        "prepared as": [
            f"{size}, {counted(channels, 'channel')}{ground}, crop {report.crop}; "
            f"on-bad {report.on_bad}"
        ],
        "classes": [f"none: {report.no_classes or report.bad_labels}"],
    }
    if report.classes:
        facts["classes"] = [f"{len(report.classes):,}: {_counts(report.classes)}"]
    if report.width and report.height:
        sizes = [f"{w}x{h}{UNBROKEN}({num:,})" for w, h, num in report.sizes]
        facts["sizes"] = [
            f"{name} {least:,}" + (f" to {most:,}, median {median:,}" if most > least else "")
            for name, (least, median, most) in (("width", report.width), ("height", report.height))
        ] + [f"commonest: {', '.join(sizes)}"]
        facts["formats"] = [_counts(report.formats)]
        facts["modes"] = [_counts(report.modes)]
    if report.traits:
        facts["special"] = [_counts(report.traits)]
    if report.unreadable:
        bad = [f"{some([name])}: {why}" for name, why in report.unreadable]
        facts["unreadable"] = _listed(bad, f"{len(bad):,}")
    if report.passed_over:
        facts["passed over"] = [_counts(report.passed_over)]
    for title, groups in (("equal", report.duplicates), ("alike", report.near_duplicates)):
        if groups:
            facts[title] = _listed([some(group, NUM_LISTED) for group in groups], "")
    for title, names in (("enlarged", report.enlarged), ("extreme", report.extreme)):
        if names:
            facts[title] = [f"{len(names):,}: {some(names)}"]
    facts["store"] = [
        f"{size_text(report.store_bytes)}, built in {_time_text(report.build_sec)} on "
        f"{counted(report.num_cores, 'core')}"
    ]
    return facts


def _counts(counts: dict[str, int]) -> str:
    from maskdm.images.problems import printable

    shown = [
        f"{printable(name)}{UNBROKEN}({num:,})"
        for name, num in list(counts.items())[: 2 * NUM_LISTED]
    ]
    return ", ".join(shown) + _more(len(counts) - len(shown))


def _listed(lines: list[str], head: str) -> list[str]:
    more = _more(len(lines) - NUM_LISTED)
    return [head] * bool(head) + lines[:NUM_LISTED] + [more.strip()] * bool(more)


def _more(num: int) -> str:
    return f" and {num:,} more; --json lists all" if num > 0 else ""


def _time_text(sec: float) -> str:
    """`about 3 s`, `about 12 min`, `about 1.5 h`."""
    if sec < 1:
        return "less than 1 s"
    if sec < 100:
        return f"about {sec:.0f} s"
    return f"about {sec / 60:.0f} min" if sec < 6000 else f"about {sec / 3600:.1f} h"

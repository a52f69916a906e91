"""`maskdm check`."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from maskdm.choices import helped
from maskdm.commands.common import (
    DONE,
    PHOTOS,
    WRONG_USAGE,
    JsonFlag,
    Source,
    photos_size,
    quiet,
)
from maskdm.families import CROPS, MODEL_SIZES, CropName
from maskdm.files import expanded, refuse_unwritable
from maskdm.recipe_files import load_recipe
from maskdm.settings import changed
from maskdm.words import NUM_LISTED, about, counted, listed, printable, size_text, wrapped

if TYPE_CHECKING:
    from maskdm.images.diagnosis import Report

WIDTH = 80
NUM_ON_SHEET = 36
UNBROKEN = "\u00a0"  # a space at which no line is broken
CROP_HELP = f"{helped('how images come to the size.', CROPS)} Default: the recipe's."


def check(
    source: Source,
    *,
    recipe: Annotated[str | None, quiet(metavar="RECIPE")] = None,
    size: Annotated[int | tuple[int, int] | None, quiet(metavar="INT|INT INT")] = None,
    channels: Annotated[Literal[1, 2, 3, 4] | None, quiet(metavar="{1,2,3,4}")] = None,
    crop: Annotated[
        CropName | None, quiet(metavar=f"{{{','.join(CROPS)}}}", help=CROP_HELP)
    ] = None,
    background: Annotated[str | None, quiet(metavar="COLOUR")] = None,
    on_bad: Annotated[
        Literal["auto", "error", "skip"] | None, quiet(metavar="{auto,error,skip}")
    ] = None,
    sheet: Annotated[Path | None, quiet(metavar="PNG")] = None,
    json_output: JsonFlag = False,
) -> int:
    """Check images before training: what is there, what is wrong, what it takes.

    Every image is decoded once; nothing is stored. Exit code 0 = usable, 2 = not.

    Args:
        source: a folder, zip, tar, .npz, .npy, hf:OWNER/NAME, ...: see docs/data.md.
        recipe: settings and masks to check for, a packaged recipe or a file; default: photos64.
        size: side of the square images, in pixels; or height and width. Default: the recipe's.
        channels: 1 = grey, 2 = grey and alpha, 3 = RGB, 4 = RGBA. Default: the recipe's.
        crop: how images come to the size.
        background: colour behind transparent images. Default: the recipe's.
        on_bad: unreadable images: skip, error, or auto = skip up to 1 %. Default: the recipe's.
        sheet: draw images as the model would see them, plain and under the recipe's masks.
        json_output: print the whole report as JSON instead of a summary.
    """
    settings = load_recipe(recipe or "photos64")
    how = {"size": size, "channels": channels, "crop": crop, "background": background}
    data = changed(settings.data, source=source, **how, on_bad=on_bad)
    settings = changed(settings, data=data)  # refuses what training would refuse
    if recipe is not None:
        from maskdm.training.work import stage_work

        stage_work(settings)  # masks that the grid cannot have
    if sheet is not None:  # before hours of reading images
        if sheet.suffix.lower() != ".png" or sheet.is_dir():
            raise ValueError(f"--sheet {sheet}: use the name of a file that ends in .png")
        refuse_unwritable(sheet, "--sheet")

    from maskdm.images import store
    from maskdm.images.check import Samples, examine
    from maskdm.images.open import refuse_inside

    if sheet is not None:
        refuse_inside(source, sheet, "--sheet")

    if store.is_store(expanded(source)):
        raise ValueError(f"{source} is a packed store: check the images that it was made from")
    samples = Samples(NUM_ON_SHEET if sheet else 0)
    report = examine(data, sys.stderr.isatty(), samples)
    if json_output:
        print(json.dumps({**dataclasses.asdict(report), "usable": report.usable}))
    else:
        _print(report)
    if sheet is not None and report.num_readable:
        from maskdm.report.sheets import draw_sheet

        sheet.parent.mkdir(parents=True, exist_ok=True)
        draw_sheet(samples.images(), settings).save(sheet)
        if not json_output:
            print(f"-> {sheet}")
    if report.usable and recipe is None and not json_output:
        print("\n".join(recommendation(report, "skip" if on_bad == "skip" else None)))
    return DONE if report.usable else WRONG_USAGE


def recommendation(report: Report, on_bad: str | None = None) -> list[str]:
    """The recipe, budget and command for these images, and how large a model they can teach.

    Args:
        on_bad: what the command must say of unreadable images; None = nothing.
    """
    width, height = report.width, report.height
    assert width is not None and height is not None  # usable: there are images
    size = photos_size(min(width[1], height[1]))
    num, values = report.num_readable, 3 * size**2
    taught = [name for name, row in MODEL_SIZES.items() if row.num_params <= num * values]
    model = taught[-1] if taught else next(iter(MODEL_SIZES))
    needs = {name: math.ceil(row.num_params / values) for name, row in MODEL_SIZES.items()}
    larger = [name for name in MODEL_SIZES if name not in taught]
    flags = shlex.quote(report.source) + (f" --data.on-bad {on_bad}" if on_bad else "")
    lines = [
        f"next    maskdm train photos{size} --data.source {flags} --hours 8",
        f"        (a GPU; on a CPU photos{PHOTOS[0]} and --minutes 20 give a first look)",
    ]
    images = f"{counted(num, 'image')} of {size}x{size}"
    if taught:
        enough = f"{images} can teach up to size {model}"
        enough += f"; {larger[0]} wants {needs[larger[0]]:,} or more" if larger else ""
    else:
        enough = f"{images} are few: even size {model} wants {needs[model]:,} or more"
    return [*lines, *wrapped(enough, "model   ", WIDTH)]


def _print(report: Report) -> None:
    """Prints facts, then findings, in lines of 80 columns (except for longer names)."""
    images = counted(report.num_images, "image")
    if report.unreadable:
        images += f", {report.num_readable:,} readable"
    print(f"{printable(report.source)}: {report.kind}, {images}")
    for title, lines in _facts(report).items():
        for i, line in enumerate(filter(None, lines)):
            _print_wrapped(line, f"  {'' if i else title:12}")
    if report.findings:
        print()
    for level, text in report.findings:
        _print_wrapped(f"{text}.", f"{level:9}")
    errors = sum(level == "error" for level, _ in report.findings)
    print(f"\n{'usable' if report.usable else 'not usable: ' + counted(errors, 'error')}")


def _print_wrapped(text: str, start: str) -> None:
    print("\n".join(wrapped(text, start, WIDTH)).replace(UNBROKEN, " "))


def _facts(report: Report) -> dict[str, list[str]]:
    """Lines of the report's first part, by title; empty ones are not printed."""
    height, width, channels = report.shape
    size = f"{width}x{height}" if width == height else f"{width} wide and {height} high"
    ground = f", on {report.background}" if channels in (1, 3) else ""
    classes = f"none: {report.no_classes or report.label_error}"
    if report.classes:
        classes = f"{len(report.classes):,}: {_counts(report.classes)}"
    sizes = {f"{w}x{h}": num for w, h, num in report.sizes}
    bad = [f"{printable(name)}: {why}" for name, why in report.unreadable]
    return {
        "prepared as": [
            f"{size}, {counted(channels, 'channel')}{ground}, crop {report.crop}; "
            f"on-bad {report.on_bad}"
        ],
        "classes": [classes],
        "sizes": [
            _spread("width", report.width),
            _spread("height", report.height),
            f"commonest: {_counts(sizes)}" if sizes else "",
        ],
        "formats": [_counts(report.formats)],
        "modes": [_counts(report.modes)],
        "special": [_counts(report.traits)],
        "unreadable": [f"{len(bad):,}", *_first_lines(bad)] if bad else [],
        "skipped": [_counts(report.skipped)],
        "equal": _first_lines([listed(group) for group in report.duplicates]),
        "alike": _first_lines([listed(group) for group in report.near_duplicates]),
        "enlarged": [_names(report.enlarged)],
        "extreme": [_names(report.extreme)],
        "store": [
            f"{size_text(report.store_bytes)}, built in {about(report.build_sec)} on "
            f"{counted(report.num_cores, 'core')}"
        ],
    }


def _spread(name: str, lengths: tuple[int, int, int] | None) -> str:
    if lengths is None:
        return ""
    least, median, most = lengths
    return f"{name} {least:,}" + (f" to {most:,}, median {median:,}" if most > least else "")


def _names(names: list[str]) -> str:
    return f"{len(names):,}: {listed(names, 3)}" if names else ""


def _counts(counts: dict[str, int]) -> str:
    shown = [f"{printable(name)}{UNBROKEN}({num:,})" for name, num in counts.items()]
    return ", ".join(shown[: 2 * NUM_LISTED]) + _more(len(shown) - 2 * NUM_LISTED)


def _first_lines(lines: list[str]) -> list[str]:
    return lines[:NUM_LISTED] + [_more(len(lines) - NUM_LISTED).strip()]


def _more(num: int) -> str:
    return f" and {num:,} more; --json lists all" if num > 0 else ""

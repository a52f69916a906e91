"""The doctor's report: facts about a source, and findings that each say what to do."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from maskdm.images.build import missing_room
from maskdm.images.inspection import DARKEST
from maskdm.images.known import KNOWN
from maskdm.images.labels import split_note
from maskdm.images.store import cache_dir
from maskdm.images.unreadable import TOLERATED, most_unreadable
from maskdm.words import counted, listed, printable

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")


class Finding(NamedTuple):
    """What is wrong or worth knowing, and what to do. An `error` makes the source unusable."""

    level: Level
    text: str


_error, _warning, _note = (functools.partial(Finding, level) for level in LEVELS)

Spread = tuple[int, int, int]  # least, median (the lower one of two) and largest


@dataclass(frozen=True)
class Report:
    """What a source holds. JSON-able by `dataclasses.asdict`."""

    source: str  # its name, as in the settings
    kind: str  # folder, zip archive, ...
    shape: tuple[int, int, int]  # height, width and channels of the prepared images
    crop: str  # how images come to that size; `auto` is resolved
    background: str  # colour behind transparent images
    on_bad: str  # what unreadable images do: auto, error or skip
    num_images: int  # all images of the source, unreadable ones included
    num_readable: int  # those that can be decoded and prepared; all that follows is about them
    read_error: str | None  # why the source could not be read to its end
    notes: list[str]  # what else is wrong with the source (with its label files, say)
    classes: dict[str, int]  # numbers of images by name, in the order of the class numbers
    no_classes: str | None  # why there are none
    label_error: str | None  # why labels cannot be class numbers
    width: Spread | None  # of the images, in pixels after rotation by EXIF
    height: Spread | None
    sizes: list[tuple[int, int, int]]  # the commonest: width, height, number of images
    formats: dict[str, int]  # numbers of images by Pillow's name of the format
    modes: dict[str, int]  # and by that of the mode
    traits: dict[str, int]  # numbers of images by special traits: see `inspection.ImageFacts`
    unreadable: list[tuple[str, str]]  # name and reason of each
    skipped: dict[str, int]  # numbers of files that are not images, by suffix
    duplicates: list[list[str]]  # names of images with equal pixels, by group
    near_duplicates: list[list[str]]  # of images that look the same; the first of equal ones
    near_duplicates_all: bool  # False where there are too many images to find them all
    enlarged: list[str]  # names of images smaller than `shape`
    extreme: list[str]  # of images that lose over half to the crop, or are squeezed as much
    store_bytes: int  # size of the packed store
    build_sec: float  # estimate of the time to build it, on `num_cores` cores
    num_cores: int
    findings: tuple[Finding, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether training would accept the source."""
        return all(finding.level != "error" for finding in self.findings)


UNREADABLE_FORMATS = {
    **dict.fromkeys(
        (".heic", ".heif", ".hif"),
        "HEIC: convert them to JPEG or PNG, for example with heif-convert, or pip install "
        "pillow-heif",
    ),
    ".avif": "AVIF: install a newer Pillow, or convert them to PNG",
    ".jxl": "JPEG XL: convert them to PNG, for example with djxl",
    ".svg": "vector graphics: render them to PNG, for example with rsvg-convert, or pip install "
    "resvg-py",
    ".psd": "Photoshop files: export them as PNG",
    **dict.fromkeys(
        ".cr2 .cr3 .nef .arw .dng .raf .orf .rw2".split(),
        "a camera's raw data: develop them to JPEG or PNG",
    ),
    **dict.fromkeys(
        ".mp4 .mov .avi .mkv .webm".split(), "videos: extract frames, for example with ffmpeg"
    ),
}


def findings_of(report: Report) -> tuple[Finding, ...]:
    """What a user should know about a source, errors first."""
    kinds = (_reading, _known_set, _files, _shapes, _contents)
    findings = [finding for find in kinds for finding in find(report)]
    return tuple(sorted(findings, key=lambda finding: LEVELS.index(finding.level)))


def _reading(report: Report) -> Iterator[Finding]:
    num, total = len(report.unreadable), report.num_images
    if report.label_error:
        yield _error(f"{report.label_error}: fix the labels, or remove them")
    if report.read_error:
        yield _error(
            f"the source cannot be read to its end: {report.read_error}; fix it or get it again "
            f"(this report covers the {counted(total, 'image')} before)"
        )
    share = f"{counted(num, 'image')} of {total:,} cannot be read"
    if num == total:
        yield _error(f"none of the {total:,} images can be read: see why above")
    elif num > most_unreadable(total, report.on_bad):
        rule = f"training skips up to {TOLERATED:.0%} by default"
        if report.on_bad == "error":
            rule = "on-bad error allows none"
        yield _error(
            f"{share}, but {rule}: fix or remove them, or skip them with --data.on-bad skip "
            "(here --on-bad skip)"
        )
    elif num:
        yield _warning(f"{share} and will be skipped: fix them if they matter, or remove them")
    if problem := missing_room(report.store_bytes, cache_dir()):
        yield _error(problem)


def _known_set(report: Report) -> Iterator[Finding]:
    known = KNOWN.get(report.source)
    if known is None:
        return
    if report.num_images != known.num_images:
        way_out = f"get the rest from {known.where}"
        if report.num_images > known.num_images:
            way_out = f"remove what does not belong to it; expected {known.layout}"
        yield _warning(
            f"{known.title} has {known.num_images:,} images, but this copy has "
            f"{report.num_images:,}: {way_out}"
        )
    sizes = [f"{width}x{height}" for width, height, _ in report.sizes]
    if others := [size for size in sizes if known.size not in (None, size)]:
        yield _warning(
            f"images of {known.title} have {known.size} pixels, but some here have {others[0]}: "
            f"get the set from {known.where}"
        )
    if report.crop != known.crop:
        yield _note(
            f"papers use crop {known.crop} for {known.title}, but this is crop {report.crop}: "
            "to compare with papers use --data.crop auto (here --crop auto)"
        )


def _files(report: Report) -> Iterator[Finding]:
    for text in report.notes:
        yield _warning(f"{printable(text)}: fix it if this is not intended")
    if splits := split_note(report.classes):
        yield _warning(splits)
    if empty := [name for name, num in report.classes.items() if not num]:
        yield _warning(
            f"{counted(len(empty), 'class has', 'classes have')} no images ({listed(empty, 3)}): "
            "number classes without gaps, and remove empty class folders"
        )
    for suffix, what in UNREADABLE_FORMATS.items():
        if num := report.skipped.get(suffix):
            files = counted(num, f"{suffix} file is", f"{suffix} files are")
            yield _warning(f"{files} skipped, because Pillow cannot read {what}")
    if num := sum(len(group) - 1 for group in report.duplicates):
        yield _warning(
            f"{counted(num, 'image is an exact copy', 'images are exact copies')} of another: "
            "keep one of each, or the model sees it more often than the rest"
        )
    if num := sum(len(group) - 1 for group in report.near_duplicates):
        yield _warning(
            f"{counted(num, 'image looks', 'images look')} almost like another: look at them, and "
            "keep one of each if they are copies"
        )
    if not report.near_duplicates_all:
        yield _note(
            "too many images, or too many that look alike, to find all near duplicates: check "
            "parts of the source separately"
        )


def _shapes(report: Report) -> Iterator[Finding]:
    height, width, _ = report.shape
    if num := len(report.enlarged):
        every = "all " if 1 < num == report.num_readable else ""
        yield _warning(
            f"{every}{counted(num, 'image is', 'images are')} smaller than {width}x{height} and "
            "will be enlarged, which blurs: use a smaller --size (--data.size in training), or "
            "remove the small ones"
        )
    num = len(report.extreme)
    if num and report.crop == "resize":
        yield _warning(
            f"{counted(num, 'image is', 'images are')} squeezed to less than half in one "
            "direction: crop center cuts instead"
        )
    elif num:
        yield _warning(
            f"crop center removes more than half of {counted(num, 'image')}: squeeze them with "
            "crop resize, crop them yourself, or remove them"
        )


def _contents(report: Report) -> Iterator[Finding]:
    channels = report.shape[2]
    if report.no_classes:
        yield _note(
            f"no classes: {report.no_classes}. A conditional model needs all images in class "
            "folders, or a label file (metadata.jsonl, metadata.csv, dataset.json)"
        )
    if num := report.traits.get("transparent"):
        how = f"kept in {channels} channels: --data.channels {channels - 1} removes them"
        if channels in (1, 3):
            how = (
                f"drawn over {report.background}: --data.background sets another colour, "
                f"--data.channels {channels + 1} keeps transparency"
            )
        yield _note(f"{counted(num, 'image has', 'images have')} transparent parts, {how}")
    if num := report.traits.get("wholly transparent"):
        yield _warning(
            f"{counted(num, 'image is', 'images are')} wholly transparent, so nothing but the "
            "background shows: remove them, or save them without alpha"
        )
    deep, dark = report.traits.get("nearly black, of 16 bits", 0), report.traits.get("nearly black")
    for num, way_out in (
        (deep, "do their 16 bits hold 12? Multiply their values by 16, or save them as 8 bits"),
        (dark or 0, "look at them, and remove or brighten them if they are not meant so"),
    ):
        if num:
            images = counted(num, "image is", "images are")
            yield _warning(f"{images} nearly black (no level above {DARKEST} of 255): {way_out}")
    if num := report.traits.get("several frames"):
        files = counted(num, "file has", "files have")
        yield _note(f"{files} several frames, of which the first is used: save others as files")
    if channels > 2 and report.modes and set(report.modes) <= {"1", "L", "I;16", "I;16B"}:
        yield _note("all images are grey: --data.channels 1 makes the store and the model smaller")

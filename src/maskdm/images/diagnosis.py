"""What the doctor says of a source: facts, and findings with a way out in each."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from maskdm.images.known import KNOWN
from maskdm.images.problems import TOLERATED, printable, refuse_bad, size_text
from maskdm.images.store import cache_dir
from maskdm.recipe import Data


class Finding(NamedTuple):
    """One thing to know: what it is, and what to do. An `error` makes the source unusable."""

    level: Literal["error", "warning", "note"]
    text: str


class Spread(NamedTuple):
    """How some lengths in pixels lie."""

    least: int
    median: int
    most: int


class Span(NamedTuple):
    """How often a size occurs, in pixels."""

    width: int
    height: int
    num_images: int


@dataclass(frozen=True)
class Report:
    """What is in a source. JSON-able by `dataclasses.asdict`.

    Attributes:
        source: as the user named it.
        kind: `folder`, `zip archive`, ...
        shape: height, width and channels that were asked for.
        crop: how images come to that size, known sets' own crops resolved.
        background: colour under transparent images.
        on_bad: what unreadable images do: auto, error or skip.
        num_images: all that the source holds, unreadable ones included.
        num_readable: those that can be decoded and prepared; all that follows is told of them.
        broke_off: why the source could not be read to its end, or None.
        notes: what else is wrong with the source (its label files, say).
        classes: number of images by name of the class, in the order of their numbers.
        no_classes: why there are none, or None where there are.
        bad_labels: why labels can't be class numbers, or None.
        width, height: of the images, turned as EXIF says.
        sizes: the commonest ones.
        formats, modes: numbers of images by Pillow's names.
        traits: numbers of images by what is special: see `look.Look`.
        unreadable: name and reason of each.
        passed_over: numbers of files that are no images, by suffix.
        duplicates: names of images whose pixels are equal, by group.
        near_duplicates: names of images that look the same, by group; of equal ones the first.
        near_duplicates_all: False where there are too many images to find them all.
        enlarged: names of those smaller than what is asked for.
        extreme: names of those of which the crop cuts away more than half (or which `resize`
            squeezes to less than half).
        store_bytes: size of the packed store.
        build_sec: estimate of the time to build it, on `num_cores` cores.
    """

    source: str
    kind: str
    shape: tuple[int, int, int]
    crop: str
    background: str
    on_bad: str
    num_images: int
    num_readable: int
    broke_off: str | None
    notes: list[str]
    classes: dict[str, int]
    no_classes: str | None
    bad_labels: str | None
    width: Spread | None
    height: Spread | None
    sizes: list[Span]
    formats: dict[str, int]
    modes: dict[str, int]
    traits: dict[str, int]
    unreadable: list[tuple[str, str]]
    passed_over: dict[str, int]
    duplicates: list[list[str]]
    near_duplicates: list[list[str]]
    near_duplicates_all: bool
    enlarged: list[str]
    extreme: list[str]
    store_bytes: int
    build_sec: float
    num_cores: int
    findings: tuple[Finding, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether training would take the source."""
        return all(finding.level != "error" for finding in self.findings)


UNREADABLE_FORMATS = {
    ".heic": "HEIC: convert them to JPEG or PNG, with heif-convert, say",
    ".heif": "HEIF: convert them to JPEG or PNG, with heif-convert, say",
    ".avif": "AVIF: install a newer Pillow, or convert them to PNG",
    ".jxl": "JPEG XL: convert them to PNG, with djxl, say",
    ".svg": "drawings without pixels: render them to PNG, with rsvg-convert, say",
    ".psd": "Photoshop's own: export them as PNG",
    **dict.fromkeys(
        (".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2"),
        "a camera's raw data: develop them to JPEG or PNG",
    ),
    **dict.fromkeys(
        (".mp4", ".mov", ".avi", ".mkv", ".webm"),
        "films: take single frames out, with ffmpeg, say",
    ),
}


def findings_of(report: Report, data: Data) -> tuple[Finding, ...]:
    """What to know of a source, errors first."""
    found = [
        *_unreadable(report, data),
        *_room(report),
        *_known_set(report),
        *_labels(report),
        *_lost_files(report),
        *_copies(report),
        *_shapes(report),
        *_notes(report),
    ]
    levels = ("error", "warning", "note")
    return tuple(sorted(found, key=lambda finding: levels.index(finding.level)))


def counted(num: int, one: str, more: str | None = None) -> str:
    """`1 image`, `2 images`, `1,234 images`."""
    return f"{num:,} {one if num == 1 else more or one + 's'}"


def _unreadable(report: Report, data: Data) -> Iterator[Finding]:
    num, total = len(report.unreadable), report.num_images
    if report.bad_labels:
        yield Finding("error", f"{report.bad_labels}: mend the labels, or take them away")
    if report.broke_off:
        yield Finding(
            "error",
            f"the source can't be read to its end: {report.broke_off}; mend or fetch it again "
            f"(what is told here is of the {counted(total, 'image')} before)",
        )
    if not num:
        return
    share = f"{counted(num, 'image')} of {total:,} can't be read"
    try:
        refuse_bad(report.source, report.unreadable, total, data.on_bad)
    except ValueError:
        if num == total:
            yield Finding("error", f"none of the {total:,} images can be read: see why above")
            return
        rule = (
            "on-bad error allows none"
            if data.on_bad == "error"
            else f"training leaves out {TOLERATED:.0%} by itself"
        )
        ways_out = "mend or remove them, or leave them out with --data.on-bad skip"
        yield Finding("error", f"{share}, and {rule}: {ways_out} (here --on-bad skip)")
    else:
        yield Finding(
            "warning", f"{share} and will be left out: mend them if they matter, or remove them"
        )


def _room(report: Report) -> Iterator[Finding]:
    folder = cache_dir()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if report.store_bytes > free:
        yield Finding(
            "error",
            f"the store needs {size_text(report.store_bytes)}, but {cache_dir()} has "
            f"{size_text(free)} free: make room, or name another place with the environment "
            "variable MASKDM_CACHE",
        )


def _known_set(report: Report) -> Iterator[Finding]:
    known = KNOWN.get(report.source)
    if known is None:
        return
    if report.num_images < known.num_images:
        yield Finding(
            "warning",
            f"{known.title} has {known.num_images:,} images, and here are "
            f"{report.num_images:,}: get the rest from {known.where}",
        )
    elif report.num_images > known.num_images:
        yield Finding(
            "warning",
            f"{known.title} has {known.num_images:,} images, and here are "
            f"{report.num_images:,}: take out what is not of it; expected is {known.layout}",
        )
    others = [size for size in report.sizes if known.size and size[:2] != known.size]
    if known.size and others:
        width, height = known.size
        yield Finding(
            "warning",
            f"images of {known.title} have {width}x{height} pixels, but some here have "
            f"{others[0].width}x{others[0].height}: get the set from {known.where}",
        )
    if report.crop != known.crop:
        yield Finding(
            "note",
            f"the field cuts {known.title} by crop {known.crop}, and this is crop {report.crop}: "
            "to compare with papers use --data.crop auto (here --crop auto)",
        )


def _labels(report: Report) -> Iterator[Finding]:
    for note in report.notes:
        yield Finding("warning", f"{printable(note)}: mend it if that isn't meant")
    if empty := [name for name, num in report.classes.items() if not num]:
        yield Finding(
            "warning",
            f"{counted(len(empty), 'class has', 'classes have')} no images ({some(empty)}): number "
            "classes without gaps, and take such folders away",
        )


def _lost_files(report: Report) -> Iterator[Finding]:
    for suffix, what in UNREADABLE_FORMATS.items():
        if num := report.passed_over.get(suffix):
            files = counted(num, f"{suffix} file is", f"{suffix} files are")
            yield Finding("warning", f"{files} passed over; Pillow can't read {what}")


def _copies(report: Report) -> Iterator[Finding]:
    if report.duplicates:
        num = sum(len(group) - 1 for group in report.duplicates)
        yield Finding(
            "warning",
            f"{counted(num, 'image is an exact copy', 'images are exact copies')} of another: "
            "keep one of each, or the model sees it more often than the rest",
        )
    if report.near_duplicates:
        num = sum(len(group) - 1 for group in report.near_duplicates)
        yield Finding(
            "warning",
            f"{counted(num, 'image looks', 'images look')} almost like another: look at them, and "
            "keep one of each if they are copies",
        )
    if not report.near_duplicates_all:
        yield Finding(
            "note",
            "there are too many images, or too many that look alike, to find all near duplicates: "
            "check parts of the source by themselves",
        )


def _shapes(report: Report) -> Iterator[Finding]:
    height, width, _ = report.shape
    if num := len(report.enlarged):
        images = counted(num, "image is", "images are")
        images = f"all {images}" if 1 < num == report.num_readable else images
        yield Finding(
            "warning",
            f"{images} smaller than what is asked for and will be enlarged, which blurs: ask for "
            f"less than {width}x{height} with --data.size, or remove the small ones",
        )
    if num := len(report.extreme):
        images = counted(num, "image is", "images are")
        if report.crop == "resize":
            text = f"{images} squeezed to less than half in one direction: crop center cuts instead"
        else:
            text = (
                f"crop center cuts away more than half of {counted(num, 'image')}: crop resize "
                "squeezes instead; or cut them yourself, or remove them"
            )
        yield Finding("warning", text)


def _notes(report: Report) -> Iterator[Finding]:
    channels = report.shape[2]
    if report.no_classes:
        yield Finding(
            "note",
            f"no classes: {report.no_classes}. A conditional model needs a folder for each class "
            "with all images in one, or a label file (metadata.jsonl, dataset.json)",
        )
    if num := report.traits.get("transparent"):
        images = counted(num, "image has", "images have")
        if channels in (1, 3):
            text = (
                f"{images} transparent parts, to be laid on {report.background}: --data.background "
                f"names another colour, --data.channels {channels + 1} keeps transparency"
            )
        else:
            text = f"{images} transparent parts, and {channels} channels keep them: 3 would not"
        yield Finding("note", text)
    if num := report.traits.get("several frames"):
        images = counted(num, "file has", "files have")
        yield Finding(
            "note", f"{images} several frames, and the first is used: for more, save them as files"
        )
    if channels > 2 and report.modes and set(report.modes) <= {"1", "L", "I;16", "I;16B"}:
        yield Finding(
            "note", "all images are grey: --data.channels 1 makes the store and the model smaller"
        )


def some(names: list[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(printable(name) for name in names[:most]) + more


def lengths(values: list[int]) -> Spread | None:
    """Least, median (the lower one) and largest; None of none."""
    ordered = sorted(values)
    if not ordered:
        return None
    return Spread(ordered[0], ordered[(len(ordered) - 1) // 2], ordered[-1])

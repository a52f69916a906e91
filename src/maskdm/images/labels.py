"""Class labels: from folders, from a label file, or given with each image; numbered by name."""

from __future__ import annotations

import codecs
import csv
import io
import os
import posixpath
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np

from maskdm.files import parsed_json
from maskdm.words import counted, listed, printable

Label = str | int | None
Group = tuple[str, Label]  # folder and label: images that share both are of one class
MAX_CLASSES = 1_000_000
LABEL_FILES = {
    "metadata.jsonl": 'lines like {"file_name": "x.png", "label": "cat"}',
    "metadata.csv": "columns file_name and label",
    "dataset.json": '{"labels": [["x.png", 0], ...]}',
}  # what they hold
NUMBER = re.compile(r"0|[1-9]\d{0,17}")  # a text that is a class number, not a name
SPLITS = frozenset("train training test testing val valid validation dev eval".split())
THUMBNAILS = frozenset("thumb thumbs _thumbs thumbnail thumbnails".split())  # names of folders


def number_groups(
    groups: Sequence[Group], of_image: np.ndarray, class_names: list[str] | None
) -> tuple[np.ndarray | None, list[str]]:
    """Turns labels into class numbers, the same on every machine.

    Named classes get numbers in the order of their names; numbers stay as they are. Where no
    image has a label, class folders (root/class/x.png) give them.

    Args:
        groups: folders and labels of images.
        of_image: each image's group, int64 (N,).
        class_names: names of the numbers, where the source has them.

    Returns int64 (N,), or None unless every group has a label, and the names of the numbers.
    Raises ValueError for numbers that cannot be class numbers.
    """
    labels = _labels_of(groups)
    given = [printable(label) for label in labels if isinstance(label, str)]
    numbers = [label for label in labels if isinstance(label, int)]
    if not labels or len(given) + len(numbers) < len(labels):
        return None, []
    if given and numbers:
        raise ValueError(
            f"some labels are numbers ({numbers[0]}) and some are names ({given[0]}): use one kind"
        )
    if given:
        class_names = sorted(set(given))
        number = {name: i for i, name in enumerate(class_names)}
        return np.array([number[name] for name in given], np.int64)[of_image], class_names
    least, most = min(numbers), max(numbers)
    if least < 0 or most >= MAX_CLASSES:
        raise ValueError(
            f"labels range from {least} to {most}, but class numbers are 0, 1, 2 and so on, below "
            f"{MAX_CLASSES:,}"
        )
    if class_names is None:
        class_names = [str(i) for i in range(most + 1)]
    if most >= len(class_names):
        raise ValueError(f"label {most} is not one of {len(class_names)} classes")
    return np.array(numbers, np.int64)[of_image], class_names


def labels_of(
    names: Sequence[str], files: Collection[str], read: Callable[[str], bytes]
) -> tuple[list[Label], list[str], list[str]]:
    """Each image's label: from a label file where there is one, else from its class folder.

    Also says what is wrong with the label files among all `files`, in sentences, and which of them
    are ignored; `read` gives the content of a file. Raises ValueError for a label file of another
    form, and for an image with two labels.
    """
    label_files = sorted(name for name in files if is_label_file(name))
    by_name, ignored = listed_labels(label_files, read)
    label_files = [file for file in label_files if file not in ignored]
    remarks = [f"{file} is ignored: {why}" for file, why in ignored.items()]
    if not any(label is not None for label in by_name.values()):
        notes = [f"{file} has no labels, so class folders are used" for file in label_files]
        labels = folder_labels(names)
        return ([None] * len(names) if None in labels else labels), notes, remarks
    which, images = ", ".join(label_files), {*names, *map(_canonical, names)}
    alike = {_canonical(name): label for name, label in by_name.items()}
    labels = [by_name[name] if name in by_name else alike.get(_canonical(name)) for name in names]
    notes = []
    if without := [name for name, label in zip(names, labels, strict=True) if label is None]:
        notes.append(
            f"{which} labels {len(names) - len(without):,} of {len(names):,} images, not "
            f"{without[0]}, so there are no classes"
        )
    if absent := [name for name in by_name if not {name, _canonical(name)} & images]:
        notes.append(f"{which} names {counted(len(absent), 'missing image')}, such as {absent[0]}")
    return labels, notes, remarks


def _canonical(name: str) -> str:
    """A name of an image as Linux and Windows write it: macOS takes accents apart."""
    return unicodedata.normalize("NFC", posixpath.normpath(name.replace("\\", "/")))


def folders_above(names: Iterable[str]) -> set[str]:
    """All folders in which files lie, at any depth."""
    folders, found = {posixpath.dirname(name) for name in names}, set[str]()
    while folders:
        found |= folders
        folders = {posixpath.dirname(folder) for folder in folders} - found
    return found


def split_note(class_names: Iterable[str]) -> str | None:
    """What is wrong with classes that are the parts of a data set, in a sentence."""
    names = list(class_names)
    if len(names) < 2 or not {name.lower() for name in names} <= SPLITS:
        return None
    return (
        f"the classes {listed(names)} look like the splits of a data set: to train on one of them, "
        "with the classes below it, use its folder as the source"
    )


def folder_notes(
    names: Sequence[str], folders: Collection[str], bare: Collection[str]
) -> list[str]:
    """What is odd about folders that may be classes, in sentences.

    Args:
        names: of the images.
        folders: names of all folders.
        bare: of those without any file.
    """
    notes, below = list[str](), {posixpath.dirname(name) for name in names}
    paths = [tuple(folder.split("/")) if folder else () for folder in below]
    common = os.path.commonprefix(paths)
    has_classes = all(len(path) > len(common) for path in paths)
    empty = list[str]()
    for folder in sorted({*folders} - folders_above(names)):
        above = tuple(folder.split("/")[:-1])
        is_class = above == common and has_classes
        if is_class or (folder in bare and above == common[: len(above)] != common):
            empty.append(folder)
    if empty:
        have = counted(len(empty), "folder has", "folders have")
        notes.append(f"{have} no images, so no class ({listed(empty, 3)})")
    small = {folder for folder in below if THUMBNAILS & {*folder.lower().split("/")}}
    if small and small != below:
        num = sum(posixpath.dirname(name) in small for name in names)
        where = listed(sorted(small), 3)
        notes.append(f"{num:,} of {len(names):,} images lie in folders of thumbnails ({where})")
    return notes


def are_partly_labelled(groups: Sequence[Group]) -> bool:
    """Whether some images have a class and others have none, so that none counts."""
    return len({label is None for label in _labels_of(groups)}) > 1


def _labels_of(groups: Sequence[Group]) -> list[Label]:
    """The labels of groups: their own, or where no group has one, their class folders."""
    labels = [label for _, label in groups]
    if all(label is None for label in labels):
        labels = folder_labels([f"{folder}/x" if folder else "x" for folder, _ in groups])
    return labels


def notes_key(notes: list[str]) -> bytes:
    """The notes as part of a fingerprint: in their first wording, by which stores are found."""
    text = repr(notes).replace(
        "has no labels, so class folders are used", "tells no labels, so class folders count"
    )
    text = re.sub(r"names ([\d,]+) missing images?,", r"names \1 that are no images here,", text)
    return text.encode("utf-8", "surrogatepass")


def is_label_file(name: str) -> bool:
    """Whether a file, by its name, holds labels."""
    return posixpath.basename(name).lower() in LABEL_FILES


def folder_labels(names: Sequence[str]) -> list[Label]:
    """The folder of each image, as its class; None for images that lie in none.

    Folders that all images share (an archive's top folder, say) are not classes.
    """
    folders = [name.split("/")[:-1] for name in names]
    depth = len(os.path.commonprefix(folders))
    return [folder[depth] if len(folder) > depth else None for folder in folders]


def listed_labels(
    files: Sequence[str], read: Callable[[str], bytes]
) -> tuple[dict[str, Label], dict[str, str]]:
    """Labels by image name from label files, whose content `read` gives.

    `metadata.jsonl` and `metadata.csv` are those of Hugging Face's image folders, their names
    relative to the file's folder; `dataset.json` is that of NVIDIA's trainers.

    Also returns the files that are ignored, with the reason: those that other programs wrote, and
    a `metadata.csv` beside a `metadata.jsonl`. Raises ValueError for another form, and for an
    image with two labels.
    """
    labels, ignored = dict[str, Label](), dict[str, str]()
    for file in files:
        kind = posixpath.basename(file).lower()
        if kind == "metadata.csv" and f"{file[:-3]}jsonl" in files:
            ignored[file] = "metadata.jsonl beside it is used"
            continue
        try:
            own = _labels_in(text_of(read(file)), kind)
        except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else error
            if kind != "metadata.csv":
                raise ValueError(
                    f"{file}: {what}; expected {LABEL_FILES[kind]}. Fix it, or rename it if it "
                    "is another program's"
                ) from None
            ignored[file] = str(what)
            continue
        if own is None:
            ignored[file] = f"it does not have {LABEL_FILES[kind]}"
        for name, label in (own or {}).items():
            name = posixpath.normpath(posixpath.join(posixpath.dirname(file), name))
            if _differ(labels.get(name), label):
                raise ValueError(
                    f"{file}: the label of {name} is {label}, but {labels[name]} in another label "
                    "file: remove one of them"
                )
            labels[name] = labels.get(name) if label is None else label
    return labels, ignored


def _labels_in(text: str, kind: str) -> dict[str, Label] | None:
    """The labels in a label file of a kind, by image; None for another program's file.

    Raises exceptions of several kinds for another form, ValueError for an image with two labels.
    """
    if (pairs := _FORMS[kind](text)) is None:
        return None
    labels: dict[str, Label] = {}
    for name, label in pairs:
        if not isinstance(name, str):
            raise ValueError("an image has no name")
        if isinstance(label, bool) or not isinstance(label, str | int | None):
            raise ValueError(f"the label of {name} is neither a name nor a number")
        if _differ(known := labels.get(name), label):
            raise ValueError(f"{name} has two labels, {known} and {label}")
        labels[name] = known if label is None else label
    return labels


def _differ(one: Label, other: Label) -> bool:
    return None not in (one, other) and one != other


def text_of(content: bytes) -> str:
    """A text file's text: UTF-8, or as its byte order mark says."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    return content.decode("utf-8-sig")


def number_or_name(text: str) -> Label:
    """A label from a text: digits are a number, but 01 is a name."""
    return int(text) if NUMBER.fullmatch(text) else text


Pairs = list[tuple[str, Label]]  # names of images and their labels


def _jsonl_pairs(text: str) -> Pairs | None:
    lines = re.split(r"[\r\n]+", text)  # not `splitlines`: U+2028 may stand in a text
    records = [parsed_json(line) for line in lines if line.strip()]
    return [(record["file_name"], record.get("label")) for record in records]


def _csv_pairs(text: str) -> Pairs | None:
    header = text.partition("\n")[0]
    rows = csv.DictReader(io.StringIO(text), delimiter=max(",;\t", key=header.count))
    if not {"file_name", "label"} <= {*(rows.fieldnames or ())}:
        return None
    pairs = [(row["file_name"], row["label"]) for row in rows]
    has_numbers = all(NUMBER.fullmatch(label) for _, label in pairs if label)
    return [(n, int(label) if label and has_numbers else label or None) for n, label in pairs]


def _dataset_pairs(text: str) -> Pairs | None:
    record = parsed_json(text)
    if isinstance(record, dict) and not isinstance(record.get("labels", {}), list | None):
        return None
    return [(name, label) for name, label in record["labels"] or []]


_FORMS: dict[str, Callable[[str], Pairs | None]] = {
    "metadata.jsonl": _jsonl_pairs,
    "metadata.csv": _csv_pairs,
    "dataset.json": _dataset_pairs,
}  # each gives None for a file of another program

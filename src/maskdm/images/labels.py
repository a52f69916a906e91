"""Class labels: from folders, from a label file, or given with each image; numbered by name."""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Callable, Collection, Sequence

import numpy as np

from maskdm.words import counted

Label = str | int | None
Group = tuple[str, Label]  # folder and label: images that share both are of one class
MAX_CLASSES = 1_000_000
LABEL_FILES = {
    "metadata.jsonl": 'lines like {"file_name": "x.png", "label": "cat"}',
    "dataset.json": '{"labels": [["x.png", 0], ...]}',
}  # what they hold


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
    given = [label for label in labels if isinstance(label, str)]
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
    names: Sequence[str], files: Collection[str], read: Callable[[str], str]
) -> tuple[list[Label], list[str]]:
    """Each image's label: from a label file where there is one, else from its class folder.

    Also says what is wrong with the label files among all `files`, in sentences; `read` gives the
    text of a file. Raises ValueError for a label file of another form.
    """
    label_files = sorted(name for name in files if is_label_file(name))
    by_name = listed_labels(label_files, read)
    if not any(label is not None for label in by_name.values()):
        notes = [f"{file} has no labels, so class folders are used" for file in label_files]
        labels = folder_labels(names)
        return ([None] * len(names) if None in labels else labels), notes
    labels, which, images = [by_name.get(name) for name in names], ", ".join(label_files), {*names}
    notes = []
    if without := [name for name, label in zip(names, labels, strict=True) if label is None]:
        notes.append(
            f"{which} labels {len(names) - len(without):,} of {len(names):,} images, not "
            f"{without[0]}, so there are no classes"
        )
    if absent := [name for name in by_name if name not in images]:
        notes.append(f"{which} names {counted(len(absent), 'missing image')}, such as {absent[0]}")
    return labels, notes


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
    return posixpath.basename(name) in LABEL_FILES


def folder_labels(names: Sequence[str]) -> list[Label]:
    """The folder of each image, as its class; None for images that lie in none.

    Folders that all images share (an archive's top folder, say) are not classes.
    """
    folders = [name.split("/")[:-1] for name in names]
    depth = len(os.path.commonprefix(folders))
    return [folder[depth] if len(folder) > depth else None for folder in folders]


def listed_labels(files: Sequence[str], read: Callable[[str], str]) -> dict[str, Label]:
    """Labels by image name from label files, whose text `read` gives.

    `metadata.jsonl` is that of Hugging Face's image folders, its names relative to the file's
    folder; `dataset.json` that of NVIDIA's trainers. Raises ValueError for another form.
    """
    labels: dict[str, Label] = {}
    for file in files:
        folder, kind = posixpath.split(file)
        try:
            text = read(file)
            if kind == "dataset.json":
                pairs = json.loads(text)["labels"] or []
            else:
                records = [json.loads(line) for line in text.splitlines() if line.strip()]
                pairs = [(record["file_name"], record.get("label")) for record in records]
            for name, label in pairs:
                if isinstance(label, bool) or not isinstance(label, str | int | None):
                    raise ValueError(f"the label of {name} is neither a name nor a number")
                labels[posixpath.normpath(posixpath.join(folder, name))] = label
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{file}: {what}; expected {LABEL_FILES[kind]}") from None
    return labels

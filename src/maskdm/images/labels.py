"""Class labels: from folders, from a label file, or given with each image; numbered by name."""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Callable, Sequence

import numpy as np

Label = str | int | None
MAX_CLASSES = 1_000_000
METADATA, DATASET = "metadata.jsonl", "dataset.json"


def number_labels(
    names: Sequence[str], labels: Sequence[Label], class_names: list[str] | None = None
) -> tuple[np.ndarray | None, list[str]]:
    """Turns labels into class numbers, the same on every machine.

    Classes that are named get numbers in the order of their names; numbers stay as they are.
    Where no image has a label, class folders (root/class/x.png) give them.

    Args:
        names: paths of the images in their source, with "/" between their parts.
        labels: one for each image, None where it has none.
        class_names: names of the numbers, where the source knows them.

    Returns:
        int64 (N,), or None unless every image has a label; names of the numbers.

    Raises:
        ValueError: numbers that can't be class numbers.
    """
    if all(label is None for label in labels):
        labels = folder_labels(names)
    if not labels or any(label is None for label in labels):
        return None, []
    given = [label for label in labels if isinstance(label, int)]
    if given and len(given) < len(labels):
        name = next(label for label in labels if isinstance(label, str))
        raise ValueError(f"some labels are numbers ({given[0]}) and some names ({name}): use one")
    if given:
        if min(given) < 0 or max(given) >= MAX_CLASSES:
            raise ValueError(
                f"labels go from {min(given)} to {max(given)}: classes have numbers 0, 1, 2 "
                f"and so on, below {MAX_CLASSES:,}"
            )
        numbers = np.array(given, dtype=np.int64)
        if class_names is None:
            class_names = [str(i) for i in range(int(numbers.max()) + 1)]
        if numbers.max() >= len(class_names):
            raise ValueError(f"label {numbers.max()} is none of the {len(class_names)} classes")
        return numbers, class_names
    class_names = sorted({str(label) for label in labels})
    number = {name: i for i, name in enumerate(class_names)}
    return np.array([number[str(label)] for label in labels], dtype=np.int64), class_names


def labels_of(
    names: Sequence[str], files: Sequence[str], read: Callable[[str], str]
) -> tuple[list[Label], list[str]]:
    """Each image's label: that of a label file where there is one, else its class folder.

    Args:
        names: of the images.
        files: all files of the source.
        read: gives the text of one.

    Returns:
        Labels of the images, and what is wrong with the label files, in sentences.

    Raises:
        ValueError: a label file that is not of its form.
    """
    label_files = sorted(name for name in files if is_label_file(name))
    listed = listed_labels(label_files, read)
    if not any(label is not None for label in listed.values()):
        notes = [f"{file} tells no labels, so class folders count" for file in label_files]
        return folder_labels(names), notes
    labels, which, known = [listed.get(name) for name in names], ", ".join(label_files), set(names)
    notes = []
    if without := [name for name, label in zip(names, labels, strict=True) if label is None]:
        notes.append(
            f"{which} labels {len(names) - len(without):,} of {len(names):,} images, not "
            f"{without[0]}, so there are no classes"
        )
    if absent := [name for name in listed if name not in known]:
        notes.append(f"{which} names {len(absent):,} that are no images here, such as {absent[0]}")
    return labels, notes


def is_label_file(name: str) -> bool:
    """Whether a file, by its name, tells labels."""
    return posixpath.basename(name) in (METADATA, DATASET)


def folder_labels(names: Sequence[str]) -> list[Label]:
    """The folder that each image lies in, as its class; all None unless every image lies in one.

    Folders that all images share are no classes (an archive's top folder, say).
    """
    folders = [name.split("/")[:-1] for name in names]
    depth = len(os.path.commonprefix(folders))
    if any(len(folder) <= depth for folder in folders):
        return [None] * len(names)
    return [folder[depth] for folder in folders]


def listed_labels(files: Sequence[str], read: Callable[[str], str]) -> dict[str, Label]:
    """Labels by image name from label files.

    `metadata.jsonl` (of Hugging Face's image folders): {"file_name": ..., "label": ...} a line,
    names relative to the file's folder. `dataset.json` (of NVIDIA's trainers):
    {"labels": [[name, number], ...]}.

    Args:
        files: names of the label files.
        read: gives the text of one.

    Raises:
        ValueError: a label file that is not of its form.
    """
    labels: dict[str, Label] = {}
    for file in files:
        is_metadata = posixpath.basename(file) == METADATA
        try:
            pairs = _metadata(read(file)) if is_metadata else _dataset(read(file))
            for name, label in pairs:
                if isinstance(label, bool) or not isinstance(label, str | int | None):
                    raise ValueError(f"the label of {name} is neither a name nor a number")
                path = posixpath.normpath(posixpath.join(posixpath.dirname(file), name))
                labels[path] = label
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            form = (
                'lines like {"file_name": "x.png", "label": "cat"}'
                if is_metadata
                else '{"labels": [["x.png", 0], ...]}'
            )
            text = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{file}: {text}; expected {form}") from None
    return labels


def _metadata(text: str) -> list[tuple[str, Label]]:
    records = [json.loads(line) for line in text.splitlines() if line.strip()]
    return [(record["file_name"], record.get("label")) for record in records]


def _dataset(text: str) -> list[tuple[str, Label]]:
    pairs = json.loads(text)["labels"] or []
    return [(name, label) for name, label in pairs]

"""A model's classes by their names, in the order of their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unicodedata import normalize

import numpy as np
from torch import Tensor, int64, tensor

from maskdm.words import listed, suggestion


def refuse_class_names(class_names: Sequence[str] | None, num_classes: int) -> None:
    """Raises ValueError where names are known, but not one for each class."""
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(
            f"class_names are {len(class_names)} ({listed(class_names)}), but num_classes is "
            f"{num_classes}: give one name for each class, in the order of their numbers, or None"
        )


def class_number(config: Any, name: str) -> int:
    """The number of a class by its name, or by its number as text.

    A name wins: among classes called 1, 10 and 2, "10" is the second. Numbers are not checked.

    Args:
        config: the model's.

    Raises:
        ValueError: the model has no classes, or none of that name; lists the known ones.
    """
    names = config.class_names or []
    if name in names:
        return int(names.index(name))
    composed = [normalize("NFC", one) for one in names]  # macOS takes accents apart
    if normalize("NFC", name) in composed:
        return composed.index(normalize("NFC", name))
    if name.removeprefix("-").isdecimal():
        return int(name)
    if not config.num_classes:
        raise ValueError("this model has no classes: it takes no labels")
    if not names:
        raise ValueError(
            f"no class {name!r}: this model's classes have no names, only numbers from 0 to "
            f"{config.num_classes - 1}"
        )
    raise ValueError(f"no class {name!r}: {suggestion(name, names)}")


def class_numbers(
    config: Any, given: str | int | Sequence[str | int] | Tensor, num_images: int
) -> Tensor:
    """Classes by name or number, one for all images or one for each: int64 (num_images,).

    Text is a name first (`class_number`), numbers are numbers, whatever the classes are called.

    Raises ValueError for an unknown name, or another number of classes.
    """
    is_one = isinstance(given, str) or np.ndim(given) == 0
    each: list[Any] = [given] * num_images if is_one else [*given]  # type: ignore[misc]
    if len(each) != num_images:
        raise ValueError(f"{len(each)} classes for {num_images} images: give one for each")
    numbers = [class_number(config, one) if isinstance(one, str) else int(one) for one in each]
    return tensor(numbers, dtype=int64)


def class_text(config: Any, number: int) -> str:
    """A class for people: `cat (number 0)`, or the number alone where it has no name."""
    names = config.class_names or []
    return f"{names[number]} (number {number})" if 0 <= number < len(names) else str(number)

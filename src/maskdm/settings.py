"""Frozen groups of settings whose mistakes are reported in one plain line."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from maskdm.words import suggestion

SettingsT = TypeVar("SettingsT", bound="Settings")

_unchecked = contextvars.ContextVar("unchecked", default=False)


class SettingsError(ValueError):
    """What is wrong with settings, in one line: where, which rule, which value, the way out.

    Attributes:
        mistakes: (dotted name of the setting, message) pairs.
    """

    def __init__(self, mistakes: list[tuple[str, str]]):
        self.mistakes = mistakes
        super().__init__(
            "; ".join(f"{where}: {what}" if where else what for where, what in mistakes)
        )


class Settings(BaseModel):
    """A frozen group of settings that refuses unknown names and out-of-range values."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        for field in cls.model_fields.values():  # help texts: the terminal breaks their lines
            field.description = " ".join((field.description or "").split()) or None

    if not TYPE_CHECKING:  # type checkers keep the field names of the constructor

        def __init__(self, **values: Any):
            """Raises SettingsError, a ValueError."""
            if _unchecked.get():
                self.__setstate__(type(self).model_construct(**values).__getstate__())
                return
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise SettingsError(_mistakes(error, list(type(self).model_fields))) from None

    def checked(self: SettingsT) -> SettingsT:
        """Itself, built again with all checks. Raises SettingsError."""
        return type(self)(**self.model_dump())


def changed(settings: SettingsT, **changes: object) -> SettingsT:
    """A group of settings with those changes that are given (are not None), checked again."""
    given = {name: value for name, value in changes.items() if value is not None}
    return type(settings)(**{**settings.model_dump(), **given})


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Lets groups of settings be built unchecked, to be checked as a whole later.

    The command line is parsed so: only the whole knows each setting's full name.
    """
    token = _unchecked.set(True)
    try:
        yield
    finally:
        _unchecked.reset(token)


def _mistakes(error: ValidationError, known: list[str]) -> list[tuple[str, str]]:
    """Plain words for pydantic's errors in a group of settings with the `known` names."""
    mistakes = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"])
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, SettingsError):  # a group within this one
            mistakes += [
                (f"{where}.{name}" if name else where, what) for name, what in inner.mistakes
            ]
        elif item["type"] == "extra_forbidden":
            mistakes.append((where, f"unknown setting: {suggestion(where, known)}"))
        elif item["type"] == "missing":
            mistakes.append((where, "a value is needed"))
        elif item["type"] == "value_error":
            mistakes.append((where, str(inner)))
        else:
            rule = item["msg"][0].lower() + item["msg"][1:]
            value = item["input"]
            seen = "" if isinstance(value, (dict, list, tuple)) else f", not {value!r}"
            mistakes.append((where, rule + seen))
    # Where all items of a list are wrong, pydantic also calls the list too short.
    names = [where for where, _ in mistakes]
    return [m for m in mistakes if not any(name.startswith(f"{m[0]}.") for name in names)]

"""What all families of choices share: rows that settings name, functions imported when called."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import AfterValidator, Field
from tyro.constructors import PrimitiveConstructorSpec

from maskdm.words import suggestion

T = TypeVar("T")


class Later(Generic[T]):
    """A function or class by its place, imported when it is first called.

    Args:
        place: `module:name`, the module below `maskdm`.
    """

    def __init__(self, place: str):
        self.place = place

    @functools.cached_property
    def target(self) -> Callable[..., T]:
        """The function itself."""
        module, name = self.place.split(":")
        found: Callable[..., T] = getattr(importlib.import_module(f"maskdm.{module}"), name)
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> T:
        return self.target(*args, **kwargs)


def functions_of(module: str) -> Callable[[str], Later[Any]]:
    """The functions of a module, by name."""
    return lambda name: Later(f"{module}:{name}")


def named(name: str, table: Mapping[str, T], family: str) -> T:
    """The member of a family with that name; raises ValueError with the known names for others."""
    if name not in table:
        raise ValueError(f"unknown {family} {name!r}: {suggestion(name, table)}")
    return table[name]


def helped(what: str, table: Mapping[str, Any]) -> str:
    """The help text of a setting: what it chooses, and what each member is."""
    return f"{what} {'; '.join(f'{name}: {row.help}' for name, row in table.items())}."


def choice(default: str, table: Mapping[str, Any], what: str) -> Any:
    """A setting that names a member of a family, with a help text made of the members'."""
    return Field(default, description=helped(what, table))


def known(table: Mapping[str, Any], family: str) -> AfterValidator:
    """Refuses, in settings, names that the table does not hold at that time."""

    def check(name: str) -> str:
        named(name, table, family)
        return name

    return AfterValidator(check)


def shown(table: Mapping[str, Any]) -> PrimitiveConstructorSpec[str]:
    """Shows the names in the help of the command line; what is unknown is refused by `known`."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(table)}}}",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda name: [name],
    )


@dataclass(frozen=True)
class Choice:
    """A member of whose function nothing needs to be known beforehand.

    Attributes:
        help: what it is, for `--help`.
        run: the function; families differ in its arguments. None where there is nothing to do.
    """

    help: str
    run: Callable[..., Any] | None = None

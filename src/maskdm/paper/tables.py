"""The paper's tables, read from `tables.yaml`: its experiments, their recipes and figures."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml


@dataclass(frozen=True)
class Experiment:
    """A table or figure of the paper.

    Attributes:
        title: its number and what it is about.
        recipes: names of the packaged recipes of its rows or curves, in its order.
    """

    title: str
    recipes: tuple[str, ...]


@functools.cache
def paper_tables() -> dict[str, Any]:
    """The whole file."""
    file = resources.files("maskdm") / "paper" / "tables.yaml"
    content: dict[str, Any] = yaml.safe_load(file.read_text("utf-8"))
    return content


def experiments() -> dict[str, Experiment]:
    """The paper's tables and figures by short names, `table1a`, `fig4b`."""
    return {
        name: Experiment(one["title"], tuple(one["recipes"]))
        for name, one in paper_tables()["experiments"].items()
    }


def paper_fid(recipe: str) -> float | None:
    """The FID that the paper prints for a recipe; None where it prints none."""
    fid: float | None = paper_tables()["fid"].get(recipe)
    return fid

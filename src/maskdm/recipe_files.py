"""Recipes as files: the packaged ones by name, any by path; how two of them differ."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from maskdm.recipe import Recipe, Sampling


def recipe_names() -> list[str]:
    """Names of the packaged recipes, sorted."""
    folder = resources.files("maskdm") / "recipes"
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def recipe_text(name_or_path: str | Path) -> str:
    """YAML text of a packaged recipe (by name) or of a file (by path), as it was written.

    Raises ValueError where neither exists; the message lists the packaged names.
    """
    if str(name_or_path) in recipe_names():
        return (resources.files("maskdm") / "recipes" / f"{name_or_path}.yaml").read_text("utf-8")
    path = Path(name_or_path)
    if path.is_file():
        try:
            return path.read_text("utf-8")
        except UnicodeDecodeError:
            raise ValueError(
                f"recipe {path} is not a YAML file of settings: it is no text"
            ) from None
    near = difflib.get_close_matches(str(name_or_path), recipe_names(), n=1)
    hint = f" did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"no recipe {str(name_or_path)!r}:{hint} packaged recipes are "
        f"{', '.join(recipe_names())}; anything else must be a YAML file"
    )


class _StrictLoader(yaml.SafeLoader):
    """YAML whose mappings have text for keys, each once: of two equal ones the last would win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            problem = "is no name" if not isinstance(key, str) else "stands twice"
            if not isinstance(key, str) or key in keys[:i]:
                mark = node.value[i][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} {problem}", mark)
        return super().construct_mapping(node, deep)


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Loads a packaged recipe by name, or any by the path of its YAML file.

    Raises ValueError, one line, for an unknown name, broken YAML or a wrong setting.
    """
    content = recipe_text(name_or_path)
    try:
        values = yaml.load(content, _StrictLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none, say
        text = " ".join(str(error).split())
        raise ValueError(f"recipe {name_or_path} is not a YAML file of settings: {text}") from None
    if not isinstance(values, dict):
        raise ValueError(f"recipe {name_or_path} is not a mapping of settings")
    try:
        return Recipe(**values)
    except ValueError as error:
        raise ValueError(f"recipe {name_or_path}: {error}") from None


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Lists the settings in which two recipes differ, as `name: old -> new` lines.

    Those of how fast samples are drawn don't count.
    """
    left_out = {"sampling": set(Sampling.HOW_FAST)}
    before, now = (one.model_dump(mode="json", exclude=left_out) for one in (old, new))
    return _differences(before, now, "")


def _differences(old: Any, new: Any, name: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        dot = f"{name}." if name else ""
        keys = [*old, *(key for key in new if key not in old)]
        return [
            line for key in keys for line in _differences(old.get(key), new.get(key), dot + key)
        ]
    if name == "stages":
        lines = [] if len(old) == len(new) else [f"stages: {len(old)} -> {len(new)} of them"]
        for i, (one, other) in enumerate(zip(old, new, strict=False)):
            lines += _differences(one, other, f"stages.{i}")
        return lines
    return [] if old == new else [f"{name}: {old} -> {new}"]

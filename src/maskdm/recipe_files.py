"""Recipes as files: the packaged ones by name, any by path; how two of them differ."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from maskdm.files import expanded
from maskdm.recipe import Recipe, Sampling
from maskdm.words import one_line, suggestion


def recipe_names() -> list[str]:
    """Names of the packaged recipes, sorted."""
    return sorted(_packaged())


@functools.cache
def _packaged() -> dict[str, str]:
    """YAML text of each packaged recipe, by its name.

    A file may hold several: `rows`, by the ends of their names, on top of what they share and of a
    common `base`.
    """
    texts: dict[str, str] = {}
    for entry in (resources.files("maskdm") / "recipes").iterdir():
        name, text = entry.name.removesuffix(".yaml"), entry.read_text("utf-8")
        if entry.name.endswith(".yaml") and "\nrows:\n" in text:
            texts |= {f"{name}-{row}": one for row, one in _rows(text)}
        elif entry.name.endswith(".yaml"):
            texts[name] = text
    return texts


def _rows(text: str) -> Iterator[tuple[str, str]]:
    """The recipes of a file of several: the end of the name, and the YAML text of each."""
    content = yaml.load(text, _StrictLoader)
    comment = [line for line in text.splitlines() if line.startswith("#")]
    for row, changes in content["rows"].items():
        about = changes.pop("about")
        settings = {"base": content["base"], **merged(content.get("shared", {}), changes)}
        dumped = yaml.dump(settings, Dumper=_Plain, sort_keys=False, width=100)
        yield row, "\n".join([f"# {about}.", "#", *comment, dumped])


def recipe_text(name_or_path: str | Path) -> str:
    """YAML text of a packaged recipe (by name) or of a file (by path), unchanged.

    Raises ValueError where neither exists; the message lists the packaged names.
    """
    if str(name_or_path) in _packaged():
        return _packaged()[str(name_or_path)]
    path = expanded(name_or_path)
    if path.is_file():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"recipe {path} is not a YAML file of settings: not text") from None
        # A part of a run's recipe is often a valid recipe, with other settings.
        if not text.endswith("\n") and (path.parent / "environment.json").is_file():
            raise ValueError(
                f"recipe {path} is cut off in its last line: restore it, or end the line if it is "
                "whole"
            )
        return text
    raise ValueError(
        f"no recipe {str(name_or_path)!r}: {suggestion(str(name_or_path), recipe_names())} "
        "(`maskdm recipes` lists them; anything else must be a YAML file)"
    )


class _Plain(yaml.SafeDumper):
    """YAML without anchors, which mean nothing to a reader of one row."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _StrictLoader(yaml.SafeLoader):
    """YAML whose mappings have text for keys, each once: of two equal ones the last would win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        nodes = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in nodes]
        for i, key in enumerate(keys):
            problem = "is not a name" if not isinstance(key, str) else "is there twice"
            if not isinstance(key, str) or key in keys[:i]:
                mark = nodes[i].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} {problem}", mark)
        return super().construct_mapping(node, deep)


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Loads a packaged recipe by name, or any by the path of its YAML file.

    Raises ValueError, one line, for an unknown name, broken YAML or a wrong setting.
    """
    values = _settings(name_or_path)
    try:
        return Recipe(**values)
    except ValueError as error:
        raise ValueError(f"recipe {name_or_path}: {error}") from None


def _settings(name_or_path: str | Path, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """A recipe's settings in today's form, on top of those of its `base`, another recipe.

    Groups are merged setting by setting; lists (the stages) are replaced as a whole.
    """
    content = recipe_text(name_or_path)
    try:
        values = yaml.load(content, _StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none, say
        raise ValueError(
            f"recipe {name_or_path} is not a YAML file of settings: {one_line(error)}"
        ) from None
    if not isinstance(values, dict):
        raise ValueError(f"recipe {name_or_path} is not a mapping of settings")
    base = values.pop("base", None)
    if base is None:
        return migrated(values)
    if base in above:
        raise ValueError(f"recipe {name_or_path}: base {base} leads back to itself")
    return merged(_settings(str(base), (*above, str(base))), migrated(values))


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested settings, the changes winning; lists are replaced as a whole."""
    result = dict(base)
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(name), dict)
        result[name] = merged(base[name], value) if both else value
    return result


def whole_text(name_or_path: str | Path) -> str:
    """YAML text of a recipe, with the settings of its base if it has one; the comment stays."""
    text = recipe_text(name_or_path)
    if not any(line.startswith("base:") for line in text.splitlines()):
        return text
    comment = [line for line in text.splitlines() if line.startswith("#")]
    load_recipe(name_or_path)  # refuses what is wrong
    settings = yaml.safe_dump(_settings(name_or_path), sort_keys=False, width=100)
    return "\n".join([*comment, settings])


# Where settings stood before they were grouped: group -> (its parent, {old name: name in it}).
_GROUPED = {
    "weighting": (
        "diffusion",
        {"weighting": "kind", "snr_clip": "snr_clip", "p2_gamma": "gamma", "sigmoid_bias": "bias"},
    ),
    "times": ("diffusion", {"time_sampling": "kind", "logit_mean": "mean", "logit_std": "std"}),
    "guidance": (
        "sampling",
        {
            "guidance": "kind",
            **{f"guidance_{name}": name for name in ("scale", "start", "end", "weak", "rate")},
        },
    ),
}
_RENAMED_METRICS = {"precision-recall": ["precision", "recall"]}


def migrated(values: dict[str, Any]) -> dict[str, Any]:
    """Settings as an earlier version wrote them, in today's form; today's are left as they are.

    Args:
        values: a recipe as read from YAML or JSON, or some of its groups; not checked yet.
    """
    values = {**values}
    for group, (parent, names) in _GROUPED.items():
        old = values.get(parent)
        if not isinstance(old, dict) or isinstance(old.get(group), dict):
            continue
        if moved := {new: old[name] for name, new in names.items() if name in old}:
            kept = {name: value for name, value in old.items() if name not in names}
            values[parent] = {**kept, group: moved}
    if isinstance(values.get("stages"), list):
        values["stages"] = [_migrated_stage(stage) for stage in values["stages"]]
    evaluation = values.get("evaluation")
    if isinstance(evaluation, dict) and isinstance(evaluation.get("metrics"), list):
        metrics = [
            new for name in evaluation["metrics"] for new in _RENAMED_METRICS.get(name, [name])
        ]
        values["evaluation"] = {**evaluation, "metrics": metrics}
    return values


def _migrated_stage(stage: Any) -> Any:
    if not isinstance(stage, dict):
        return stage
    renamed = {"warmup" if k == "warmup_steps" else k: value for k, value in stage.items()}
    if "ema_decay" in renamed:
        renamed["ema"] = {"decay": renamed.pop("ema_decay")}
    return renamed


@dataclass(frozen=True)
class Change:
    """A setting in which two recipes differ.

    Attributes:
        name: dotted, `stages.0.lr`.
        before, now: its values, as in JSON.
    """

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name}: {self.before} -> {self.now}"


def differences(old: Recipe, new: Recipe) -> list[Change]:
    """The settings in which two recipes differ. Those of how fast samples are drawn don't count."""
    left_out = {"sampling": set(Sampling.HOW_FAST)}
    before, now = (one.model_dump(mode="json", exclude=left_out) for one in (old, new))
    return _differences(before, now, "")


def _differences(old: Any, new: Any, name: str) -> list[Change]:
    if isinstance(old, dict) and isinstance(new, dict):
        dot = f"{name}." if name else ""
        keys = [*old, *(key for key in new if key not in old)]
        return [one for key in keys for one in _differences(old.get(key), new.get(key), dot + key)]
    if name == "stages":
        changes = [] if len(old) == len(new) else [Change("number of stages", len(old), len(new))]
        for i, (one, other) in enumerate(zip(old, new, strict=False)):
            changes += _differences(one, other, f"stages.{i}")
        return changes
    return [] if old == new else [Change(name, old, new)]

"""Recipes as files: the packaged ones by name, any by path; how two of them differ."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from maskdm.recipe import Recipe, Sampling
from maskdm.words import one_line, suggestion


def recipe_names() -> list[str]:
    """Names of the packaged recipes, sorted."""
    folder = resources.files("maskdm") / "recipes"
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def recipe_text(name_or_path: str | Path) -> str:
    """YAML text of a packaged recipe (by name) or of a file (by path), unchanged.

    Raises ValueError where neither exists; the message lists the packaged names.
    """
    if str(name_or_path) in recipe_names():
        return (resources.files("maskdm") / "recipes" / f"{name_or_path}.yaml").read_text("utf-8")
    path = Path(name_or_path)
    if path.is_file():
        try:
            return path.read_text("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"recipe {path} is not a YAML file of settings: not text") from None
    raise ValueError(
        f"no recipe {str(name_or_path)!r}: {suggestion(str(name_or_path), recipe_names())} "
        "(`maskdm recipes` lists them; anything else must be a YAML file)"
    )


class _StrictLoader(yaml.SafeLoader):
    """YAML whose mappings have text for keys, each once: of two equal ones the last would win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            problem = "is not a name" if not isinstance(key, str) else "is there twice"
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
        raise ValueError(
            f"recipe {name_or_path} is not a YAML file of settings: {one_line(error)}"
        ) from None
    if not isinstance(values, dict):
        raise ValueError(f"recipe {name_or_path} is not a mapping of settings")
    try:
        return Recipe(**migrated(values))
    except ValueError as error:
        raise ValueError(f"recipe {name_or_path}: {error}") from None


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
        values["stages"] = [
            {"warmup" if name == "warmup_steps" else name: value for name, value in stage.items()}
            if isinstance(stage, dict)
            else stage
            for stage in values["stages"]
        ]
    evaluation = values.get("evaluation")
    if isinstance(evaluation, dict) and isinstance(evaluation.get("metrics"), list):
        metrics = [
            new for name in evaluation["metrics"] for new in _RENAMED_METRICS.get(name, [name])
        ]
        values["evaluation"] = {**evaluation, "metrics": metrics}
    return values


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

"""Starting a model from another's weights: other data, diffusion, resolution or classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maskdm.families import BACKBONES
from maskdm.models.backbone import Backbone
from maskdm.models.uvit import UViT
from maskdm.models.vit import ViT
from maskdm.words import listed


def transfer_weights(source: Backbone, target: Backbone) -> list[str]:
    """Copies what fits from one model into another, and reports what happened to each weight.

    Positions of another grid are interpolated (bicubic, patch by patch). Weights of another shape
    or name keep their fresh values: those of the ends where patches or channels differ, of classes
    where their number differs, of blocks that only one of the two has.

    Args:
        source: the model to start from.
        target: the model to be trained; changed in place.

    Returns:
        Lines for people: what was loaded, what was interpolated, what was left fresh.

    Raises:
        ValueError: not one weight matrix of a block fits. The target is unchanged.
    """
    old, new = source.state_dict(), target.state_dict()
    fitting = {
        name: old[name] for name in new if name in old and old[name].shape == new[name].shape
    }
    if source.num_classes != target.num_classes:  # rows of one number would mean other classes
        fitting = {name: value for name, value in fitting.items() if not _is_class_table(name)}
    resized, not_copied = [], 0
    if isinstance(source, UViT | ViT) and isinstance(target, UViT | ViT):
        positions = _positions(source, target)
        if positions is not None:
            fitting["pos_embed"] = positions
            if source.grid != target.grid:
                resized.append("pos_embed")
        labels = _labels(source, target)
        if labels is not None:
            fitting["label_embed.weight"] = labels
            not_copied = labels[:-1].numel()
    if not any(fitting[name].ndim > 1 and "block" in name for name in fitting):
        other_kind = f": use --model.kind {source.kind}" if source.kind != target.kind else ""
        raise ValueError(
            f"no weights of the model to start from fit: it is a {_sizes(source)}, the new one is "
            f"a {_sizes(target)}{other_kind}"
        )
    target.load_state_dict({**new, **fitting})
    loaded = sum(fitting[name].numel() for name in fitting) - not_copied
    total = sum(value.numel() for value in new.values())
    lines = [f"{len(fitting)} of {len(new)} tensors, {100 * loaded / total:.3g} % of the weights"]
    if resized:
        rows, columns = source.grid
        lines.append(
            f"positions interpolated from {rows}x{columns} to {target.grid[0]}x{target.grid[1]}"
        )
    if not_copied:
        counts = [model.config.num_classes for model in (source, target)]
        lines.append(f"classes left fresh, except for no class: {counts[0]} -> {counts[1]}")
    lines += _renamed(source, target)
    heads = [model.config.get("num_heads") for model in (source, target)]
    if source.kind == target.kind and _has(source, "num_heads") and heads[0] != heads[1]:
        lines.append(f"note: trained with {heads[0]} attention heads, now read as {heads[1]}")
    if fresh := [name for name in new if name not in fitting]:
        lines.append(f"left fresh: {_short(fresh)}")
    if unused := [name for name in old if name not in new]:
        lines.append(f"not used: {_short(unused)}")
    return lines


def _is_class_table(name: str) -> bool:
    """Whether a weight is a backbone's table of classes: ours or diffusers'."""
    return name.startswith("label_embed.") or "class_embed" in name


def _positions(source: UViT | ViT, target: UViT | ViT) -> Tensor | None:
    """The source's positions for the target's tokens; None where the widths differ."""
    old, new = source.pos_embed.detach(), target.pos_embed.detach()
    if old.shape[1] != new.shape[1]:
        return None
    before = source.num_extras
    grid = old[before:].T.reshape(1, -1, *source.grid)  # (1, D, rows, columns)
    if source.grid != target.grid:
        grid = F.interpolate(grid, target.grid, mode="bicubic", antialias=True)
    patches = grid[0].flatten(1).T  # (N, D)
    extras = new[: target.num_extras].clone()
    if before == target.num_extras:
        extras = old[:before]
    elif isinstance(source, UViT) and isinstance(target, UViT):
        extras[-1] = old[before - 1]  # the time's comes last, after the class's if there is one
    return torch.cat([extras, patches])


def _labels(source: UViT | ViT, target: UViT | ViT) -> Tensor | None:
    """The target's class table with the source's "no class" row; None where not both have one."""
    configs = [source.config, target.config]
    if not all(config.num_classes and config.label_dropout for config in configs):
        return None
    if source.config.num_classes == target.config.num_classes:
        return None  # the whole table fits as it is
    assert source.label_embed is not None and target.label_embed is not None
    old, new = source.label_embed.weight.detach(), target.label_embed.weight.detach().clone()
    if old.shape[1] != new.shape[1]:
        return None
    new[-1] = old[-1]
    return new


def _renamed(source: Backbone, target: Backbone) -> list[str]:
    """A note where as many classes have other names, so that their numbers mean others."""
    old, new = (model.config.class_names or [] for model in (source, target))
    if len(old) != len(new):
        return []
    changes = [f"{i} {a} -> {b}" for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    return [f"note: class numbers mean others now: {listed(changes)}"] if changes else []


def _has(model: Backbone, setting: str) -> bool:
    """Whether a setting means something to a network of that kind."""
    return setting in BACKBONES[model.kind].settings


def _sizes(model: Backbone) -> str:
    """A network's kind, and those of its sizes that it has."""
    names = {"embed_dim": "width", "depth": "depth", "num_heads": "heads", "options": "options"}
    sizes = [
        f"{word} {model.config[name]}"
        for name, word in names.items()
        if _has(model, name) and model.config.get(name)
    ]
    return BACKBONES[model.kind].title + (f" of {', '.join(sizes)}" if sizes else "")


def _short(names: list[str]) -> str:
    """Names of weights for one line: the first few, by module."""
    return listed(dict.fromkeys(name.rsplit(".", 1)[0] for name in names), most=6)

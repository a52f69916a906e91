"""Other projects' checkpoints as trained models.

They hold the network of `models.uvit` under other names. All sizes are read from the tensors,
except for the number of heads, which no tensor shows. Files are read as tensors alone, so that
they run no code.
"""

from __future__ import annotations

import errno
import math
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskdm.diffusion.schedule import NUM_STEPS, make_schedule
from maskdm.export.origins import ORIGINS
from maskdm.families import SCHEDULES
from maskdm.models.trained import TrainedModel
from maskdm.models.uvit import UViT
from maskdm.recipe import Diffusion
from maskdm.words import listed

HEADS = {1152: 16}  # of U-ViT-H; the other published models have heads of 64 values
# Their names -> ours, for parts of a tensor's name.
NAMES = {
    "patch_embed.proj": "patch_embed",
    "label_emb.": "label_embed.",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "decoder_pred": "head",
    "final_layer": "output_conv",
}
FIRST = "patch_embed.proj.weight"  # the tensor by which a network is recognised
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds.

    Attributes:
        weights: the network's tensors, by U-ViT's names.
        alphas_cumprod: squared signal scale of each step, float (T,), if the file has it.
        has_no_class: whether the last row of the class table means "no class"; None = unknown.
    """

    weights: Tensors
    alphas_cumprod: Tensor | None = None
    has_no_class: bool | None = None


def import_checkpoint(
    file: Path,
    origin: str,
    weights: str = "ema",
    num_heads: int | None = None,
    has_no_class: bool = False,
    schedule: str | None = None,
    prediction: str = "eps",
) -> TrainedModel:
    """Another project's checkpoint as a trained model, in evaluation mode, on the CPU.

    Args:
        file: the checkpoint, written by `torch.save`.
        origin: a key of `export.origins.ORIGINS`.
        weights: `ema` = averaged, `raw` = as trained.
        num_heads: attention heads; None = as in the published model of that width.
        has_no_class: whether the last row of the class table means "no class", where the file
            itself does not say it.
        schedule: noise schedule; None = the file's, or the origin's.
        prediction: what the network predicts.

    Raises ValueError where the file cannot be read, is of another kind, or does not say all that is
    needed; it names the file, and the flag that says it.
    """
    content = _read(file)
    try:
        held = ORIGINS[origin].read(content, weights)
        network = _network(held, num_heads, has_no_class)
        name = schedule or _schedule_of(held.alphas_cumprod) or ORIGINS[origin].schedule
        if name is None:
            raise ValueError("it holds no noise schedule: give --schedule")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return TrainedModel(network.eval(), Diffusion(schedule=name, prediction=prediction))


def read_uvit(content: dict[str, Any], weights: str) -> Contents:
    """U-ViT's file: the network's tensors (Bao et al. 2022).

    Raises ValueError for another file, for raw weights, and for a network that draws latents.
    """
    prefix = _prefix(content, "")
    if prefix is None:
        other = _prefix(_group(content, "ema") | _group(content, "model"), "encoder.") is not None
        way_out = "use --from maskdm" if other else f"no tensor is called {FIRST}"
        raise ValueError(f"it is no checkpoint of U-ViT: {way_out}")
    if weights == "raw":
        raise ValueError(
            "a file of U-ViT's has one set of weights: import nnet.pth for the raw ones, "
            "nnet_ema.pth for the averaged ones"
        )
    network = _below(content, prefix)
    if network[FIRST].ndim == 4 and network[FIRST].shape[1] == 4:
        raise ValueError(
            "it draws the 4 channels of an autoencoder's latents: only networks of pixels can "
            "be imported"
        )
    return Contents(network)


def read_maskdm(content: dict[str, Any], weights: str) -> Contents:
    """The paper's authors' file: {"model": tensors, "ema": tensors, "step": ..., "opt": ...}.

    Raises ValueError for another file, or one without these weights.
    """
    group, start = {"ema": ("ema", "ema_model."), "raw": ("model", "")}[weights]
    tensors = _group(content, group)
    prefix = _prefix(tensors, "encoder.", start)
    if prefix is None:
        if _prefix(content, "") is not None:
            raise ValueError("it is no checkpoint of the paper's authors: use --from uvit")
        other = {"ema": "raw", "raw": "ema"}[weights]
        other_group = {"ema": "ema", "raw": "model"}[other]
        if _prefix(_group(content, other_group), "encoder.") is not None:
            raise ValueError(f'it has no {weights} weights (["{group}"]): use --weights {other}')
        raise ValueError(
            f'it is no checkpoint of the paper\'s authors: no tensor in ["{group}"] is called '
            f"encoder.{FIRST}"
        )
    network = {
        name.removeprefix("encoder.")
        .replace("encoder_pos_embed", "pos_embed")
        .replace("encoder_to_output", "decoder_pred"): tensor
        for name, tensor in _below(tensors, prefix).items()
    }
    for name in [name for name in network if name.endswith(".q_bias")]:
        block = name.removesuffix("q_bias")
        q, v = network.pop(name), network.pop(f"{block}v_bias", None)
        if v is None:
            raise ValueError(f"it lacks {block}v_bias")
        network[f"{block}qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    no_class = network.pop("uncond_embed", None)
    if no_class is not None and "label_emb.weight" in network:
        network["label_emb.weight"] = torch.cat([network["label_emb.weight"], no_class])
    around = prefix.removesuffix("model.")
    return Contents(network, tensors.get(f"{around}alphas_cumprod"), no_class is not None)


def _read(file: Path) -> dict[str, Any]:
    """What `torch.save` wrote, if it is a dictionary of tensors and plain values."""
    if file.is_dir():
        raise ValueError(f"{file} is a folder: name the checkpoint file in it")
    if not file.is_file():
        raise ValueError(f"{file} does not exist")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError, EOFError, RuntimeError, ValueError, LookupError, TypeError, OSError,
    ) as error:  # fmt: skip
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # an odd place in the file
            raise
        raise ValueError(
            f"{file} cannot be read: it is damaged, no file of torch.save, or holds Python "
            "objects besides tensors, which are never loaded because they may run code"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not tensors by name")
    return content


def _group(content: dict[str, Any], name: str) -> dict[str, Any]:
    group = content.get(name)
    return group if isinstance(group, dict) else {}


def _prefix(tensors: dict[str, Any], before: str, start: str = "") -> str | None:
    """What the names of a network's tensors begin with (`model.`, `module.`); None if none is."""
    for name in tensors:
        if isinstance(name, str) and name.startswith(start) and name.endswith(before + FIRST):
            prefix = name.removesuffix(before + FIRST)
            if not prefix or prefix.endswith("."):
                return prefix
    return None


def _below(tensors: dict[str, Any], prefix: str) -> Tensors:
    """The tensors whose names begin with a prefix, without it, in fp32."""
    return {
        name.removeprefix(prefix): value.float()
        for name, value in tensors.items()
        if name.startswith(prefix) and isinstance(value, Tensor)
    }


def _network(held: Contents, num_heads: int | None, has_no_class: bool) -> UViT:
    """The network of a checkpoint. Raises ValueError where its tensors do not make one."""
    weights = held.weights
    _refuse_incomplete(weights)
    dim, channels, patch_size, _ = weights[FIRST].shape
    num_labels = len(weights.get("label_emb.weight", ()))
    num_patches = weights["pos_embed"].shape[1] - (2 if num_labels else 1)
    side = math.isqrt(max(num_patches, 0))
    if side == 0 or side**2 != num_patches:
        raise ValueError(f"its {num_patches} positions are not those of a square image")
    no_class = held.has_no_class if held.has_no_class is not None else has_no_class
    if has_no_class and not (num_labels and no_class):
        raise ValueError("its classes include none that means no class: leave out --no-class")
    blocks = {name for name in weights if re.fullmatch(r"in_blocks\.\d+\.norm1\.weight", name)}
    try:
        network = UViT(
            image_size=side * patch_size,
            patch_size=patch_size,
            channels=channels,
            embed_dim=dim,
            depth=2 * len(blocks) + 1,
            num_heads=num_heads or _usual_heads(dim),
            mlp_ratio=len(weights["mid_block.mlp.fc1.weight"]) / dim,
            num_classes=num_labels - 1 if num_labels and no_class else num_labels,
            label_dropout=0.1 if num_labels and no_class else 0.0,
            final_conv="final_layer.weight" in weights,
            qkv_bias="mid_block.attn.qkv.bias" in weights,
            time_mlp="time_embed.0.weight" in weights,
        )
    except ValueError as error:
        raise ValueError(f"no network can be made of its tensors: {error}") from None
    _load(network, weights)
    return network


def _refuse_incomplete(weights: Tensors) -> None:
    """Raises ValueError where a tensor is missing, or of another form, that tells the sizes."""
    for name, ndim in ((FIRST, 4), ("pos_embed", 3), ("mid_block.mlp.fc1.weight", 2)):
        if name not in weights:
            raise ValueError(f"it lacks {name}")
        if weights[name].ndim != ndim:
            raise ValueError(f"its {name} has the shape {tuple(weights[name].shape)}")


def _usual_heads(dim: int) -> int:
    """Attention heads of the published model of that width. Raises ValueError where none is."""
    if dim in HEADS or dim % 64 == 0:
        return HEADS.get(dim, dim // 64)
    raise ValueError(
        f"no tensor shows the number of attention heads, and width {dim} is none of the published "
        "models': give --num-heads"
    )


def _load(network: UViT, weights: Tensors) -> None:
    """Gives a network the tensors of a checkpoint. Raises ValueError where they do not fit."""
    ours = {}
    for name, tensor in weights.items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        ours[name] = tensor
    # A convolution's (D, channel, row, column) becomes rows of (row, column, channel).
    ours["patch_embed.weight"] = ours["patch_embed.weight"].permute(0, 2, 3, 1).flatten(1)
    ours["pos_embed"] = ours["pos_embed"][0]
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if unknown := sorted({*ours} - {*shapes}):
        raise ValueError(f"it has weights that this network has not: {listed(unknown, 3)}")
    if missing := sorted({*shapes} - {*ours}):
        raise ValueError(f"it lacks {listed(missing, 3)} (by the names here)")
    for name, shape in shapes.items():
        if tuple(ours[name].shape) != shape:
            raise ValueError(f"its {name} is {tuple(ours[name].shape)}, expected {shape}")
        if not ours[name].isfinite().all():
            raise ValueError(f"its {name} contains NaN or infinite values")
    network.load_state_dict(ours)


def _schedule_of(alphas_cumprod: Tensor | None) -> str | None:
    """The schedule that a table belongs to; None without one. Raises ValueError for others."""
    if alphas_cumprod is None:
        return None
    discrete = [name for name, row in SCHEDULES.items() if row.num_times == NUM_STEPS]
    t = torch.arange(NUM_STEPS, dtype=torch.float64) / (NUM_STEPS - 1)
    for name in discrete:
        power = make_schedule(name).alpha(t) ** 2
        if alphas_cumprod.shape == power.shape and torch.allclose(
            alphas_cumprod.double(), power, rtol=0, atol=1e-5
        ):
            return name
    raise ValueError(
        f"its noise schedule of {len(alphas_cumprod)} steps is none of {', '.join(discrete)}: name "
        "the nearest one with --schedule"
    )

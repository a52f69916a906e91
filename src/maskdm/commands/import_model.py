"""`maskdm import`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from maskdm.choices import helped, named
from maskdm.commands.common import DONE, OptionalInt, quiet, sampling_text
from maskdm.export.origins import ORIGINS, OriginName
from maskdm.families import MODEL_SIZES, PREDICTIONS, SCHEDULES, PredictionName
from maskdm.files import refuse_unwritable
from maskdm.recipe import Data, Model, Sampling
from maskdm.words import counted

if TYPE_CHECKING:
    from maskdm.models.trained import TrainedModel

Checkpoint = Annotated[Path, tyro.conf.Positional, quiet(metavar="FILE")]
Destination = Annotated[Path, tyro.conf.Positional, quiet(metavar="OUT")]
Origin = Annotated[
    OriginName, tyro.conf.arg(name="from", help=helped("whose file it is.", ORIGINS))
]


def import_model(
    file: Checkpoint,
    out: Destination,
    *,
    origin: Origin,
    weights: Literal["ema", "raw"] = "ema",
    num_heads: OptionalInt = None,
    no_class: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    schedule: Annotated[str | None, quiet(metavar="NAME")] = None,
    prediction: Annotated[
        PredictionName, tyro.conf.arg(help=helped("what the network predicts.", PREDICTIONS))
    ] = "eps",
) -> int:
    """Turn another project's checkpoint into a model of maskdm's.

    OUT can be sampled, evaluated, and trained further with --init OUT. Sizes are read from the
    tensors. Nothing in FILE is run: only tensors are loaded.

    Args:
        file: the checkpoint, as torch.save wrote it.
        out: folder of the model; a new one.
        weights: ema = averaged, raw = as trained (--from maskdm; U-ViT has a file for each).
        num_heads: attention heads; default: those of the published model of that width.
        no_class: the last class of the file means "no class" (--from uvit).
        schedule: noise schedule; default: the one in the file, or vp-sde for uvit.
    """
    named(origin, ORIGINS, "origin")
    if schedule is not None:
        named(schedule, SCHEDULES, "schedule")
    named(prediction, PREDICTIONS, "prediction")
    if num_heads is not None and num_heads < 1:
        raise ValueError(f"--num-heads {num_heads}: at least 1")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"OUT {out} exists and is not an empty folder: name a new one")
    refuse_unwritable(out, "OUT", is_folder=True)

    from maskdm.export.foreign import import_checkpoint
    from maskdm.export.pipeline import make_pipeline, save_pipeline

    trained = import_checkpoint(file, origin, weights, num_heads, no_class, schedule, prediction)
    sampling = Sampling(**ORIGINS[origin].sampling)
    save_pipeline(make_pipeline(trained, sampling), out)
    print(_description(trained))
    schedule = trained.diffusion.schedule
    print(f"{schedule} schedule, {prediction}, {sampling_text(sampling)} -> {out}")
    print(f"next    maskdm sample {out} --num 16 --out samples.png")
    print(f"        maskdm train RECIPE --init {out} {' '.join(_flags(trained))}")
    return DONE


def _description(trained: TrainedModel) -> str:
    """The network in a line."""
    config, (height, width, channels) = trained.model.config, trained.model.image_shape
    millions = sum(parameter.numel() for parameter in trained.model.parameters()) / 1e6
    classes = f", {config.num_classes:,} classes" if config.num_classes else ""
    classes += " and none" if config.num_classes and config.label_dropout else ""
    return (
        f"U-ViT of width {config.embed_dim}, {counted(config.depth, 'block')}, "
        f"{counted(config.num_heads, 'head')}, "
        f"{millions:.3g} M parameters, patches of {config.patch_size} pixels, "
        f"images {height}x{width}x{channels}{classes}"
    )


def _flags(trained: TrainedModel) -> list[str]:
    """The flags of a recipe whose model takes over every weight."""
    config, (size, _, channels) = trained.model.config, trained.model.image_shape
    sizes = (config.embed_dim, config.depth, config.num_heads)
    rows = MODEL_SIZES.items()
    names = [name for name, row in rows if (row.embed_dim, row.depth, row.num_heads) == sizes]
    flags = [f"--data.size {size}", f"--model.kind {trained.model.kind}"]
    flags.append(f"--model.patch-size {config.patch_size}")
    flags += [f"--data.channels {channels}"] * (channels != Data.model_fields["channels"].default)
    flags.append(f"--model.size {names[0] if names else None}")
    if not names:
        flags += [
            f"--model.{flag} {value}"
            for flag, value in zip(("embed-dim", "depth", "num-heads"), sizes, strict=True)
        ]
    flags += [f"--model.mlp-ratio {config.mlp_ratio:g}"] * (config.mlp_ratio != 4)
    if config.num_classes:
        flags.append(f"--model.num-classes {config.num_classes}")
        dropout = config.label_dropout
        usual = Model.model_fields["label_dropout"].default
        flags += [f"--model.label-dropout {dropout:g}"] * (dropout != usual)
    switches = ("final_conv", "qkv_bias", "time_mlp")
    flags += [f"--model.{name.replace('_', '-')}" for name in switches if config[name]]
    return flags

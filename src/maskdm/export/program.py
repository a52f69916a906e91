"""A trained network as a program for other runtimes: torch.export's, and ONNX."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import maskdm
from maskdm.diffusion.schedule import NUM_STEPS
from maskdm.files import write_whole
from maskdm.models.trained import TrainedModel
from maskdm.tokens import patchify, unpatchify

FACTS = "maskdm.json"  # what a program's inputs and answers mean, inside of its file
TORCH, ONNX = ".pt2", ".onnx"
NEEDS_ONNX = ("onnx", "onnxscript")  # the extra `onnx`
MOST_FOR_UNET = 63  # diffusers' upsampling takes another way from 64 images on


class WholeImages(nn.Module):
    """A network on whole images, as other runtimes call it.

    Args:
        trained: the network, in evaluation mode on the CPU.
    """

    def __init__(self, trained: TrainedModel):
        super().__init__()
        self.network = trained.model

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Answers for noisy images.

        Args:
            x: noisy images, float32 (B, C, H, W).
            t: their times, float32 (B,) in [0, 1].
            labels: classes, int64 (B,), num_classes = no class; for a model with classes only.

        Returns:
            What the network predicts, float32 (B, C, H, W).
        """
        network = self.network
        patches = patchify(x.movedim(1, 3), network.patch_size)  # (B, N, P)
        positions = torch.arange(network.num_patches).expand(x.shape[0], -1)
        answer = network(patches, positions, t, labels)
        return unpatchify(answer, network.patch_size, network.grid).movedim(3, 1)


def program_facts(trained: TrainedModel) -> dict[str, Any]:
    """What a program's inputs and answers mean, for JSON.

    `prediction` is what it answers; `log_snr` the schedule, log(alpha^2 / sigma^2) at the times
    i / 999, i = 0..999, where alpha^2 + sigma^2 = 1 unless the schedule is `flow` (alpha + sigma
    = 1). `max_batch` is the largest batch, null for any.
    """
    model, diffusion = trained.model, trained.diffusion
    height, width, channels = model.image_shape
    t = torch.arange(NUM_STEPS, dtype=torch.float64) / (NUM_STEPS - 1)
    return {
        "maskdm": maskdm.__version__,
        "image_size": [height, width],
        "channels": channels,
        "max_batch": max_batch(trained),
        "num_classes": model.num_classes,
        "class_names": model.config.class_names,
        "schedule": diffusion.schedule,
        "prediction": diffusion.prediction,
        "log_snr": trained.schedule.log_snr(t).tolist(),
    }


def max_batch(trained: TrainedModel) -> int | None:
    """The largest batch that a program takes; None = any."""
    return MOST_FOR_UNET if trained.model.kind == "unet2d" else None


def refuse_program(out: Path) -> None:
    """Raises ValueError for a suffix that names no form, or one whose packages are missing."""
    suffix = out.suffix.lower()
    if suffix not in (TORCH, ONNX):
        raise ValueError(f"{out}: end it in {TORCH} (torch.export) or {ONNX}")
    missing = [name for name in NEEDS_ONNX if importlib.util.find_spec(name) is None]
    if suffix == ONNX and missing:
        raise ValueError(f"ONNX needs {', '.join(missing)}: pip install 'maskdm[onnx]'")


def save_program(trained: TrainedModel, out: Path) -> None:
    """Writes a network as a program of whole images, with `program_facts` in its file.

    Args:
        trained: the network, on the CPU.
        out: `.pt2` = an exported program of torch, which holds the facts as the extra file
            maskdm.json; `.onnx` = ONNX, which holds them as the property maskdm.json of the model.

    Raises:
        ValueError: another suffix, or ONNX's packages are missing.
        OSError: the disk refuses.
    """
    refuse_program(out)
    program = exported(trained)
    facts = json.dumps(program_facts(trained))
    if out.suffix.lower() == TORCH:
        write_whole(out, lambda file: torch.export.save(program, file, extra_files={FACTS: facts}))
        return
    with warnings.catch_warnings():  # its own use of what torch is about to give up
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        made = torch.onnx.export(program, dynamo=True, verbose=False)
    assert made is not None
    made.model.metadata_props[FACTS] = facts
    write_whole(out, lambda file: file.write(made.model_proto.SerializeToString()))


def exported(trained: TrainedModel) -> torch.export.ExportedProgram:
    """The program of a network on whole images, for batches of 1 to `max_batch`."""
    height, width, channels = trained.model.image_shape
    x, t = torch.zeros(2, channels, height, width), torch.zeros(2)
    labels = (torch.zeros(2, dtype=torch.int64),) if trained.model.num_classes else ()
    batch = torch.export.Dim("batch", min=1, max=max_batch(trained))
    shapes = tuple({0: batch} for _ in (x, t, *labels))
    with torch.no_grad():
        return torch.export.export(
            WholeImages(trained).eval(), (x, t, *labels), dynamic_shapes=shapes
        )

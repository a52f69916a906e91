"""`maskdm export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from maskdm.commands.common import DONE, Run, quiet, refuse_among_images, say_note
from maskdm.files import refuse_unwritable
from maskdm.words import size_text

Out = Annotated[Path, tyro.conf.Positional, quiet(metavar="OUT")]


def export(run: Run, out: Out) -> int:
    """Write a model's network as a program for other runtimes.

    It maps noisy images x, float32 (B, C, H, W), their times t, float32 (B,) in [0, 1], and, with
    classes, labels, int64 (B,), to what the network predicts, float32 (B, C, H, W). The file also
    holds, as maskdm.json, what it predicts and the noise at 1,000 times.

    Args:
        run: a run's folder, RUN@STAGE, a checkpoint, an exported model, or a Hub id.
        out: .pt2 = a program of torch.export; .onnx = ONNX (pip install 'maskdm[onnx]').
    """
    from maskdm.export.program import max_batch, refuse_program, save_program
    from maskdm.runs.load import load_model

    refuse_program(out)
    refuse_unwritable(out, "OUT")
    refuse_among_images(run, out, "OUT")
    trained = load_model(run, say_note).trained
    save_program(trained, out)
    height, width, channels = trained.model.image_shape
    inputs = f"x (B, {channels}, {height}, {width}), t (B,)"
    inputs += ", labels (B,)" if trained.model.num_classes else ""
    most = max_batch(trained)
    sizes = "B of any size" if most is None else f"B up to {most}"
    size = size_text(out.stat().st_size)
    print(f"{inputs} -> {trained.diffusion.prediction}, {sizes}; {size} -> {out}")
    return DONE

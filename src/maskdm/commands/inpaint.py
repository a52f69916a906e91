"""`maskdm inpaint`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from maskdm.commands.common import (
    DONE,
    OptionalClass,
    OptionalFloat,
    Run,
    SamplingFlags,
    is_main_process,
    load,
    quiet,
    refuse_out,
    sampling_text,
    say_how_long,
    say_note,
)

ImageFile = Annotated[Path, tyro.conf.Positional, quiet(metavar="IMAGE")]


def inpaint(
    run: Run,
    image: ImageFile,
    *,
    mask: Annotated[Path, quiet(metavar="PNG")],
    settings: SamplingFlags,
    out: Path = Path("inpainted.png"),
    num: int = 4,
    seed: int = 0,
    label: OptionalClass = None,
    ema: OptionalFloat = None,
    resamplings: int = 10,
    jump: int = 5,
) -> int:
    """Draw the missing parts of an image; known pixels do not change.

    By RePaint: steps of ddpm, each stretch repeated; steps x resamplings evaluations.

    Args:
        run: a run's folder, RUN@STAGE, a checkpoint, an exported model, or a Hub id.
        image: the picture; prepared as the run's training images were.
        mask: a picture of the same shape, white where pixels are to be drawn, black elsewhere.
        out: file.png = a sheet (the image with its hole, then the results); file.npz = uint8
            (N, H, W, C) as arr_0; any other name = a new folder of PNG files.
        num: number of results.
        seed: another seed, other results.
        label: class of the results, by its name or number; default: no class if the
            model can draw without one, else all in turn.
        ema: relative width of another average of the weights, of runs with ema.kind power.
        resamplings: times that each stretch of steps is repeated, so that old and new fit.
        jump: steps in a stretch.
    """
    settings = settings.checked()
    if num < 1:
        raise ValueError(f"--num {num}: at least one result")
    for name, value in (("resamplings", resamplings), ("jump", jump)):
        if value < 1:
            raise ValueError(f"--{name} {value}: at least 1")
    if settings.sampler != "ddpm":
        raise ValueError(f"--sampler {settings.sampler}: inpainting uses ddpm")

    import numpy as np

    from maskdm.images.output import save_images
    from maskdm.models.class_names import class_numbers
    from maskdm.sampling.generate import default_labels
    from maskdm.sampling.inpaint import (
        inpaint,
        labels_by_default,
        read_image_and_mask,
        with_hole,
        without_useless_guidance,
    )

    refuse_out(out, run)
    strong, weak = load(run, settings, ema)
    model = strong.trained.model
    picture, unknown = read_image_and_mask(image, mask, strong.preparation)
    named = None if label is None else class_numbers(model.config, label, num)
    labels = labels_by_default(model, num) if named is None else named
    asked, settings = settings, without_useless_guidance(settings, model, labels)
    if settings != asked:
        say_note("results without a class are not guided by classes: give --label")
    say_how_long(strong, settings, num, weak, resamplings)
    weak_model, progress = weak.trained if weak else None, sys.stderr.isatty()
    how = (num, seed, resamplings, jump, labels, weak_model, progress)
    images = inpaint(strong.trained, settings, picture, unknown, *how)
    if not is_main_process():
        return DONE
    given = default_labels(model, range(num)) if labels is None else labels.numpy()
    if out.suffix.lower() == ".png":
        images = np.concatenate([with_hole(picture, unknown)[None], images])
    save_images(images, out, given)
    times = f"{resamplings} times {sampling_text(settings)}"
    print(f"{num} results from {strong.location.folder}, seed {seed}, {times}")
    print(f"{100 * unknown.mean():.3g} % of the pixels drawn -> {out}")
    return DONE

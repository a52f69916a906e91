"""`maskdm sample`."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated

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
)
from maskdm.recipe import Mask

WHOLE = Mask()


def sample(
    run: Run,
    *,
    out: Path,
    settings: SamplingFlags,
    num: int = 64,
    seed: int = 0,
    label: OptionalClass = None,
    ema: OptionalFloat = None,
    mask: Mask = WHOLE,
    mask_image: Annotated[Path | None, quiet(metavar="PNG")] = None,
) -> int:
    """Draw images from a model. Image i depends on the seed and i alone.

    Args:
        run: a run's folder (RUN@STAGE = at that stage's end: RUN@pre-train is the primer), a
            checkpoint, an exported model, or a Hub id.
        out: grid.png = one sheet; images.npz = uint8 (N, H, W, C) as arr_0 (with classes int64
            (N,) as arr_1); any other name = a new folder of PNG files.
        num: number of images.
        seed: another seed, other images.
        label: class of all images, by its name or number; default: all in turn.
        ema: relative width of another average of the weights, 0.02 to 0.28: of runs with ema.kind
            power. Default: the run's own.
        mask: draw only the patches that such a mask leaves visible: the marginal that it selects.
        mask_image: draw only the patches that are white in this picture.
    """
    settings = settings.checked()
    if num < 1:
        raise ValueError(f"--num {num}: at least one image")

    from maskdm.images.output import save_images
    from maskdm.masks import mask_text
    from maskdm.models.class_names import class_numbers, class_text
    from maskdm.sampling.generate import default_labels, generate_on_all_ranks
    from maskdm.sampling.marginal import masks_of_images, patches_of_picture, read_mask

    refuse_out(out, run)
    mask = mask.checked()
    if mask.kind != "none" and not mask.rate:
        raise ValueError(f"--mask.kind {mask.kind} hides nothing at rate 0: add --mask.rate")
    if mask.rate and mask_image is not None:
        raise ValueError("--mask-image and --mask.rate both choose patches: give one")
    strong, weak = load(run, settings, ema)
    model = strong.trained.model
    visible, of = None, ""
    if mask_image is not None:
        picture = read_mask(mask_image, *model.image_shape[:2])
        visible = patches_of_picture(picture, model.patch_size).repeat(num, 1)
        of = f", the white patches of {mask_image}"
    elif mask.rate:
        visible = masks_of_images(mask, model.grid, range(num), seed)
        of = f", {visible.shape[1]} of {math.prod(model.grid)} patches each ({mask_text(mask)})"
    labels = None if label is None else class_numbers(model.config, label, num)
    say_how_long(strong, settings, num, weak)
    images = generate_on_all_ranks(
        strong.trained,
        settings,
        num,
        seed,
        labels,
        weak.trained if weak else None,
        visible,
        progress=sys.stderr.isatty(),
    )
    if not is_main_process():
        return DONE
    given = default_labels(model, range(num)) if labels is None else labels.numpy()
    save_images(images, out, given)
    if labels is not None:
        of += f", class {class_text(model.config, int(labels[0]))}"
    text = f"{num} images from {strong.location.folder}, seed {seed}, {sampling_text(settings)}{of}"
    run_dir = strong.location.run
    print(text, f"-> {out}", *([f"next    maskdm evaluate {run_dir}"] if run_dir else []), sep="\n")
    return DONE

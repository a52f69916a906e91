"""`maskdm sample`."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from maskdm.commands.common import (
    DONE,
    NoPrefix,
    OptionalClass,
    OptionalFloat,
    OptionalInt,
    Run,
    SamplingFlags,
    is_main_process,
    load,
    quiet,
    refuse_among_images,
    refuse_out,
    sampling_text,
    say_how_long,
)
from maskdm.files import expanded
from maskdm.recipe import Mask, Sampling

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from maskdm.models.build import Backbone
    from maskdm.runs.load import Loaded

WHOLE = Mask()
STRIP_COLUMNS, VIDEO_FRAMES = 8, 50  # moments of an image by default, and at most
INTERPOLATED_COLUMNS = 8  # of a sheet


@dataclass(frozen=True)
class ViewFlags:
    """What else than finished images of one seed `sample` shows."""

    strip: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write a denoising strip to --out, a .png: a row for each image, from noise to the end."""
    moments: OptionalInt = None
    """Columns of the strip. Default: 8, or as many as the steps allow."""
    video: Annotated[Path | None, quiet(metavar="x.gif|x.mp4")] = None
    """Also write a video of the denoising, or of the way of --interpolate; .mp4 needs PyAV."""
    interpolate: Annotated[tuple[int, int] | None, quiet(metavar="A B")] = None
    """Go from the first image of seed A to that of seed B, in --num images of one class."""


NO_VIEW = ViewFlags()


def sample(
    run: Run,
    *,
    out: Path,
    settings: SamplingFlags,
    num: int = 64,
    seed: int = 0,
    label: OptionalClass = None,
    ema: OptionalFloat = None,
    view: Annotated[ViewFlags, NoPrefix] = NO_VIEW,
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
    refuse_out(out, run)
    mask = mask.checked()
    _refuse_mask(mask, mask_image, view)
    _refuse_view(view, out, num, seed, settings.steps, run)

    from maskdm.models.class_names import class_numbers, class_text

    strong, weak = load(run, settings, ema)
    model = strong.trained.model
    visible, of = _visible(model, mask, mask_image, num, seed)
    labels = None if label is None else class_numbers(model.config, label, num)
    say_how_long(strong, settings, num, weak)
    looks = _looks(strong, settings, view)
    images = _draw(strong, weak, settings, num, seed, labels, visible, view, looks)
    if not is_main_process():
        return DONE
    _write(images, looks, model, labels, out, view)
    if labels is not None:
        of += f", class {class_text(model.config, int(labels[0]))}"
    seeds = f"seed {seed}"
    if view.interpolate is not None:
        seeds = f"from seed {view.interpolate[0]} to {view.interpolate[1]}"
    text = f"{num} images from {strong.location.folder}, {seeds}, {sampling_text(settings)}{of}"
    run_dir = strong.location.run
    print(text, f"-> {out}", sep="\n")
    if view.video is not None:
        print(f"-> {view.video}")
    if run_dir:
        print(f"next    maskdm evaluate {run}")
    return DONE


def _refuse_mask(mask: Mask, mask_image: Path | None, view: ViewFlags) -> None:
    """Raises ValueError where masks are given that choose nothing, or beside each other."""
    if mask.kind != "none" and not mask.rate:
        raise ValueError(f"--mask.kind {mask.kind} hides nothing at rate 0: add --mask.rate")
    if mask.rate and mask_image is not None:
        raise ValueError("--mask-image and --mask.rate both choose patches: give one")
    if (mask.rate or mask_image is not None) and view != NO_VIEW:
        raise ValueError("--strip, --video and --interpolate show whole images: leave out the mask")


def _refuse_view(view: ViewFlags, out: Path, num: int, seed: int, steps: int, run: str) -> None:
    """Raises ValueError where flags of the view contradict others, or would do nothing."""
    if view.strip and out.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: a strip is a picture, end it in .png")
    if view.moments is not None and not view.strip:
        raise ValueError("--moments is the number of columns of a strip: add --strip")
    if view.moments is not None and not 2 <= view.moments <= steps + 1:
        raise ValueError(
            f"--moments {view.moments}: from 2 to {steps + 1}, the noise and what {steps} steps "
            "lead to"
        )
    if view.video is not None:
        from maskdm.images.video import refuse_video

        refuse_video(expanded(view.video), "--video")
        refuse_among_images(run, expanded(view.video), "--video")
    if view.interpolate is not None:
        if view.interpolate[0] == view.interpolate[1]:
            raise ValueError(f"--interpolate {view.interpolate[0]} twice: give two seeds")
        if num < 2:
            raise ValueError(f"--num {num}: interpolation draws both ends, so at least 2")
        if seed:
            raise ValueError("--seed has no effect: --interpolate names its seeds")


def _visible(
    model: Backbone, mask: Mask, mask_image: Path | None, num: int, seed: int
) -> tuple[Tensor | None, str]:
    """The patches to draw, int64 (num, V), None = all; and how they are chosen, in words."""
    from maskdm.masks import mask_text
    from maskdm.sampling.marginal import masks_of_images, patches_of_picture, read_mask

    if mask_image is not None:
        picture = read_mask(mask_image, *model.image_shape[:2])
        visible = patches_of_picture(picture, model.patch_size).repeat(num, 1)
        return visible, f", the white patches of {mask_image}"
    if mask.rate:
        visible = masks_of_images(mask, model.grid, range(num), seed)
        patches = f"{visible.shape[1]} of {math.prod(model.grid)} patches"
        return visible, f", {patches} each ({mask_text(mask)})"
    return None, ""


def _looks(strong: Loaded, settings: Sampling, view: ViewFlags) -> dict[str, list[int]]:
    """Numbers of the levels at which `strip` and `video` show images, before the finished ones."""
    from maskdm.sampling.moments import moments_of
    from maskdm.sampling.samplers import sampling_levels

    looks: dict[str, list[int]] = {"strip": [], "video": []}
    levels = sampling_levels(strong.trained.schedule, settings)
    if view.strip:
        columns = view.moments or min(STRIP_COLUMNS, settings.steps + 1)
        looks["strip"] = moments_of(levels, columns - 1)
    if view.video is not None and view.interpolate is None:
        looks["video"] = moments_of(levels, min(VIDEO_FRAMES - 1, settings.steps))
    return looks


def _draw(
    strong: Loaded,
    weak: Loaded | None,
    settings: Sampling,
    num: int,
    seed: int,
    labels: Tensor | None,
    visible: Tensor | None,
    view: ViewFlags,
    looks: dict[str, list[int]],
) -> np.ndarray:
    """Images at all looks, the finished ones last: uint8 (num, looks + 1, H, W, C)."""
    import torch

    from maskdm.sampling.generate import generate_on_all_ranks
    from maskdm.sampling.interpolate import Between
    from maskdm.sampling.moments import draw_moments

    weak_model, progress = weak.trained if weak else None, sys.stderr.isatty()
    if view == NO_VIEW:
        how = (num, seed, labels, weak_model, visible, progress)
        return generate_on_all_ranks(strong.trained, settings, *how)[:, None]
    random = seed if view.interpolate is None else Between(*view.interpolate, num)
    if view.interpolate is not None and labels is None and strong.trained.model.num_classes:
        labels = torch.zeros(num, dtype=torch.int64)  # that of the first image, kept on the way
    at = _all_of(looks)
    return draw_moments(strong.trained, settings, num, at, random, labels, weak_model, progress)


def _all_of(looks: dict[str, list[int]]) -> list[int]:
    return sorted({number for numbers in looks.values() for number in numbers})


def _write(
    images: np.ndarray,
    looks: dict[str, list[int]],
    model: Backbone,
    labels: Tensor | None,
    out: Path,
    view: ViewFlags,
) -> None:
    """Writes what `_draw` gives to --out, and to --video."""
    import numpy as np

    from maskdm.images.output import image_grid, save_images
    from maskdm.images.video import save_video
    from maskdm.sampling.generate import default_labels

    num, _, *shape = images.shape
    at = _all_of(looks)
    strip, film = (images[:, [*(at.index(number) for number in looks[name]), -1]] for name in looks)
    if view.strip:
        save_images(strip.reshape(-1, *shape), out, columns=strip.shape[1])
    else:
        given = default_labels(model, range(num)) if labels is None else labels.numpy()
        if view.interpolate is not None and given is not None:
            given = np.full(num, given[0])
        columns = None if view.interpolate is None else min(num, INTERPOLATED_COLUMNS)
        save_images(images[:, -1], out, given, columns)
    if view.video is None:
        return
    if view.interpolate is None:
        frames = [image_grid(film[:, k]) for k in range(film.shape[1])]
    else:  # there and back, so that it repeats without a jump
        way = [*range(num), *range(num - 2, 0, -1)]
        frames = [image_grid(images[i : i + 1, -1], min_side=256, gap=0) for i in way]
    save_video(frames, expanded(view.video), hold=view.interpolate is None)

"""What the page draws: from plain values to images, within the limits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from maskdm.app.limits import Limits, refuse_seed
from maskdm.app.models import IN_TURN, Models
from maskdm.families import SAMPLERS
from maskdm.models.class_names import class_text
from maskdm.recipe import Mask, Sampling
from maskdm.sampling.generate import Look, default_labels, generate
from maskdm.sampling.inpaint import (
    inpaint,
    labels_by_default,
    with_hole,
    without_useless_guidance,
)
from maskdm.sampling.marginal import masks_of_images
from maskdm.settings import changed

JUMP = 5  # steps in a stretch of inpainting, as by default in `maskdm inpaint`


@dataclass(frozen=True)
class Wanted:
    """How images are to be drawn.

    Attributes:
        seed: image i depends on it and i alone.
        num: images.
        steps, sampler: as in `recipe.Sampling`.
        guidance, scale: kind and scale, as in `recipe.Guidance`.
        label: a class among `Models.classes`.
    """

    seed: int = 0
    num: int = 16
    steps: int = 50
    sampler: str = "ddim"
    guidance: str = "none"
    scale: float = 1.5
    label: int = IN_TURN

    def settings(self, own: Sampling) -> Sampling:
        """A model's own settings with these. Raises ValueError for an impossible one."""
        takes_eta = self.sampler in SAMPLERS and SAMPLERS[self.sampler].takes_eta
        guidance = changed(own.guidance, kind=self.guidance, scale=self.scale)
        return changed(
            own,
            sampler=self.sampler,
            steps=self.steps,
            guidance=guidance,
            eta=None if takes_eta else 0.0,
        )


@dataclass(frozen=True)
class Drawing:
    """A drawing that is about to begin, after all refusals.

    Attributes:
        models, name: of which model.
        settings: how it is sampled.
        seed, num: which images.
        labels: their classes, int64 (num,), or None.
        evaluations: of the denoiser, for each image.
        visible: patches to draw, int64 (num, V); None = all.
        picture, unknown: uint8 (H, W, C) and bool (H, W), for inpainting.
        resamplings: of inpainting.
        first: number of the first image.
    """

    models: Models
    name: str
    settings: Sampling
    seed: int
    num: int
    labels: Tensor | None
    evaluations: int
    visible: Tensor | None = None
    picture: np.ndarray | None = None
    unknown: np.ndarray | None = None
    resamplings: int = 1
    first: int = 0

    @property
    def indices(self) -> list[int]:
        """Numbers of the images."""
        return list(range(self.first, self.first + self.num))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images."""
        return self.models.load(self.name).trained.model.image_shape

    @property
    def lead(self) -> np.ndarray:
        """What a sheet shows before the images: uint8 (n, H, W, C), the image with its hole."""
        if self.picture is None or self.unknown is None:
            return np.empty((0, *self.image_shape), np.uint8)
        return with_hole(self.picture, self.unknown)[None]

    def draw(self, look: Look | None = None) -> np.ndarray:
        """Draws the images, one drawing at a time: uint8 (num, H, W, C).

        Raises ValueError where guidance, sampler or a class do not fit the model.
        """
        trained = self.models.load(self.name).trained
        weak = self.models.weak(self.name, self.settings)
        with self.models.lock:
            if self.picture is None or self.unknown is None:
                how = (self.indices, self.seed, self.labels, weak, self.visible)
                return generate(trained, self.settings, *how, look=look)
            return inpaint(
                trained,
                self.settings,
                self.picture,
                self.unknown,
                self.num,
                self.seed,
                self.resamplings,
                JUMP,
                self.labels,
                weak,
                look=look,
            )

    def classes(self) -> np.ndarray | None:
        """Classes of the images: int64 (num,); None for a model without."""
        if self.labels is not None:
            return self.labels.numpy()
        return default_labels(self.models.load(self.name).trained.model, self.indices)

    def text(self) -> str:
        """What is drawn, in a few words."""
        settings, guidance = self.settings, self.settings.guidance
        text = f"seed {self.seed}, {settings.steps} steps of {settings.sampler}"
        text += f" x {self.resamplings} resamplings" * (self.picture is not None)
        if guidance.kind != "none":
            text += f", {guidance.kind} {guidance.scale:g}"
        if self.labels is not None:
            model = self.models.load(self.name).trained.model
            number = int(self.labels[0])
            is_none = number == model.num_classes
            text += ", no class" if is_none else f", class {class_text(model.config, number)}"
        if self.visible is not None:
            patches = self.models.load(self.name).trained.model.num_patches
            text += f", {self.visible.shape[1]} of {patches} patches each"
        return text


def sampled(models: Models, name: str, wanted: Wanted, limits: Limits) -> Drawing:
    """Images from a model. Raises ValueError for too many of them, or impossible settings."""
    settings = wanted.settings(models.load(name).sampling)
    evaluations = _evaluations(wanted, settings, limits)
    labels = _labels(models, name, wanted)
    return Drawing(models, name, settings, wanted.seed, wanted.num, labels, evaluations)


def marginal(models: Models, name: str, wanted: Wanted, mask: Mask, limits: Limits) -> Drawing:
    """The patches of images that a mask leaves visible, a mask for each image.

    Raises ValueError as `sampled`, and for a mask that hides nothing or that the grid cannot have.
    """
    if not mask.rate:
        raise ValueError("the mask hides nothing at rate 0: choose more")
    whole = sampled(models, name, wanted, limits)
    grid = models.load(name).trained.model.grid
    visible = masks_of_images(mask, grid, range(wanted.num), wanted.seed)
    return replace(whole, visible=visible)


def inpainted(
    models: Models,
    name: str,
    wanted: Wanted,
    picture: np.ndarray,
    unknown: np.ndarray,
    resamplings: int,
    limits: Limits,
) -> Drawing:
    """An image with its unknown pixels drawn anew; the sampler is always inpainting's own.

    Args:
        models, name, wanted, limits: as for `sampled`; IN_TURN is the default of `maskdm inpaint`,
            no class where the model can draw without one.
        picture: uint8 (H, W, C), as the model's images are.
        unknown: bool (H, W), True where to draw.
        resamplings: times that each stretch of steps is repeated.

    Raises ValueError as `sampled`, and for a picture of another shape or a mask that marks nothing.
    """
    loaded = models.load(name)
    if picture.shape != loaded.trained.model.image_shape:
        raise ValueError(f"the image was taken for another model than {name}: take it again")
    if not unknown.any():
        raise ValueError("nothing is marked: paint over what is to be drawn anew")
    if resamplings < 1:
        raise ValueError(f"{resamplings} resamplings: at least 1")
    base = loaded.sampling.for_inpainting()
    wanted = replace(wanted, sampler=base.sampler)
    settings = wanted.settings(base)
    model = loaded.trained.model
    if wanted.label == IN_TURN:
        labels = labels_by_default(model, wanted.num)
    else:
        labels = _labels(models, name, wanted)
    settings = without_useless_guidance(settings, model, labels)
    evaluations = _evaluations(wanted, settings, limits, resamplings)
    drawn = Drawing(models, name, settings, wanted.seed, wanted.num, labels, evaluations)
    return replace(drawn, picture=picture, unknown=unknown, resamplings=resamplings)


def _evaluations(wanted: Wanted, settings: Sampling, limits: Limits, times: int = 1) -> int:
    """Evaluations of the denoiser for each image. Raises ValueError where all are too many."""
    refuse_seed(wanted.seed)
    evaluations = wanted.steps * SAMPLERS[settings.sampler].evaluations * times
    is_guided = settings.guidance.kind != "none"  # which costs a second evaluation
    limits.refuse_drawing(wanted.num, wanted.steps, evaluations * (1 + is_guided))
    return evaluations


def _labels(models: Models, name: str, wanted: Wanted) -> Tensor | None:
    if wanted.label == IN_TURN:
        return None
    return torch.full((wanted.num,), models.class_of(name, wanted.label))

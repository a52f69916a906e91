"""Inpainting: known pixels are kept, the others are drawn to fit them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from maskdm.images.decode import upright
from maskdm.images.prepare import prepare_image, read_picture
from maskdm.models.build import Backbone
from maskdm.models.trained import TrainedModel
from maskdm.recipe import Data, Sampling
from maskdm.sampling.generate import Look, generate_on_all_ranks
from maskdm.sampling.samplers import Denoise, on_levels
from maskdm.settings import changed
from maskdm.tokens import patchify


def inpaint(
    trained: TrainedModel,
    settings: Sampling,
    image: np.ndarray,
    unknown: np.ndarray,
    num: int,
    seed: int = 0,
    resamplings: int = 10,
    jump: int = 5,
    labels: Tensor | None = None,
    weak: TrainedModel | None = None,
    progress: bool = False,
    look: Look | None = None,
) -> np.ndarray:
    """Draws the unknown pixels of an image, num times, given the known ones.

    Args:
        trained: any model; no training for inpainting is needed.
        settings: steps, spacing, guidance, clipping; the solver is always RePaint's.
        image: uint8 (H, W, C) of the model's size; what it holds at unknown pixels is not used.
        unknown: bool (H, W), True where pixels are to be drawn.
        num: pictures to draw.
        seed: names the sequence of pictures.
        resamplings, jump: see `repaint`.
        labels, weak, progress, look: as for `generate`.

    Returns:
        uint8 (num, H, W, C), at known pixels equal to the image.

    Raises:
        ValueError: image or mask are not of the model's size, or there is nothing to draw.
    """
    shape = trained.model.image_shape
    if image.shape != shape or unknown.shape != shape[:2]:
        raise ValueError(
            f"the model's images are {shape}, but the image is {image.shape} and the mask is "
            f"{unknown.shape}"
        )
    if not unknown.any():
        raise ValueError("the mask leaves nothing to draw: mark pixels to draw in white")
    device = next(trained.model.parameters()).device
    x0 = torch.tensor(image, device=device).float() / 127.5 - 1
    known = torch.tensor(~unknown, device=device)[..., None].expand(shape)
    patch_size = trained.model.patch_size
    x0, keep = (patchify(pixels[None], patch_size) for pixels in (x0, known))  # (1, N, P) each

    def solve(
        denoise: Denoise, noise: Tensor, levels: Tensor, generators: list[Generator]
    ) -> Tensor:
        return repaint(denoise, noise, levels, generators, x0, keep, resamplings, jump)

    images = generate_on_all_ranks(
        trained, settings, num, seed, labels, weak, progress=progress, solve=solve, look=look
    )
    return np.where(unknown[..., None], images, image)


def repaint(
    denoise: Denoise,
    noise: Tensor,
    levels: Tensor,
    generators: list[Generator],
    x0: Tensor,
    keep: Tensor,
    resamplings: int,
    jump: int,
) -> Tensor:
    """Ancestral sampling with known values put in at each level (Lugmayr et al. 2022, Algorithm 1).

    Every `jump` steps are taken `resamplings` times, with noise added in between to go back, so
    that drawn and known parts come to fit: as many times the evaluations.

    Args:
        denoise: the clean image at x_t and a log-SNR.
        noise: standard normal, float (B, N, P).
        levels: log-SNR at which it is evaluated, rising, float64 (steps,).
        generators: one per image.
        x0: the known image, float (1, N, P); values where `keep` is False have no effect.
        keep: bool (1, N, P), True where it is known.
        resamplings: times that each stretch of steps is taken, at least 1.
        jump: steps in a stretch, at least 1.

    Returns:
        Clean patches, float (B, N, P), equal to x0 where kept.

    Raises:
        ValueError: resamplings or jump below 1.
    """
    if resamplings < 1 or jump < 1:
        raise ValueError(f"resamplings {resamplings} and jump {jump} must be at least 1")
    scheduler = on_levels(DDPMScheduler, levels, clip_sample=False)
    power = [*levels.sigmoid().tolist(), 1.0]  # alpha^2 at each level, and of the clean image

    def renoised(x: Tensor, before: float, after: float) -> Tensor:
        """From a level of power `before` to a noisier one, by the forward process."""
        ratio = after / before
        fresh = randn_tensor(noise.shape, generators, noise.device, noise.dtype)
        return math.sqrt(ratio) * x + math.sqrt(1 - ratio) * fresh

    num, x = len(levels), noise
    for start in range(0, num, jump):
        end = min(start + jump, num)
        for turn in range(resamplings):
            for i in range(start, end):
                answer = denoise(x, levels[i].item())
                x = scheduler.step(answer, num - 1 - i, x, generator=generators).prev_sample
                x = torch.where(keep, renoised(x0, 1.0, power[i + 1]), x)
            if turn < resamplings - 1:
                x = renoised(x, power[end], power[start])
    return x


def labels_by_default(model: Backbone, num: int) -> Tensor | None:
    """Classes of results by default: no class, where the model knows that, int64 (num,).

    None stands for what `generate` takes then: all classes in turn, or a model without.
    """
    config = model.config
    if config.num_classes and config.label_dropout:
        return torch.full((num,), config.num_classes)
    return None


def without_useless_guidance(
    settings: Sampling, model: Backbone, labels: Tensor | None
) -> Sampling:
    """The settings without guidance by classes where no result has one: it would change nothing."""
    no_class = labels is not None and bool((labels == model.config.num_classes).all())
    if settings.guidance.kind != "classifier-free" or not no_class:
        return settings
    return changed(settings, guidance={"kind": "none"})


def with_hole(image: np.ndarray, unknown: np.ndarray) -> np.ndarray:
    """The image with opaque mid-grey where it is unknown, to be looked at: uint8 (H, W, C)."""
    opaque = [255] if image.shape[-1] in (2, 4) else []
    grey = np.array([128] * (image.shape[-1] - len(opaque)) + opaque, np.uint8)
    return np.where(unknown[..., None], grey, image)


def read_image_and_mask(image: Path, mask: Path, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """An image prepared as settings say, and its unknown pixels: the mask's light ones.

    Transparent parts of the mask count as black.

    Returns:
        uint8 (H, W, C); bool (H, W), cut and resized like the image.

    Raises:
        ValueError: a file that is not a picture, or a mask of another shape than the image's.
    """
    pictures = [upright(read_picture(path)) for path in (image, mask)]
    if pictures[0].size != pictures[1].size:
        sizes = ["x".join(map(str, picture.size)) for picture in pictures]
        raise ValueError(
            f"the mask is {sizes[1]} pixels, but the image {sizes[0]}: make them equal"
        )
    grey = changed(data, channels=1, background="black")
    return prepare_image(pictures[0], data), prepare_image(pictures[1], grey)[..., 0] >= 128

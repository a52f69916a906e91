"""How sampling keeps a device busy: images at a time, and a compiled network."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size

from maskdm.engine import autocast
from maskdm.models.build import Backbone
from maskdm.models.compiling import CompiledForward, NotCompiled
from maskdm.models.trained import TrainedModel
from maskdm.recipe import Sampling
from maskdm.sampling.denoise import x0_denoiser

TOKENS_ON_CPU = 2048  # within its caches, MaskDM-S is fastest so
TOKENS_ON_GPU = 65_536  # longer matrix products are not faster
MOST_AT_A_TIME = 1024  # of tiny images
COMPILE_FROM_FLOPS = 1e17  # minutes of a GPU; less is over before compiling has paid

T = TypeVar("T")


def images_at_a_time(model: Backbone, settings: Sampling) -> int:
    """How many images to draw at a time: as the settings say, or as keeps the device busy."""
    if settings.batch_size != "auto":
        return settings.batch_size
    tokens = TOKENS_ON_CPU if model.device.type == "cpu" else TOKENS_ON_GPU
    return min(max(1, tokens // model.num_patches), MOST_AT_A_TIME)


def in_parts(num: int, size: int, draw: Callable[[slice], T], shrink: bool) -> list[T]:
    """Draws `num` images part by part.

    Args:
        num: images.
        size: of a part, at most.
        draw: draws a part.
        shrink: halve the parts where memory runs out.

    Raises:
        RuntimeError: they don't fit in the device's memory.
    """
    done, start = [], 0
    while start < num:
        try:
            done.append(draw(slice(start, min(start + size, num))))
            start += size
            continue
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if not shrink or size == 1:
                raise RuntimeError(
                    f"{size} images at a time don't fit in the device's memory"
                    + ("" if shrink else ": use batch_size auto, or fewer")
                ) from error
        size = max(1, size // 2)
        gc.collect()  # here the error, which holds the tensors of its frames, is gone
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return done


def sampling_flops(model: Backbone, settings: Sampling, num: int, num_visible: int) -> int:
    """Floating-point operations of a network's forward passes in drawing `num` images.

    Args:
        model: the network.
        settings: sampler, steps, guidance.
        num: images.
        num_visible: patches of an image that are drawn.
    """
    evaluations = settings.steps * (2 if settings.sampler == "heun" else 1)
    if settings.guidance == "classifier-free":
        evaluations *= 2
    return num * evaluations * model.forward_flops(num_visible)


def compile_for_sampling(
    trained: TrainedModel, settings: Sampling, num: int, num_visible: int
) -> None:
    """Compiles a network for the batches of `generate`, where the settings want it and it pays.

    Smaller batches run as written. A network that can't be compiled does, with a warning.

    Args:
        trained: the model, on the device to use.
        settings: as for `generate`.
        num: images that will be drawn on this device, perhaps in several calls.
        num_visible: patches of an image that are drawn.
    """
    model, device = trained.model, trained.model.device
    size = images_at_a_time(model, settings)
    if isinstance(model.forward, CompiledForward) or num < size or settings.compile == "off":
        return
    if settings.compile == "auto" and (
        device.type == "cpu"
        or sampling_flops(model, settings, num, num_visible) < COMPILE_FROM_FLOPS
    ):
        return
    noise = torch.zeros(size, num_visible, model.patch_size**2 * model.image_shape[2]).to(device)
    positions = torch.arange(num_visible, device=device).repeat(size, 1)
    has_classes = model.config.num_classes > 0
    labels = torch.zeros(size, dtype=torch.int64, device=device) if has_classes else None
    denoise = x0_denoiser(trained, positions, labels)

    @torch.no_grad()
    def attempt() -> None:
        with autocast(device):
            denoise(noise, 0.0)

    try:
        CompiledForward(model).compile(noise.shape, attempt)
    except NotCompiled as error:
        warnings.warn(f"not compiled, runs as written: {error}", stacklevel=2)

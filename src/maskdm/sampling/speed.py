"""How sampling keeps a device busy: images at a time, and a compiled network."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

from maskdm.engine import autocast, device_of
from maskdm.families import BACKBONES, GUIDANCE, SAMPLERS
from maskdm.models.build import Backbone
from maskdm.models.compiling import CompiledForward, NotCompiled
from maskdm.models.trained import TrainedModel
from maskdm.recipe import Sampling
from maskdm.sampling.denoise import x0_denoiser

TOKENS_ON_CPU = 2048  # within its caches: MaskDM-S was fastest so
TOKENS_ON_GPU = 65_536  # rows of its matrix products; an estimate
MOST_AT_A_TIME = 1024  # of tiny images
LEAST_CALLS = 3  # of a measurement
COMPILE_FROM_FLOPS = 1e17  # minutes of a GPU; less is over before compiling has paid

T = TypeVar("T")

_fitting: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # where more did not


def images_at_a_time(model: Backbone, settings: Sampling) -> int:
    """How many images to draw at a time: as the settings say, or as keeps the device busy."""
    if settings.batch_size != "auto":
        return settings.batch_size
    # So many rows of its matrix products keep a device busy, at any size of an image.
    tokens = model.num_patches
    if pixels_per_token := BACKBONES[model.kind].pixels_per_token:  # it computes on pixels
        height, width, _ = model.image_shape
        tokens = height * width // pixels_per_token
    on_cpu = device_of(model).type == "cpu"
    size = (TOKENS_ON_CPU if on_cpu else TOKENS_ON_GPU) // max(tokens, 1)
    return min(max(1, size), MOST_AT_A_TIME, _fitting.get(model, MOST_AT_A_TIME))


def in_parts(
    model: Backbone, settings: Sampling, num: int, compute: Callable[[slice], T]
) -> list[T]:
    """Computes `num` images part by part; with batch_size auto in smaller ones if memory runs out.

    Args:
        model: what computes.
        settings: the batch size.
        num: images.
        compute: what is wanted of a part.

    Raises:
        RuntimeError: so many images at a time don't fit in the device's memory.
    """
    done, start = [], 0
    # The size is read anew for each part: it is halved, and remembered for the model, wherever
    # memory runs out.
    while start < num:
        size = min(images_at_a_time(model, settings), num - start)
        try:
            done.append(compute(slice(start, start + size)))
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if settings.batch_size != "auto":
                raise RuntimeError(
                    f"batch_size {size} does not fit in the device's memory: use auto, or less"
                ) from error
            if size == 1:
                raise RuntimeError("not even one image fits in the device's memory") from error
            _fitting[model] = size // 2
        else:
            start += size
            continue
        clear_device_cache(garbage_collection=True)  # the error, which holds tensors, is gone
    return done


def is_worth_compiling(model: Backbone, settings: Sampling, num: int, num_visible: int) -> bool:
    """Whether to compile a network before it draws.

    Args:
        model: the network.
        settings: `compile`; sampler, steps, guidance.
        num: images to draw.
        num_visible: patches of each.
    """
    if settings.compile != "auto":
        return settings.compile == "on"
    if next(model.parameters()).device.type != "cuda":
        return False
    evaluations = settings.steps * SAMPLERS[settings.sampler].evaluations
    evaluations *= GUIDANCE[settings.guidance.kind].evaluations
    return num * evaluations * model.forward_flops(num_visible) >= COMPILE_FROM_FLOPS


def compile_for_sampling(
    trained: TrainedModel,
    settings: Sampling,
    weak: TrainedModel | None,
    num: int,
    num_visible: int,
) -> None:
    """Compiles networks for the batches of `generate`, if the settings want it; once is enough.

    Smaller batches run eagerly. So does what cannot be compiled, with a warning.

    Args:
        trained, settings, weak: as for `generate`.
        num: images that will be drawn on this device, perhaps in several calls.
        num_visible: patches of an image that are drawn.
    """
    _compile(trained, settings, num, num_visible)
    if weak is not None and GUIDANCE[settings.guidance.kind].needs_model:
        _compile(weak, settings, num, num_visible)


def _compile(trained: TrainedModel, settings: Sampling, num: int, num_visible: int) -> None:
    model = trained.model
    forward = model.forward if isinstance(model.forward, CompiledForward) else None
    if settings.compile == "off" and forward is not None:
        forward.run_eagerly()
    if not is_worth_compiling(model, settings, num, num_visible):
        return
    device = next(model.parameters()).device
    values = model.patch_size**2 * model.image_shape[2]

    @torch.no_grad()
    def attempt(part: slice) -> None:
        noise = torch.zeros(part.stop - part.start, num_visible, values, device=device)
        positions = torch.arange(num_visible, device=device).repeat(len(noise), 1)
        labels = None
        if model.config.num_classes:
            labels = torch.zeros(len(noise), dtype=torch.int64, device=device)
        with autocast(device):
            x0_denoiser(trained, positions, labels)(noise, 0.0)

    size = images_at_a_time(model, settings)
    if num < size or (forward is not None and forward.shape == (size, num_visible, values)):
        return
    if forward is None:
        forward = CompiledForward(model)
    forward.run_eagerly()
    in_parts(model, settings, size, attempt)  # finds what fits
    size = images_at_a_time(model, settings)
    try:
        forward.compile((size, num_visible, values), lambda: attempt(slice(0, size)))
    except NotCompiled as error:
        warnings.warn(f"not compiled, runs eagerly: {error}", stacklevel=2)


def seconds_of_sampling(
    trained: TrainedModel, settings: Sampling, num: int, weak: TrainedModel | None = None
) -> float:
    """Seconds that drawing images takes on the model's device: measured for an instant."""
    evaluations = settings.steps * SAMPLERS[settings.sampler].evaluations
    seconds = seconds_of_answer(trained.model, settings, num, least_sec=0.2)
    each = seconds * GUIDANCE[settings.guidance.kind].evaluations
    if weak is not None and GUIDANCE[settings.guidance.kind].needs_model:
        each += seconds_of_answer(weak.model, settings, num, least_sec=0.2)
    return num * evaluations * each


@torch.no_grad()
def seconds_of_answer(
    model: Backbone, settings: Sampling, most: int = MOST_AT_A_TIME, least_sec: float = 1.0
) -> float:
    """Seconds of a network evaluation for one of `most` whole images, on the model's device."""
    device = next(model.parameters()).device
    values = model.patch_size**2 * model.image_shape[2]

    def evaluate(num: int) -> None:
        patches = torch.zeros(num, model.num_patches, values, device=device)
        positions = torch.arange(model.num_patches, device=device).repeat(num, 1)
        labels = torch.zeros(num, dtype=torch.int64, device=device) if model.num_classes else None
        with autocast(device):
            model(patches, positions, torch.full((num,), 0.5, device=device), labels)

    num = min(images_at_a_time(model, settings), most)
    if device.type != "cpu":  # whose memory may hold fewer: this finds how many
        in_parts(model, settings, num, lambda part: evaluate(part.stop - part.start))
        num = min(images_at_a_time(model, settings), most)
    return seconds_of_call(lambda number: evaluate(num), device, least_sec) / num


def seconds_of_call(
    run: Callable[[int], object],
    device: torch.device,
    least_sec: float,
    agreed: Callable[[int], int] = lambda num: num,
) -> float:
    """Mean seconds of `run(i)`, over about so many seconds and three calls, or a few seconds.

    Args:
        run: its first call does not count; the second says how many there are.
        device: where its work is done.
        least_sec: seconds.
        agreed: makes this number the same on all ranks, where `run` waits for the others: by their
            own clocks some would end a call earlier than others, who would wait for ever.
    """

    def wait() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    run(0)
    start = wait()
    run(1)
    first = wait() - start
    num = max(LEAST_CALLS, math.ceil(least_sec / first))
    num = agreed(max(1, min(num, int(4 * least_sec / first))))
    for i in range(1, num):
        run(i + 1)
    return (wait() - start) / num

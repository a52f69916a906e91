"""Images from a trained model: image i depends on (seed, i), not on batches or devices."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from accelerate.utils import gather
from diffusers import DDIMScheduler
from torch import Generator, Tensor
from tqdm import tqdm

from maskdm.engine import choose_precision, process_state
from maskdm.models.uvit import UViT
from maskdm.recipe import Sampling
from maskdm.sampling.samplers import SAMPLERS, model_denoise
from maskdm.seeds import derive_seed
from maskdm.tokens import patchify, unpatchify


@torch.no_grad()
def generate(
    model: UViT,
    scheduler: DDIMScheduler,
    settings: Sampling,
    indices: list[int],
    seed: int = 0,
    labels: Tensor | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Draws the images with the given numbers.

    Image i is a function of (model, settings, seed, i, its label) up to the rounding of matrix
    products, whose order may differ between batch sizes and devices.

    Args:
        model: the denoiser, on the device to use.
        scheduler: made by `make_scheduler`, or loaded with the model.
        settings: sampler, steps, eta, clipping, batch size.
        indices: image numbers, n of them.
        seed: names the sequence of images.
        labels: classes, int64 (n,); None = image i gets class i modulo the number of classes.
        progress: show a bar.

    Returns:
        uint8 (n, H, W, C).
    """
    if labels is None and (in_turn := default_labels(model, indices)) is not None:
        labels = torch.from_numpy(in_turn)
    size, channels = model.config.image_size, model.config.channels
    device = model.device
    done = [np.empty((0, size, size, channels), np.uint8)]
    with tqdm(total=len(indices), desc="sampling", unit="img", disable=not progress) as bar:
        for start in range(0, len(indices), settings.batch_size):
            part = slice(start, start + settings.batch_size)
            noise = initial_noise(seed, indices[part], (size, size, channels))
            generators = [
                Generator().manual_seed(derive_seed(seed, "sampler", index))
                for index in indices[part]
            ]
            patches = patchify(noise.to(device), model.patch_size)  # (B, N, P)
            positions = torch.arange(model.num_patches, device=device).expand(len(patches), -1)
            part_labels = None if labels is None else labels[part].to(device)
            denoise = model_denoise(model, positions, part_labels)
            with _autocast(device):
                x = SAMPLERS[settings.sampler](denoise, patches, scheduler, settings, generators)
            done.append(to_uint8(unpatchify(x, model.patch_size, model.grid)).cpu().numpy())
            bar.update(len(patches))
    return np.concatenate(done)


def initial_noise(seed: int, indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise of images by number: float32 (n, *shape).

    numpy's Philox takes the whole seed; torch's CPU generator only its low 32 bits, by which two
    of 50,000 images would begin from the same noise in one seed out of four.
    """
    noise = [
        np.random.Generator(np.random.Philox(derive_seed(seed, "sample", index))).standard_normal(
            shape, dtype=np.float32
        )
        for index in indices
    ]
    return torch.from_numpy(np.stack(noise))


def generate_on_all_ranks(
    model: UViT,
    scheduler: DDIMScheduler,
    settings: Sampling,
    num: int,
    seed: int = 0,
    progress: bool = False,
) -> np.ndarray:
    """Draws images 0..num-1, each rank its share; every rank gets all: uint8 (num, H, W, C).

    To be called on every rank of a distributed run; with one process it is `generate`.
    """
    state = process_state()
    share = math.ceil(num / state.num_processes)
    start = state.process_index * share
    indices = list(range(start, start + share))  # the last rank may draw a few too many
    images = generate(
        model, scheduler, settings, indices, seed, progress=progress and state.is_main_process
    )
    if state.num_processes == 1:
        return images
    return gather(torch.from_numpy(images).to(state.device)).cpu().numpy()[:num]


def default_labels(model: UViT, indices: Sequence[int]) -> np.ndarray | None:
    """Classes of images where none were asked for, all in turn: int64 (n,), or None."""
    num_classes = model.config.num_classes
    return np.asarray(indices, dtype=np.int64) % num_classes if num_classes else None


def to_uint8(images: Tensor) -> Tensor:
    """Pixels from [-1, 1] to 0..255, rounded and clipped, uint8 of the same shape."""
    return ((images + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


def _autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """bf16 where the hardware is good at it; the solver's own arithmetic stays in fp32."""
    if choose_precision("auto", device)[0] == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()

"""Images from a trained model: image i depends on (seed, i), not on batches or devices."""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor
from tqdm import tqdm

from maskdm.engine import autocast, device_of, on_all_ranks, process_state
from maskdm.families import SAMPLERS
from maskdm.models.build import Backbone
from maskdm.models.trained import TrainedModel
from maskdm.recipe import Sampling
from maskdm.sampling.denoise import clipped
from maskdm.sampling.guidance import Wanted, guided, refuse_guidance
from maskdm.sampling.samplers import Denoise, refuse_settings, sampling_levels
from maskdm.sampling.speed import compile_for_sampling, in_parts
from maskdm.seeds import derive_seed, image_generator
from maskdm.tokens import gather_patches, patchify, scatter_patches, unpatchify

Solve = Callable[[Denoise, Tensor, Tensor, list[Generator]], Tensor]
"""Noise (B, V, P) to patches (B, V, P), given the denoiser, log-SNR levels, image generators."""

Look = Callable[[list[int], Tensor, Tensor], None]
"""Sees images at each evaluation of the network: their numbers, x_t scaled as for `Denoise`,
and the estimate of the clean image, both float32 (B, H, W, C). What it raises ends the drawing."""


class Randomness(ABC):
    """Where the random numbers of images come from."""

    @abstractmethod
    def noise(self, indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        """Standard normal noise of the images with these numbers: float32 (n, *shape)."""

    @abstractmethod
    def generators(self, stream: str, indices: Sequence[int]) -> list[Generator]:
        """What draws all else for them, one for each image; `stream` says what for."""

    @contextlib.contextmanager
    def undone_if_it_fails(self) -> Iterator[None]:
        """For drawing a part of the images: what fails has used up no random numbers."""
        yield


@dataclass(frozen=True)
class OfSeed(Randomness):
    """Numbers that depend on the seed and the image's number alone, the same on every device."""

    seed: int

    def noise(self, indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        return initial_noise(self.seed, indices, shape)

    def generators(self, stream: str, indices: Sequence[int]) -> list[Generator]:
        return [image_generator(self.seed, stream, index) for index in indices]


@dataclass(frozen=True)
class Given(Randomness):
    """Noise and generators that a caller gives for images 0, 1, ..."""

    all_noise: Tensor
    all_generators: list[Generator]

    def noise(self, indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        return self.all_noise[list(indices)]

    def generators(self, stream: str, indices: Sequence[int]) -> list[Generator]:
        return [self.all_generators[index] for index in indices]

    @contextlib.contextmanager
    def undone_if_it_fails(self) -> Iterator[None]:
        states = [one.get_state() for one in self.all_generators]
        try:
            yield
        except BaseException:
            for one, state in zip(self.all_generators, states, strict=True):
                one.set_state(state)
            raise


def to_uint8(images: Tensor) -> Tensor:
    """Pixels from [-1, 1] to 0..255, rounded and clipped, uint8 of the same shape."""
    return ((images + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


@torch.no_grad()
def generate(
    trained: TrainedModel,
    settings: Sampling,
    indices: list[int],
    seed: int | Randomness = 0,
    labels: Tensor | None = None,
    weak: TrainedModel | None = None,
    visible: Tensor | None = None,
    progress: bool = False,
    solve: Solve | None = None,
    finish: Callable[[Tensor], Tensor] = to_uint8,
    look: Look | None = None,
) -> np.ndarray:
    """Draws the images with the given numbers.

    Image i is a function of (model, settings, seed, i, its label) up to the rounding of matrix
    products, whose order may differ between batch sizes and devices.

    Args:
        trained: the model, on the device to use.
        settings: sampler, steps, guidance, clipping, batch size, compiling.
        indices: image numbers, n of them.
        seed: names the sequence of images; or where other random numbers come from.
        labels: classes, int64 (n,), num_classes = no class; None = image i gets class i modulo
            the number of classes.
        weak: the weak model of autoguidance.
        visible: indices of the patches to draw, int64 (n, V): a sample of the marginal that they
            select (Section 3.1). The others are mid-grey, and half transparent where there is
            alpha. None = all.
        progress: show a bar.
        solve: what turns noise into patches; None = the sampler of the settings.
        finish: what becomes of images in [-1, 1], float32 (B, H, W, C).
        look: sees the images while they are drawn.

    Returns:
        uint8 (n, H, W, C), or as `finish` makes it.

    Raises:
        ValueError: guidance that is not available for the model, labels that it does not know, or
            steps that the sampler cannot take on its schedule.
        RuntimeError: so many images at a time do not fit in the device's memory.
    """
    model = trained.model
    if labels is None and (in_turn := default_labels(model, indices)) is not None:
        labels = torch.from_numpy(in_turn)
    _refuse_labels(model, labels)
    shape = model.image_shape
    device, dtype = device_of(model), next(model.parameters()).dtype
    randomness = seed if isinstance(seed, Randomness) else OfSeed(int(seed))
    refuse_settings(trained.schedule, settings)
    refuse_guidance(trained, settings.guidance, weak)
    levels = sampling_levels(trained.schedule, settings)

    @randomness.undone_if_it_fails()  # where memory runs out, a smaller part is drawn again
    def draw(part: slice) -> np.ndarray:
        # Everything random belongs to an image's number, nothing to the batch: so any batch size
        # and any number of devices draw the same images.
        noise = patchify(randomness.noise(indices[part], shape), model.patch_size).to(device)
        if visible is None:
            positions = torch.arange(model.num_patches, device=device).repeat(len(noise), 1)
        else:
            positions = visible[part].to(device).contiguous()
            noise = gather_patches(noise, positions)  # (B, V, P)
        # Guidance first, clipping after it: guided answers are those that leave [-1, 1].
        classes = None if labels is None else labels[part].to(device)
        dealing = randomness.generators("sparse", indices[part])
        wanted = Wanted(trained, positions, classes, settings.guidance, weak, dealing)
        denoise = guided(wanted)
        if settings.clip_x0:
            denoise = clipped(denoise)
        whole = functools.partial(_as_images, model, None if visible is None else positions)
        if look is not None:
            denoise = _seen(denoise, whole, functools.partial(look, indices[part]))
        own = randomness.generators("sampler", indices[part])
        # The solver's arithmetic stays in fp32: only the network's products are autocast.
        with autocast(device, dtype):
            if solve is not None:
                x = solve(denoise, noise, levels, own)
            else:
                x = SAMPLERS[settings.sampler].run(denoise, noise, levels, settings, own)
        bar.update(len(x))
        return finish(whole(x)).cpu().numpy()

    num_visible = model.num_patches if visible is None else visible.shape[1]
    compile_for_sampling(trained, settings, weak, len(indices), num_visible)
    num, off = len(indices), not progress
    with tqdm(total=num, desc="sampling", unit="img", leave=False, disable=off) as bar:
        parts = in_parts(model, settings, len(indices), draw)
    return np.concatenate(parts) if parts else np.empty((0, *shape), np.uint8)


def _as_images(model: Backbone, positions: Tensor | None, patches: Tensor) -> Tensor:
    """Patches (B, V, P) at positions (B, V), None = all, as images (B, H, W, C), else mid-grey."""
    if positions is not None:
        patches = scatter_patches(patches, positions, model.num_patches)
    return unpatchify(patches, model.patch_size, model.grid)


def _seen(
    denoise: Denoise, whole: Callable[[Tensor], Tensor], see: Callable[[Tensor, Tensor], None]
) -> Denoise:
    """A denoiser that shows what it is given and what it answers, as whole images."""

    def answer(x: Tensor, log_snr: float) -> Tensor:
        x0 = denoise(x, log_snr)
        see(whole(x), whole(x0))
        return x0

    return answer


def initial_noise(seed: int, indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise of images by number: float32 (n, *shape).

    Drawn by numpy's Philox, which takes the whole seed, on the CPU: a device's own generator would
    give other images on another kind of device.
    """
    noise = [
        np.random.Generator(np.random.Philox(derive_seed(seed, "sample", index))).standard_normal(
            shape, dtype=np.float32
        )
        for index in indices
    ]
    return torch.from_numpy(np.stack(noise))


def generate_on_all_ranks(
    trained: TrainedModel,
    settings: Sampling,
    num: int,
    seed: int = 0,
    labels: Tensor | None = None,
    weak: TrainedModel | None = None,
    visible: Tensor | None = None,
    progress: bool = False,
    solve: Solve | None = None,
    look: Look | None = None,
) -> np.ndarray:
    """Draws images 0..num-1, each rank its share; every rank gets all: uint8 (num, H, W, C).

    To be called on every rank of a distributed run; with one process it is `generate`, whose
    arguments it takes.
    """

    def draw(indices: list[int]) -> Tensor:
        images = generate(
            trained,
            settings,
            indices,
            seed,
            None if labels is None else labels[indices],
            weak,
            None if visible is None else visible[indices],
            progress and process_state().is_main_process,
            solve,
            look=look,
        )
        return torch.from_numpy(images)

    return on_all_ranks(num, draw).cpu().numpy()


def default_labels(model: Backbone, indices: Sequence[int]) -> np.ndarray | None:
    """Classes of images by default, all in turn: int64 (n,); None for a model without."""
    num_classes = model.config.num_classes
    return np.asarray(indices, dtype=np.int64) % num_classes if num_classes else None


def labels_in_shares(counts: Sequence[int], indices: Sequence[int], seed: int) -> Tensor:
    """Classes of images, as frequent as in data with so many images of each: int64 (n,).

    Image i's class depends on the seed and i alone. Along a golden ratio's sequence the first n,
    whatever n, are nearly as near to the shares as n can be.

    Args:
        counts: images of each class.
        indices: image numbers.
        seed: names the sequence of images.
    """
    start, golden = np.random.default_rng(derive_seed(seed, "classes")).random(), (5**0.5 - 1) / 2
    places = (start + golden * np.asarray(indices, dtype=np.float64)) % 1
    ends = np.cumsum(counts, dtype=np.float64)
    return torch.from_numpy(np.searchsorted(ends, places * ends[-1], side="right"))


def _refuse_labels(model: Backbone, labels: Tensor | None) -> None:
    config = model.config
    if labels is None:
        return
    if not config.num_classes:
        raise ValueError("this model has no classes: it takes no labels")
    most = config.num_classes - (0 if config.label_dropout else 1)
    if labels.min() < 0 or labels.max() > most:
        none = f" ({config.num_classes} = none)" if config.label_dropout else ""
        raise ValueError(
            f"labels are {labels.min()} to {labels.max()}, but this model's classes are 0 to "
            f"{config.num_classes - 1}{none}"
        )

"""Guidance: away from what a weaker denoiser would draw. A function round the denoiser.

All kinds are weak + scale (strong - weak), in the clean image (which for a given x_t is the same
as in the noise or the velocity). They differ in the weak denoiser:

    classifier-free   the same model without a class (Ho & Salimans 2022, Eq. 6)
    autoguidance      a smaller or less trained model (Karras et al. 2024, Eq. 3): here by
                      default the run's own primer, from before its last stage
    sparse            the same model, which sees only a part of the patches at a time
                      (Krause et al. 2026): it was pre-trained so
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from maskdm.families import GUIDANCE
from maskdm.models.build import Backbone
from maskdm.models.trained import TrainedModel
from maskdm.recipe import Guidance
from maskdm.sampling.denoise import sparse_denoiser, x0_denoiser
from maskdm.sampling.samplers import Denoise
from maskdm.words import listed


class Wanted(NamedTuple):
    """What a weak denoiser is made from.

    Attributes:
        trained: the strong model.
        positions: patches that are drawn, int64 (B, V).
        labels: classes, int64 (B,), or None.
        guidance: its settings.
        weak: the weak model of autoguidance, or None.
        generators: one per image.
    """

    trained: TrainedModel
    positions: Tensor
    labels: Tensor | None
    guidance: Guidance
    weak: TrainedModel | None
    generators: list[Generator]


def guided(wanted: Wanted) -> Denoise:
    """The denoiser of a trained model with guidance (Kynkaanniemi et al. 2024: in an interval).

    Raises:
        ValueError: the model has no "no class", or autoguidance has no weak model, or one
            of another image size or patch size or with other classes.
    """
    trained, guidance = wanted.trained, wanted.guidance
    strong = x0_denoiser(trained, wanted.positions, wanted.labels)
    make_weak = GUIDANCE[guidance.kind].weak
    if make_weak is None:
        return strong
    refuse_guidance(trained, guidance, wanted.weak)
    weak = make_weak(wanted)
    ends = torch.tensor([guidance.end, guidance.start], dtype=torch.float64)
    low, high = trained.schedule.log_snr(ends).tolist()

    def denoise(x: Tensor, log_snr: float) -> Tensor:
        x0 = strong(x, log_snr)
        if not low - 1e-6 <= log_snr <= high + 1e-6:
            return x0  # outside of the interval only the strong model is evaluated: half the cost
        weak_x0: Tensor = weak(x, log_snr)
        return weak_x0 + guidance.scale * (x0 - weak_x0)

    return denoise


def refuse_guidance(trained: TrainedModel, guidance: Guidance, weak: TrainedModel | None) -> None:
    """Raises ValueError where a model cannot be guided as the settings say."""
    refuse = GUIDANCE[guidance.kind].refuse
    if refuse is not None:
        refuse(trained, weak)


def without_class(wanted: Wanted) -> Denoise:
    """The model itself, given "no class"."""
    null = no_class(wanted.trained.model, len(wanted.positions)).to(wanted.positions.device)
    return x0_denoiser(wanted.trained, wanted.positions, null)


def by_weak_model(wanted: Wanted) -> Denoise:
    """Another model, for the same images."""
    assert wanted.weak is not None  # else it was refused
    return x0_denoiser(wanted.weak, wanted.positions, wanted.labels)


def sparse(wanted: Wanted) -> Denoise:
    """The model itself, which sees a part of the patches at a time."""
    trained, positions, labels, guidance, _, generators = wanted
    return sparse_denoiser(trained, positions, labels, guidance.rate, generators)


def refuse_without_class(trained: TrainedModel, weak: TrainedModel | None) -> None:
    """Raises ValueError where the model was not trained on images of no class."""
    no_class(trained.model, 0)


def no_class(model: Backbone, num: int) -> Tensor:
    """Labels that say "no class": int64 (num,). Raises ValueError where the model knows none."""
    config = model.config
    if not config.num_classes or not config.label_dropout:
        what = "has no classes" if not config.num_classes else "was not trained without classes"
        raise ValueError(
            f"classifier-free guidance is not available, since the model {what}: train one with "
            "num_classes and label_dropout above 0, or use autoguidance or sparse"
        )
    return torch.full((num,), config.num_classes)


def refuse_weak(trained: TrainedModel, weak: TrainedModel | None) -> None:
    """Raises ValueError where a model cannot guide another."""
    if weak is None:
        raise ValueError("autoguidance needs a weak model: name one with guidance.weak")
    strong, other = trained.model, weak.model
    traits = {
        "image_shape": (strong.image_shape, other.image_shape),
        "patch_size": (strong.patch_size, other.patch_size),
        "num_classes": (strong.config.num_classes, other.config.num_classes),
    }
    for name, (strong_value, weak_value) in traits.items():
        if strong_value != weak_value:
            raise ValueError(
                f"the weak model has {name} {weak_value}, the guided one {strong_value}: they "
                "must be equal"
            )
    names, weak_names = strong.config.class_names, other.config.class_names
    if names and weak_names and names != weak_names:
        raise ValueError(
            f"the weak model's classes are {listed(weak_names)}, the guided one's "
            f"{listed(names)}: they must be equal"
        )
    config = trained.model.config
    if config.num_classes and config.label_dropout and not weak.model.config.label_dropout:
        raise ValueError("the weak model was not trained without classes, the guided one was")

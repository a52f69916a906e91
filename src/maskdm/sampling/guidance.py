"""Guidance: away from what a weaker denoiser would draw. A function round the denoiser.

All kinds are weak + scale (strong - weak), in the clean image (which for a given x_t is the same
as in the noise or the velocity). They differ in who is weak:

    classifier-free   the same model, told no class (Ho & Salimans 2022, Eq. 6)
    autoguidance      a smaller or less trained model (Karras et al. 2024, Eq. 3): here by
                      default the run's own primer, from before its last stage
    sparse            the same model, which sees only a part of the patches at a time
                      (Krause et al. 2026): it was pre-trained so
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from maskdm.models.build import Backbone
from maskdm.models.class_names import some_names
from maskdm.models.trained import TrainedModel
from maskdm.recipe import Sampling
from maskdm.sampling.denoise import sparse_denoiser, x0_denoiser
from maskdm.sampling.samplers import Denoise


def guided(
    trained: TrainedModel,
    positions: Tensor,
    labels: Tensor | None,
    settings: Sampling,
    weak: TrainedModel | None,
    generators: list[Generator],
) -> Denoise:
    """The denoiser of a trained model with the guidance that settings ask for.

    Args:
        trained: the strong model.
        positions: patches that are drawn, int64 (B, V).
        labels: classes, int64 (B,), or None.
        settings: kind of guidance, scale, and times at which it acts (Kynkaanniemi et al. 2024).
        weak: the weak model of autoguidance.
        generators: one per image, on the CPU; sparse guidance deals patches with them.

    Raises:
        ValueError: the model has no class for "none", or autoguidance has no weak model, or one
            of another image size or patch size or with other classes.
    """
    strong = x0_denoiser(trained, positions, labels)
    if settings.guidance == "none":
        return strong
    if settings.guidance == "classifier-free":
        null = no_class(trained.model, len(positions)).to(positions.device)
        other = x0_denoiser(trained, positions, null)
    elif settings.guidance == "autoguidance":
        refuse_weak(trained, weak)
        assert weak is not None
        other = x0_denoiser(weak, positions, labels)
    else:
        assert settings.guidance == "sparse"
        other = sparse_denoiser(trained, positions, labels, settings.guidance_rate, generators)
    ends = torch.tensor([settings.guidance_end, settings.guidance_start], dtype=torch.float64)
    low, high = trained.schedule.log_snr(ends).tolist()

    def denoise(x: Tensor, log_snr: float) -> Tensor:
        x0 = strong(x, log_snr)
        if not low - 1e-6 <= log_snr <= high + 1e-6:
            return x0
        weak_x0 = other(x, log_snr)
        return weak_x0 + settings.guidance_scale * (x0 - weak_x0)

    return denoise


def refuse_guidance(trained: TrainedModel, settings: Sampling, weak: TrainedModel | None) -> None:
    """Raises ValueError where a model can't have the guidance that settings ask for."""
    if settings.guidance == "classifier-free":
        no_class(trained.model, 0)
    elif settings.guidance == "autoguidance":
        refuse_weak(trained, weak)


def no_class(model: Backbone, num: int) -> Tensor:
    """Labels that say "no class": int64 (num,). Raises ValueError where the model knows none."""
    config = model.config
    if not config.num_classes or not config.label_dropout:
        what = "has no classes" if not config.num_classes else "was never shown images of no class"
        raise ValueError(
            f"classifier-free guidance is not possible, since the model {what}: train one with "
            "num_classes and label_dropout above 0, or use autoguidance or sparse"
        )
    return torch.full((num,), config.num_classes)


def refuse_weak(trained: TrainedModel, weak: TrainedModel | None) -> None:
    """Raises ValueError where a model can't guide another."""
    if weak is None:
        raise ValueError("autoguidance needs a weak model: name one with guidance_weak")
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
            f"the weak model's classes are {some_names(weak_names)}, the guided one's "
            f"{some_names(names)}: they must be equal"
        )
    config = trained.model.config
    if config.num_classes and config.label_dropout and not weak.model.config.label_dropout:
        raise ValueError("the weak model was never shown images of no class, the guided one was")

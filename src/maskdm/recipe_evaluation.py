"""The settings of a run's evaluation; part of the recipe."""

from __future__ import annotations

import difflib
import os
from typing import Literal, get_args

from pydantic import Field, field_validator

from maskdm.settings import Settings

SIZES = {"dinov2": "vit-s-14 vit-b-14 vit-l-14 vit-g-14", "clip": "vit-b-32 vit-b-16 vit-l-14"}

Metric = Literal["frechet", "kid", "sliced", "precision-recall", "inception-score", "memorization"]


class Evaluation(Settings):
    """How generated images are compared with real ones."""

    features: str = "pca"
    """In what: pca = the leading principal components of the reference set's pixels; inception
    (FID's), dinov2, clip, or one of their sizes, dinov2-vit-b-14; or a file with a network of your
    own, TorchScript or .pt2, uint8 (N, C, H, W) to (N, D)."""
    weights: str | None = None
    """File of inception's, dinov2's or clip's weights; None = PyTorch's hub folder, or the net."""
    num: int = Field(10_000, ge=4)
    """Images to generate; headline figures take 50,000."""
    quick_num: int = Field(1000, ge=0)
    """Images to generate at each set point in training; 0 = only losses are measured there."""
    metrics: tuple[Metric, ...] = ()
    """What is measured; none named = all that the features and the reference allow (kid, whose
    kernel is made for features near 1, not in pca)."""
    num_components: int = Field(32, gt=0)
    """Principal components kept (features pca)."""
    pixel_max: float = Field(255.0, gt=0)
    """Pixels are scaled to [0, pixel_max] before features pca; sets the distance's unit."""
    bootstrap: int = Field(50, ge=0)
    """Resampled sets for the Frechet distance's interval; 0 = no interval."""

    @field_validator("features")
    @classmethod
    def _known_or_file(cls, name: str) -> str:
        known = ("pca", *cls.known_features())
        if name not in known and "." not in name and os.sep not in name:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}, or a file"
            raise ValueError(f"unknown features {name!r}: {hint}")
        return name

    @field_validator("quick_num")
    @classmethod
    def _none_or_enough(cls, num: int) -> int:
        if 0 < num < 4:
            raise ValueError(f"{num} images are too few for a distance: use 0, or 4 or more")
        return num

    @staticmethod
    def all_metrics() -> tuple[str, ...]:
        """Names of all metrics."""
        return get_args(Metric)

    @staticmethod
    def known_features() -> tuple[str, ...]:
        """Names of the pre-trained networks."""
        sized = [f"{kind}-{size}" for kind, sizes in SIZES.items() for size in sizes.split()]
        return ("inception", "dinov2", "clip", *sized)

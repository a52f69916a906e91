"""The settings of a run's evaluation; part of the recipe."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import Field, field_validator

from maskdm.choices import helped
from maskdm.metrics import METRICS, MetricName
from maskdm.settings import Settings, changed
from maskdm.words import suggestion

SIZES = {"dinov2": "vit-s-14 vit-b-14 vit-l-14 vit-g-14", "clip": "vit-b-32 vit-b-16 vit-l-14"}


class Evaluation(Settings):
    """How generated images are compared with real ones."""

    features: str = "pca"
    """Features in which images are compared: pca = the leading principal components of the
    reference's pixels; auto = inception where its weights are there or can be downloaded, else
    pca (in training always pca); inception (FID's), dinov2, clip, or one of their sizes,
    dinov2-vit-b-14; or a file with your own network, TorchScript or .pt2, uint8 (N, C, H, W) to
    (N, D)."""
    weights: str | None = None
    """File of inception's, dinov2's or clip's weights; None = from PyTorch's hub folder, where they
    are downloaded if need be."""
    num: int = Field(10_000, ge=4)
    """Images to generate; headline figures use 50,000."""
    quick_num: Annotated[int, Field(ge=0)] | Literal["auto"] = 1000
    """Images to generate for each measurement in training; 0 = only losses are measured there; auto
    = up to 1000, as many as take a twentieth of the training's compute."""
    quick_loss_num: Annotated[int, Field(gt=0)] | Literal["auto"] = 256
    """Images whose loss is measured in training, at most: so many held-out ones, and as many of
    those trained on; auto = 32 to 256, as many as take a twentieth of the training's compute."""
    metrics: tuple[MetricName, ...] = Field(
        (),
        description=helped(
            "Metrics to measure; none = all that features and reference allow.",
            {name: row for name, row in METRICS.items() if "model" not in row.needs},
        ),
    )
    num_components: int = Field(32, gt=0)
    """Principal components (features pca)."""
    pixel_max: float = Field(255.0, gt=0)
    """Pixels are scaled to [0, pixel_max] for features pca; this sets the distances' unit."""
    bootstrap: int = Field(50, ge=0)
    """Resampled sets for the interval of the Frechet distance; 0 = no interval."""

    @field_validator("features")
    @classmethod
    def _known_or_file(cls, name: str) -> str:
        known = ("auto", "pca", *cls.known_features())
        if name not in known and "." not in name and os.sep not in name:
            hint = suggestion(name, [*known, "or a file"])
            raise ValueError(f"unknown features {name!r}: {hint}")
        return name

    @field_validator("metrics")
    @classmethod
    def _of_samples(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if "model" in METRICS[name].needs:
                raise ValueError(f"{name} is measured in training only, into quality.jsonl")
        return names

    @property
    def num_in_training(self) -> int:
        """`quick_num` of a planned recipe."""
        assert self.quick_num != "auto"
        return self.quick_num

    @property
    def losses_in_training(self) -> int:
        """`quick_loss_num` of a planned recipe."""
        assert self.quick_loss_num != "auto"
        return self.quick_loss_num

    @property
    def is_planned(self) -> bool:
        """Whether no number is `auto`."""
        return not self._open()

    def planned_as(self, other: Evaluation) -> Evaluation:
        """With the other's numbers where these are `auto`."""
        return changed(self, **{name: getattr(other, name) for name in self._open()})

    def _open(self) -> list[str]:
        return [name for name in ("quick_num", "quick_loss_num") if getattr(self, name) == "auto"]

    @field_validator("quick_num")
    @classmethod
    def _none_or_enough(cls, num: int | str) -> int | str:
        if num in (1, 2, 3):
            raise ValueError(f"{num} images are too few for a distance: use 0, or 4 or more")
        return num

    @staticmethod
    def known_features() -> tuple[str, ...]:
        """Names of the pre-trained networks."""
        sized = [f"{kind}-{size}" for kind, sizes in SIZES.items() for size in sizes.split()]
        return ("inception", "dinov2", "clip", *sized)

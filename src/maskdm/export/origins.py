"""Whose checkpoints can be imported: one row a project. It imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from maskdm.choices import functions_of, known, shown


@dataclass(frozen=True)
class Origin:
    """A project whose checkpoints can be imported.

    Attributes:
        help: whose they are, for `--help`.
        read: (content, weights) -> `export.foreign.Contents`, the network by U-ViT's names.
        schedule: noise schedule, where the file holds none; None = it must be given.
        sampling: how its authors draw images, as in `recipe.Sampling`.
    """

    help: str
    read: Callable[..., Any]
    schedule: str | None
    sampling: dict[str, Any]


_foreign = functions_of("export.foreign")
ORIGINS: dict[str, Origin] = {
    "maskdm": Origin(
        "model-N.pt of the paper's authors",
        _foreign("read_maskdm"),
        schedule=None,
        sampling={"sampler": "ddim", "steps": 250, "eta": 1.0},
    ),
    "uvit": Origin(
        "nnet_ema.pth of U-ViT, for images without an autoencoder",
        _foreign("read_uvit"),
        schedule="vp-sde",
        sampling={"sampler": "dpm-solver", "steps": 50, "spacing": "log-snr"},
    ),
}
OriginName = Annotated[str, known(ORIGINS, "origin"), shown(ORIGINS)]

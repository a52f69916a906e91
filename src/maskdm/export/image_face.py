"""Networks on patches as networks on whole images, called as diffusers calls its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from maskdm.models.backbone import Backbone
from maskdm.models.uvit import TIME_SCALE
from maskdm.tokens import patchify, unpatchify


class ImageFace(Backbone):
    """The face of diffusers' UNet2DModel, before a network on patches among a class's bases.

    The config also has `sample_size` and `in_channels`, by which diffusers' pipelines know the
    size of an image.
    """

    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Noise, image or velocity for noisy images.

        Args:
            sample: float (B, C, H, W).
            timestep: 999 t, from 0 for clean images to 999 for noise: a number, or one for each
                image (B,).
            class_labels: classes, int64 (B,); needed if and only if the model has classes.
            return_dict: give a `UNet2DOutput`; else a tuple.

        Returns:
            `sample`, float (B, C, H, W).
        """
        t = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device) / TIME_SCALE
        patches = patchify(sample.movedim(1, 3), self.patch_size)
        positions = torch.arange(self.num_patches, device=sample.device).expand(len(sample), -1)
        times = t.expand(len(sample))
        answer = super().forward(patches, positions, times, class_labels)  # type: ignore[safe-super]
        images = unpatchify(answer, self.patch_size, self.grid).movedim(3, 1)
        return UNet2DOutput(sample=images) if return_dict else (images,)

    @property
    def config(self) -> Any:
        """Its arguments, and the size of an image in diffusers' words."""
        height, width, channels = self.image_shape
        size = height if height == width else (height, width)
        return FrozenDict({**self._internal_dict, "sample_size": size, "in_channels": channels})

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        **options: Any,
    ) -> None:
        """As any of diffusers' models, with this file beside the weights, named as the class's."""
        options |= {"variant": variant, "max_shard_size": max_shard_size}
        super().save_pretrained(save_directory, safe_serialization=safe_serialization, **options)
        name = type(self).__module__.rpartition(".")[2]
        shutil.copyfile(__file__, Path(save_directory) / f"{name}.py")

"""Other people's denoisers behind the face of ours.

They need the whole grid: patches that a mask hides are blanked, and the loss is on the visible
ones alone. Masked pre-training works so for any network, but saves no compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, DiTTransformer2DModel, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from maskdm.models.class_names import refuse_class_names
from maskdm.models.uvit import TIME_SCALE
from maskdm.tokens import (
    gather_patches,
    grid_shape,
    height_and_width,
    patchify,
    scatter_patches,
    unpatchify,
)


class GridDenoiser(ModelMixin, ConfigMixin):
    """One of diffusers' networks for whole images, asked about any subset of their patches.

    Args:
        kind: `dit` = DiTTransformer2DModel, `unet2d` = UNet2DModel.
        image_size: side of the square image, in pixels; of `unet2d` also its height and width.
        patch_size: side of what masks hide, in pixels; also the patch size of `dit`.
        channels: channels of the image.
        embed_dim, depth, num_heads: width, blocks and heads of `dit`.
        num_classes: classes of a conditional model; 0 = unconditional.
        label_dropout: above 0 the model also knows "no class", label num_classes.
        options: further arguments of diffusers' class.
        class_names: name of each class, in the order of their numbers; None = unknown.

    Attributes:
        image_shape: height, width and channels of its images.
        grid: rows and columns of patches.

    Raises ValueError for an unknown kind, sizes that don't fit, or options that diffusers' class
    doesn't take.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        kind: str = "dit",
        image_size: int | Sequence[int] = 64,
        patch_size: int = 4,
        channels: int = 3,
        embed_dim: int = 512,
        depth: int = 13,
        num_heads: int = 8,
        num_classes: int = 0,
        label_dropout: float = 0.1,
        options: dict[str, Any] | None = None,
        class_names: list[str] | None = None,
    ):
        super().__init__()
        refuse_class_names(class_names, num_classes)
        if kind not in NETWORKS:
            raise ValueError(f"unknown kind of network {kind!r}: known are {', '.join(NETWORKS)}")
        height, width = height_and_width(image_size)
        self.image_shape = (height, width, channels)
        if kind == "dit" and height != width:
            raise ValueError(
                f"kind dit takes square images only, not {height}x{width}: use uvit or unet2d"
            )
        self.grid = grid_shape(height, width, patch_size)
        self.patch_size = patch_size
        self.num_patches = self.grid[0] * self.grid[1]
        num_labels = num_classes + (label_dropout > 0) if num_classes else 0
        arguments: dict[str, Any] = {
            "sample_size": height if height == width else (height, width),
            "in_channels": channels,
            "out_channels": channels,
        }
        if kind == "dit":
            arguments |= {
                "patch_size": patch_size,
                "num_attention_heads": num_heads,
                "attention_head_dim": embed_dim // num_heads,
                "num_layers": depth,
                "num_embeds_ada_norm": max(num_classes, 1),  # it adds "no class" by itself
            }
        else:
            arguments |= {"num_class_embeds": num_labels or None}
        arguments |= options or {}
        _refuse_arguments(NETWORKS[kind], arguments)
        try:
            self.net = NETWORKS[kind](**arguments)
            self._flops = self._try_on_nothing()
        except Exception as error:  # its authors' own checks, or the shapes of its layers
            text = " ".join(str(error).split())
            raise ValueError(
                f"{NETWORKS[kind].__name__} can't be made so for images of {height}x{width} "
                f"pixels (model, model.options): {text}"
            ) from None
        for module in self.net.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0  # classes are dropped by the training, by its seed

    def forward(
        self, patches: Tensor, positions: Tensor, t: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Answers for each given patch; takes and gives what `UViT.forward` does."""
        if (labels is None) != (self.config.num_classes == 0):
            raise ValueError(
                "this model has no classes, but labels were given"
                if labels is not None
                else "this model is class-conditional: labels are needed"
            )
        full = scatter_patches(patches, positions, self.num_patches)  # hidden ones are 0
        images = unpatchify(full, self.patch_size, self.grid).movedim(3, 1)  # (B, C, H, W)
        if labels is None and self.config.kind == "dit":
            labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        out = self.net(images, t * TIME_SCALE, class_labels=labels).sample
        return gather_patches(patchify(out.movedim(1, 3), self.patch_size), positions)

    def forward_flops(self, num_visible: int) -> int:
        """Floating-point operations of a forward pass for one image: masks don't change them.

        Matrix products and convolutions, two operations a multiply-add, counted by PyTorch.
        """
        return self._flops

    def _try_on_nothing(self) -> int:
        """Runs a copy without memory on one image: operations of a forward pass.

        Raises whatever the network raises, and ValueError for an answer of another shape.
        """
        height, width, channels = self.image_shape
        with torch.device("meta"):
            copy = type(self.net).from_config(self.net.config)
            image = torch.zeros(1, channels, height, width)
            label = torch.zeros(1, dtype=torch.int64) if self._takes_labels() else None
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                answer = copy(image, torch.zeros(1), class_labels=label).sample
        if answer.shape != image.shape:
            raise ValueError(f"it turns {tuple(image.shape)} into {tuple(answer.shape)}")
        return counter.get_total_flops()

    def _takes_labels(self) -> bool:
        return self.config.kind == "dit" or bool(self.config.num_classes)


def _refuse_arguments(network: type[Any], arguments: dict[str, Any]) -> None:
    """Raises ValueError for arguments that diffusers' class doesn't know, or that draw numbers."""
    known = {*network._get_init_keys(network)} - {"self"}
    if unknown := set(arguments) - known:
        raise ValueError(
            f"model.options: {network.__name__} takes no {', '.join(sorted(unknown))}; "
            f"known are {', '.join(sorted(known))}"
        )
    if arguments.get("dropout"):
        raise ValueError(
            "model.options: dropout draws numbers that a resumed run would not repeat: leave it 0"
        )


NETWORKS: dict[str, type[Any]] = {"dit": DiTTransformer2DModel, "unet2d": UNet2DModel}

"""The face that every network of the family `BACKBONES` has; `uvit.py` shows it best."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from maskdm.families import BACKBONES
from maskdm.models.class_names import refuse_class_names
from maskdm.tokens import grid_shape, height_and_width


class Backbone(ModelMixin, ConfigMixin, ABC):
    """A denoiser of any subset of an image's patches, in diffusers' form.

    A subclass decorates its constructor with diffusers' `register_to_config` and takes at least
    image_size, patch_size, channels, num_classes, label_dropout and class_names; it calls
    `set_grid`. Its answers depend on the patches that it is given, never on hidden ones. It names
    ModelMixin among its bases: `DiffusionPipeline.from_pretrained` looks for that name in the file
    of the class.

    Attributes:
        image_shape: height, width and channels of its images.
        grid: rows and columns of patches.
        patch_size: side of a patch, in pixels.
        num_patches: rows x columns.
        num_classes: classes of a conditional model; 0 = unconditional.
        config: the constructor's arguments.
    """

    def set_grid(
        self,
        image_size: int | Sequence[int],
        patch_size: int,
        channels: int,
        num_classes: int = 0,
        class_names: Sequence[str] | None = None,
    ) -> None:
        """Sets the attributes. Raises ValueError where sizes or the number of names do not fit."""
        refuse_class_names(class_names, num_classes)
        self.image_shape = (*height_and_width(image_size), channels)
        self.grid = grid_shape(*self.image_shape[:2], patch_size)
        self.patch_size = patch_size
        self.num_patches = self.grid[0] * self.grid[1]
        self.num_classes = num_classes

    @abstractmethod
    def forward(
        self,
        patches: Tensor,
        positions: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        middle: Tensor | None = None,
    ) -> Tensor:
        """Answers for each given patch.

        Args:
            patches: noisy patches, float (B, V, P), values in (row, column, channel) order.
            positions: their indices in the row-major grid, int64 (B, V).
            t: times, float (B,) in [0, 1].
            labels: classes, int64 (B,); needed if and only if the model has classes.
            middle: which of the given patches the blocks in the middle work on, int64 (B, M),
                indices into V; the others pass them by. None = all. Only for networks whose row in
                `BACKBONES` says so.

        Returns:
            float (B, V, P): noise, image or velocity, as the diffusion's prediction says.
        """

    def forward_flops(self, num_visible: int, num_middle: int | None = None) -> int:
        """Floating-point operations of a forward pass for one image with V visible patches.

        Matrix products and convolutions, two operations a multiply-add; a training step is three
        times it. Counted by PyTorch on a copy without memory; a subclass may know a formula.

        Args:
            num_visible: V.
            num_middle: patches that the middle blocks work on; None = all.
        """
        settings = {name: value for name, value in self.config.items() if name[0] != "_"}
        with torch.device("meta"):
            return _count_flops(type(self)(**settings), num_visible, num_middle)

    @property
    def kind(self) -> str:
        """Its name in `BACKBONES`."""
        names = [name for name, row in BACKBONES.items() if row.network_class is type(self)]
        return self.config.kind if len(names) > 1 else names[0]

    def run_block(self, block: nn.Module, *inputs: Any) -> Tensor:
        """Runs a block, anew in the backward pass where activations are not to be kept."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            answer: Tensor = self._gradient_checkpointing_func(block, *inputs)
            return answer
        return block(*inputs)

    def check_labels(self, labels: Tensor | None) -> None:
        """Raises ValueError where classes are given to a model without, or lack in one with."""
        if (labels is None) != (self.num_classes == 0):
            raise ValueError(
                "this model has no classes, but labels were given"
                if labels is not None
                else "this model is class-conditional: labels are needed"
            )


def _count_flops(model: Backbone, num_visible: int, num_middle: int | None) -> int:
    """Counts on the device of the model's weights, or of the `torch.device` block around."""
    patches = torch.zeros(1, num_visible, model.patch_size**2 * model.image_shape[2])
    positions = torch.zeros(1, num_visible, dtype=torch.int64)
    labels = torch.zeros(1, dtype=torch.int64) if model.config.num_classes else None
    more = () if num_middle is None else (positions[:, :num_middle],)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(patches, positions, torch.zeros(1), labels, *more)
    return counter.get_total_flops()

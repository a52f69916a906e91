"""diffusers' denoisers behind the face of ours.

DiT is a transformer without convolutions, so it runs on the visible patches alone, as U-ViT does.
The U-Net needs the whole grid: patches that a mask hides are blanked, and the loss is on the
visible ones. Masked pre-training works so for any network, but saves no compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from maskdm.choices import named
from maskdm.families import BACKBONES
from maskdm.models.backbone import Backbone
from maskdm.models.uvit import TIME_SCALE
from maskdm.tokens import gather_patches, patchify, scatter_patches, unpatchify
from maskdm.words import listed, one_line

NETWORKS: dict[str, type[Any]] = {"dit": DiTTransformer2DModel, "unet2d": UNet2DModel}


class DiffusersDenoiser(Backbone, ModelMixin):
    """One of diffusers' networks for whole images, applied to any subset of their patches.

    Args:
        kind: `dit` = DiTTransformer2DModel, `unet2d` = UNet2DModel.
        image_size: side of the square image, in pixels; for `unet2d` also its height and width.
        patch_size: side of what masks hide, in pixels; also the patch size of `dit`.
        channels: channels of the image.
        embed_dim, depth, num_heads: width, blocks and heads of `dit`.
        num_classes: classes of a conditional model; 0 = unconditional.
        label_dropout: above 0 the model also knows "no class", label num_classes.
        options: further arguments of diffusers' class.
        class_names: name of each class, in the order of their numbers; None = unknown.

    Raises ValueError for an unknown kind, sizes that do not fit, or options that diffusers' class
    does not take.
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
        self.set_grid(image_size, patch_size, channels, num_classes, class_names)
        network = named(kind, NETWORKS, "kind of network")
        height, width, _ = self.image_shape
        if height != width and not BACKBONES[kind].takes_rectangles:
            raise ValueError(f"kind {kind} takes square images only, not {height}x{width}")
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
        _refuse_arguments(network, arguments)
        self._flops: dict[int, int] = {}
        try:
            self.net = network(**arguments)
            self.forward_flops(self.num_patches)  # runs it without memory: shapes are checked
        except Exception as error:  # its authors' own checks, or the shapes of its layers
            raise ValueError(
                f"{network.__name__} cannot be made with these settings for images of "
                f"{height}x{width} pixels (model, model.options): {one_line(error)}"
            ) from None
        for module in self.net.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0  # the training drops classes, by its own seed
        if kind == "dit":
            _start_as_adaln_zero(self.net)

    @classmethod
    def around(cls, net: Any, config: dict[str, Any]) -> DiffusersDenoiser:
        """One of diffusers' networks, as it was trained, behind this face.

        Args:
            net: the network, of the class that the config's `kind` names.
            config: the arguments of this class.
        """
        with torch.device("meta"):  # its own initial weights take no memory
            denoiser = cls(**config)
        for module in net.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0
        denoiser.net = net
        return denoiser.train(net.training)

    def forward(
        self,
        patches: Tensor,
        positions: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        middle: Tensor | None = None,
    ) -> Tensor:
        """Answers for each given patch; takes and gives what `UViT.forward` does, but no middle."""
        self.check_labels(labels)
        if middle is not None:
            raise ValueError(f"{self.config.kind} has no middle that patches could pass by")
        return self._run(self.net, patches, positions, t, labels)

    def forward_flops(self, num_visible: int, num_middle: int | None = None) -> int:
        """Floating-point operations of a forward pass for one image with V visible patches.

        Matrix products and convolutions, two operations a multiply-add, counted by PyTorch on a
        copy without memory. For the U-Net they are the same for every V.
        """
        if num_visible not in self._flops:
            values = self.patch_size**2 * self.image_shape[2]
            with torch.device("meta"):
                copy = type(self.net).from_config(self.net.config)
                patches = torch.zeros(1, num_visible, values)
                positions = torch.zeros(1, num_visible, dtype=torch.int64)
                labels = torch.zeros(1, dtype=torch.int64) if self.config.num_classes else None
                with FlopCounterMode(display=False) as counter, torch.no_grad():
                    out = self._run(copy, patches, positions, torch.zeros(1), labels)
            if out.shape != patches.shape:
                raise ValueError(f"it turns {tuple(patches.shape)} into {tuple(out.shape)}")
            self._flops[num_visible] = counter.get_total_flops()
        return self._flops[num_visible]

    def _run(
        self, net: nn.Module, patches: Tensor, positions: Tensor, t: Tensor, labels: Tensor | None
    ) -> Tensor:
        if self.config.kind == "dit":
            if labels is None:
                labels = torch.zeros(patches.shape[0], dtype=torch.int64, device=patches.device)
            return _run_dit(net, patches, positions, t * TIME_SCALE, labels)
        full = scatter_patches(patches, positions, self.num_patches)  # hidden ones are 0
        images = unpatchify(full, self.patch_size, self.grid).movedim(3, 1)  # (B, C, H, W)
        out = net(images, t * TIME_SCALE, class_labels=labels).sample
        return gather_patches(patchify(out.movedim(1, 3), self.patch_size), positions)


GridDenoiser = DiffusersDenoiser  # its name in models that were exported before DiT took subsets


def _run_dit(net: Any, patches: Tensor, positions: Tensor, step: Tensor, labels: Tensor) -> Tensor:
    """DiTTransformer2DModel.forward on some of the patches: (B, V, P) -> (B, V, P).

    Its patch embedding is a convolution whose stride is its width: a matrix product for each
    patch. Its positions are a table over the grid. Nothing else in it knows of the grid.
    """
    kernel = net.pos_embed.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, row column channel)
    x = F.linear(patches, kernel, net.pos_embed.proj.bias)  # (B, V, D)
    x = (x + net.pos_embed.pos_embed[0][positions]).to(x.dtype)
    for block in net.transformer_blocks:
        inputs = (x, None, None, None, step, None, labels)
        if torch.is_grad_enabled() and net.gradient_checkpointing:
            x = net._gradient_checkpointing_func(block, *inputs)
        else:
            x = block(*inputs)
    condition = net.transformer_blocks[0].norm1.emb(step, labels, hidden_dtype=x.dtype)
    shift, scale = net.proj_out_1(F.silu(condition)).chunk(2, dim=1)
    x = net.norm_out(x) * (1 + scale[:, None]) + shift[:, None]
    out: Tensor = net.proj_out_2(x)
    return out


def _start_as_adaln_zero(net: Any) -> None:
    """Initial weights of DiT (Peebles & Xie 2022, Section 3.2), which diffusers leaves out.

    Each block begins as the identity and the output as 0: modulation and final layer are zero.
    """
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    nn.init.xavier_uniform_(net.pos_embed.proj.weight.flatten(1))
    nn.init.zeros_(net.pos_embed.proj.bias)
    for block in net.transformer_blocks:
        embedder = block.norm1.emb.timestep_embedder
        nn.init.normal_(embedder.linear_1.weight, std=0.02)
        nn.init.normal_(embedder.linear_2.weight, std=0.02)
        nn.init.zeros_(block.norm1.linear.weight)
    for last in (net.proj_out_1, net.proj_out_2):
        nn.init.zeros_(last.weight)


def _refuse_arguments(network: type[Any], arguments: dict[str, Any]) -> None:
    """Raises ValueError for arguments that diffusers' class does not know, or that draw numbers."""
    known = {*network._get_init_keys(network)} - {"self"}
    if unknown := set(arguments) - known:
        raise ValueError(
            f"model.options: {network.__name__} takes no {', '.join(sorted(unknown))}; "
            f"known are {listed(sorted(known), len(known))}"
        )
    if arguments.get("dropout"):
        raise ValueError(
            "model.options: dropout draws numbers that a resumed run would not repeat: leave it 0"
        )

"""U-ViT, the paper's backbone (Bao et al. 2022; Section 3.2, Tables 5 and 6).

A vision transformer on noisy patches in which time (and class) are tokens and the first half's
blocks feed the second half's by long skip connections. It sees only the patches that it is given:
positions come with them, so hidden patches cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from maskdm.models.backbone import Backbone
from maskdm.models.route import Route, num_ends
from maskdm.tokens import gather_patches, patchify, scatter_patches, unpatchify

TIME_SCALE = 999.0  # t in [0, 1] is embedded as the step number 0..999


class UViT(Backbone, ModelMixin):
    """Predicts noise, image or velocity for any subset of an image's patches.

    Args:
        image_size: side of the square image, in pixels; or its height and width.
        patch_size: side of a patch, in pixels; it divides both.
        channels: channels of the image.
        embed_dim: width of the tokens, a multiple of 2 * num_heads.
        depth: number of all blocks, odd: 13 = 6 in + 1 middle + 6 out.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over embed_dim.
        num_classes: classes of a conditional model; 0 = unconditional, no class token.
        label_dropout: chance that training hides a class. Above 0 the model also knows "no
            class", label num_classes; hiding it is the training's work, not done here.
        final_conv: 3x3 convolution over the predicted image (hidden patches count as zeros).
        qkv_bias: biases in the attention's queries, keys and values.
        time_mlp: two layers on the time's embedding, the inner one 4 * embed_dim wide.
        class_names: name of each class, in the order of their numbers; None = unknown.
        patch_init: initial weights of the patch embedding, `normal` as all others, or `conv`,
            PyTorch's default for a convolution of that patch, as in U-ViT.

    The paper's MaskDM-S: UViT(image_size=64) with the defaults, 44.29 M parameters.
    MaskDM-B: image_size=256, embed_dim=768, num_heads=12, 102.42 M parameters.

    Raises ValueError where the sizes or the number of names do not fit.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        image_size: int | Sequence[int] = 64,
        patch_size: int = 4,
        channels: int = 3,
        embed_dim: int = 512,
        depth: int = 13,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        num_classes: int = 0,
        label_dropout: float = 0.1,
        final_conv: bool = False,
        qkv_bias: bool = False,
        time_mlp: bool = False,
        class_names: list[str] | None = None,
        patch_init: str = "normal",
    ):
        super().__init__()
        self.set_grid(image_size, patch_size, channels, num_classes, class_names)
        if depth % 2 == 0:
            raise ValueError(f"depth {depth} is even: use {depth - 1} or {depth + 1}")
        if embed_dim % (2 * num_heads):
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of 2 x {num_heads} heads")
        if patch_init not in ("normal", "conv"):
            raise ValueError(f"unknown patch_init {patch_init!r}: normal or conv")
        self.num_extras = 2 if num_classes else 1  # tokens before the patches
        self.gradient_checkpointing = False

        patch_values = patch_size * patch_size * channels
        self.patch_embed = nn.Linear(patch_values, embed_dim)
        num_labels = num_classes + (label_dropout > 0)
        self.label_embed = nn.Embedding(num_labels, embed_dim) if num_classes else None
        self.time_embed = make_mlp(embed_dim, 4 * embed_dim, nn.SiLU()) if time_mlp else None
        self.pos_embed = nn.Parameter(torch.zeros(self.num_extras + self.num_patches, embed_dim))
        half = depth // 2
        sizes = (embed_dim, num_heads, mlp_ratio, qkv_bias)
        self.in_blocks = nn.ModuleList(Block(*sizes) for _ in range(half))
        self.mid_block = Block(*sizes)
        self.out_blocks = nn.ModuleList(SkipBlock(*sizes) for _ in range(half))
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, patch_values)
        self.output_conv = nn.Conv2d(channels, channels, 3, padding=1) if final_conv else None
        uniform = {name: value.clone() for name, value in self.patch_embed.state_dict().items()}
        self._init_weights()
        if patch_init == "conv":
            self.patch_embed.load_state_dict(uniform)

    def _init_weights(self) -> None:
        """Normal(0, 0.02), cut at 2, for matrices and positions; zero biases.

        As in U-ViT, except for the patch embedding: there it is a Conv2d that keeps PyTorch's
        default, which for P values a patch is that of a Linear: weights and biases uniform within
        1 / sqrt(P), a standard deviation of 0.083 for patches of 4x4x3 values.
        """
        nn.init.trunc_normal_(self.pos_embed, std=0.02, a=-2, b=2)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-2, b=2)
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if self.output_conv is not None:  # begins as the identity: harmless until trained
            nn.init.dirac_(self.output_conv.weight)

    def forward(
        self,
        patches: Tensor,
        positions: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        middle: Tensor | None = None,
    ) -> Tensor:
        """Answers for each given patch: see `Backbone.forward`."""
        self.check_labels(labels)
        time = timestep_embedding(t * TIME_SCALE, self.pos_embed.shape[1])  # (B, D)
        if self.time_embed is not None:
            time = self.time_embed(time.to(self.pos_embed.dtype))
        extras = [time.to(patches.dtype)]
        if self.label_embed is not None:
            extras.insert(0, self.label_embed(labels))
        x = torch.stack(extras, dim=1) + self.pos_embed[: self.num_extras]  # (B, 1 or 2, D)
        tokens = self.patch_embed(patches) + F.embedding(
            positions + self.num_extras, self.pos_embed
        )
        x = torch.cat([x.to(tokens.dtype), tokens], dim=1)  # (B, L, D), L = extras + V

        route = None if middle is None else Route(middle, self.num_extras)
        first, half = num_ends(self.config.depth), len(self.in_blocks)
        skips: list[Tensor] = []
        for i, block in enumerate((*self.in_blocks, self.mid_block, *self.out_blocks)):
            if route is not None and i == first:
                x = route.enter(x)
            if route is not None and i == self.config.depth - first:
                x = route.leave(x)
            x = self.run_block(block, x, *([skips.pop()] if i > half else []))
            if i < half:
                skips.append(x)

        x = self.head(self.norm(x[:, self.num_extras :]))  # (B, V, P)
        if self.output_conv is not None:
            full = unpatchify(
                scatter_patches(x, positions, self.num_patches), self.patch_size, self.grid
            )
            full = self.output_conv(full.movedim(3, 1)).movedim(1, 3)
            x = gather_patches(patchify(full, self.patch_size), positions)
        return x

    def forward_flops(self, num_visible: int, num_middle: int | None = None) -> int:
        """Floating-point operations of a forward pass for one image: see `Backbone`.

        Matrix products only, two operations a multiply-add; a training step is three times it.
        """
        config = self.config
        height, width, channels = self.image_shape
        dim, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
        values = config.patch_size**2 * channels
        tokens = self.num_extras + num_visible
        fewer = tokens if num_middle is None else self.num_extras + num_middle
        half, dense = config.depth // 2, 2 * num_ends(config.depth)
        blocks = sum(
            num * (length * (4 * dim * dim + 2 * dim * hidden) + 2 * length * length * dim)
            for num, length in ((dense, tokens), (config.depth - dense, fewer))
        )
        skips = (dense // 2 * tokens + (half - dense // 2) * fewer) * 2 * dim * dim
        ends = num_visible * 2 * dim * values
        conv = 9 * channels**2 * height * width if config.final_conv else 0
        time = 8 * dim * dim if config.time_mlp else 0
        return 2 * (blocks + skips + ends + conv + time)


def timestep_embedding(step: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding, cosines first (Vaswani et al. 2017): float (B,) -> float32 (B, dim)."""
    half = dim // 2
    frequencies = torch.exp(
        torch.arange(half, device=step.device, dtype=torch.float32) * (-math.log(10_000) / half)
    )
    angles = step.float()[:, None] * frequencies  # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def make_mlp(dim: int, hidden: int, activation: nn.Module) -> nn.Sequential:
    """Two linear layers with an activation between them: (..., D) -> (..., D)."""
    return nn.Sequential(nn.Linear(dim, hidden), activation, nn.Linear(hidden, dim))


class Attention(nn.Module):
    """Multi-head self-attention: (B, L, D) -> (B, L, D)."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, L, D / heads) each
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, length, dim))


class Block(nn.Module):
    """Pre-norm transformer block: (B, L, D) -> (B, L, D)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = make_mlp(dim, int(dim * mlp_ratio), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SkipBlock(Block):
    """A block of the second half: first merges the long skip connection."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool):
        super().__init__(dim, num_heads, mlp_ratio, qkv_bias)
        self.skip_linear = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(self.skip_linear(torch.cat([x, skip], dim=-1)))

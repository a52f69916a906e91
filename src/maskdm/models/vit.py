"""A plain vision transformer of today's parts, on any subset of an image's patches.

RMSNorm, normalized queries and keys, SwiGLU, rotary positions in two dimensions at the patches'
true places, and a modulation of every block by time and class, as in DiT (Peebles & Xie 2022) and
JiT (Li & He 2025). Each part can be taken out. docs/does-masking-pay.md has what they bring in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from maskdm.models.backbone import Backbone
from maskdm.models.route import Route, num_ends
from maskdm.models.uvit import TIME_SCALE, timestep_embedding
from maskdm.words import listed

ROTARY_BASE = 100.0  # the slowest rotation turns once in 630 patches
FREQUENCIES = 256  # of the sinusoidal embedding of time


@dataclass(frozen=True)
class Parts:
    """What `model.options` may change.

    Attributes:
        rotary: turn queries and keys by the patch's row and column.
        qk_norm: normalize queries and keys.
        swiglu: gate the MLP's hidden layer; GELU otherwise, of the same cost.
        modulation: time and class scale and shift every block; otherwise they are tokens.
        skips: long connections from the first half's blocks to the second's, as in U-ViT.
        bottleneck: values that a patch is squeezed into before it is embedded; 0 = none.
    """

    rotary: bool = True
    qk_norm: bool = True
    swiglu: bool = True
    modulation: bool = True
    skips: bool = False
    bottleneck: int = 0


class ViT(Backbone, ModelMixin):
    """Predicts noise, image or velocity for any subset of an image's patches.

    Args:
        image_size: side of the square image, in pixels; or its height and width.
        patch_size: side of a patch, in pixels; it divides both.
        channels: channels of the image.
        embed_dim: width of the tokens, a multiple of 4 * num_heads.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over embed_dim, as if it had no gate.
        num_classes: classes of a conditional model; 0 = unconditional.
        label_dropout: above 0 the model also knows "no class", label num_classes.
        options: changes to `Parts`.
        class_names: name of each class, in the order of their numbers; None = unknown.

    Raises ValueError where the sizes or the number of names do not fit, or for an unknown part.
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
        options: dict[str, Any] | None = None,
        class_names: list[str] | None = None,
    ):
        super().__init__()
        self.set_grid(image_size, patch_size, channels, num_classes, class_names)
        if embed_dim % (4 * num_heads):
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of 4 x {num_heads} heads")
        known = [field.name for field in fields(Parts)]
        if unknown := set(options or {}) - {*known}:
            raise ValueError(
                f"model.options: vit has no {', '.join(sorted(unknown))}; known are {listed(known)}"
            )
        self.parts = parts = Parts(**(options or {}))
        self.gradient_checkpointing = False
        self.num_extras = 0 if parts.modulation else 1 + (num_classes > 0)  # tokens before patches

        values = patch_size * patch_size * channels
        self.patch_embed = (
            nn.Sequential(
                nn.Linear(values, parts.bottleneck, bias=False),
                nn.Linear(parts.bottleneck, embed_dim),
            )
            if parts.bottleneck
            else nn.Linear(values, embed_dim)
        )
        self.pos_embed = nn.Parameter(torch.zeros(self.num_extras + self.num_patches, embed_dim))
        self.time_embed = nn.Sequential(
            nn.Linear(FREQUENCIES, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim)
        )
        num_labels = num_classes + (label_dropout > 0)
        self.label_embed = nn.Embedding(num_labels, embed_dim) if num_classes else None
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, parts, parts.skips and 2 * i > depth - 1)
            for i in range(depth)
        )
        self.norm = nn.RMSNorm(embed_dim)
        self.modulate = nn.Linear(embed_dim, 2 * embed_dim) if parts.modulation else None
        self.head = nn.Linear(embed_dim, values)
        self._init_weights()

    def _init_weights(self) -> None:
        """Xavier's uniform for matrices; modulations and the head are 0: blocks are identities."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.02)
        for name, module in self.named_modules():
            if name == "head" or name.endswith("modulate"):
                nn.init.zeros_(cast(nn.Linear, module).weight)

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
        step = timestep_embedding(t * TIME_SCALE, FREQUENCIES).to(patches.dtype)
        conditions = [self.time_embed(step)]  # (B, D) each
        if self.label_embed is not None:
            conditions.append(self.label_embed(labels))
        x = self.patch_embed(patches)
        # Under autocast the positions, in fp32, keep what the blocks add to in fp32.
        x = x + F.embedding(positions + self.num_extras, self.pos_embed)  # (B, V, D)
        condition = None
        if self.parts.modulation:
            condition = F.silu(torch.stack(conditions).sum(dim=0))
        else:
            extras = torch.stack(conditions, dim=1) + self.pos_embed[: self.num_extras]
            x = torch.cat([extras.to(x.dtype), x], dim=1)  # (B, L, D), L = extras + V
        turns = self._turns(positions, x.dtype) if self.parts.rotary else None

        route = None if middle is None else Route(middle, self.num_extras)
        first, last = num_ends(len(self.blocks)), len(self.blocks) - num_ends(len(self.blocks))
        every = turns
        skips: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if route is not None and i == first:
                x, turns = route.enter(x), None if turns is None else route.taken(turns)
            if route is not None and i == last:
                x, turns = route.leave(x), every
            skip = skips.pop() if block.merge is not None else None
            x = self.run_block(block, x, condition, turns, skip)
            if self.parts.skips and 2 * i < len(self.blocks) - 1:
                skips.append(x)

        x = x[:, self.num_extras :]
        if self.modulate is None:
            return self.head(self.norm(x))  # (B, V, P)
        shift, scale = self.modulate(condition)[:, None].chunk(2, dim=-1)
        return self.head(modulated(self.norm, x, scale, shift))

    def _turns(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Cosines and sines of each token's rotations, side by side: (B, L, D / heads).

        Half of the pairs turn with the row, half with the column; extra tokens do not turn.
        """
        num = self.config.embed_dim // self.config.num_heads // 4
        power = torch.arange(num, device=positions.device, dtype=torch.float32) / num
        places = torch.stack([positions // self.grid[1], positions % self.grid[1]], dim=-1)
        angles = places[..., None] * ROTARY_BASE**-power  # (B, V, 2, num)
        angles = F.pad(angles.flatten(2), (0, 0, self.num_extras, 0))  # (B, L, D / heads / 2)
        return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


class Block(nn.Module):
    """Attention and MLP, each after a norm, scaled and shifted by the condition: (B, L, D)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, parts: Parts, merges: bool):
        super().__init__()
        self.num_heads = num_heads
        self.merge = nn.Linear(2 * dim, dim) if merges else None
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_norm = nn.RMSNorm(dim // num_heads) if parts.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(dim // num_heads) if parts.qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        hidden = int(dim * mlp_ratio * 2 / 3) // 8 * 8 if parts.swiglu else int(dim * mlp_ratio)
        self.gated = parts.swiglu
        self.up = nn.Linear(dim, 2 * hidden if parts.swiglu else hidden)
        self.down = nn.Linear(hidden, dim)
        self.modulate = nn.Linear(dim, 6 * dim) if parts.modulation else None

    def forward(
        self, x: Tensor, condition: Tensor | None, turns: Tensor | None, skip: Tensor | None
    ) -> Tensor:
        if self.merge is not None and skip is not None:
            x = self.merge(torch.cat([x, skip], dim=-1)).to(x.dtype)
        if self.modulate is None:
            x = x + self._attention(self.norm1(x), turns)
            return x + self._mlp(self.norm2(x))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulate(condition)[:, None].chunk(
            6, -1
        )
        attended = self._attention(modulated(self.norm1, x, scale1, shift1), turns)
        x = torch.addcmul(x, gate1, attended)
        return torch.addcmul(x, gate2, self._mlp(modulated(self.norm2, x, scale2, shift2)))

    def _attention(self, x: Tensor, turns: Tensor | None) -> Tensor:
        batch, length, dim = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        qk, v = qkv.permute(2, 0, 3, 1, 4).split((2, 1))  # (2 and 1, B, heads, L, D / heads)
        qk = qk.to(self.norm1.weight.dtype)  # torch is slow to norm by weights of another one
        if isinstance(self.q_norm, nn.RMSNorm) and isinstance(self.k_norm, nn.RMSNorm):
            weights = torch.stack([self.q_norm.weight, self.k_norm.weight])[:, None, None, None]
            qk = F.rms_norm(qk, self.q_norm.normalized_shape, eps=self.q_norm.eps) * weights
        if turns is not None:
            qk = turned(qk, turns)
        q, k = qk.unbind()
        x = F.scaled_dot_product_attention(q, k, v.squeeze(0))
        return self.proj(x.transpose(1, 2).reshape(batch, length, dim))

    def _mlp(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            return self.down(F.silu(gate) * x)
        return self.down(F.gelu(x))


def modulated(norm: nn.RMSNorm, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """norm(x) (1 + scale) + shift, in fewer passes over the tokens: scales are multiplied first.

    Args:
        norm: of D values.
        x: (B, L, D).
        scale, shift: (B, 1, D).
    """
    plain = F.rms_norm(x, norm.normalized_shape, eps=norm.eps)
    return torch.addcmul(shift, plain, norm.weight * (1 + scale))


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021): pairs (x[i], x[i + half]) turn by their angles."""
    cos, sin = turns[:, None].chunk(2, dim=-1)  # (B, 1, L, D / heads / 2), for all heads
    a, b = x.chunk(2, dim=-1)
    turned_a, turned_b = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(a * sin, b, cos)
    return torch.cat([turned_a, turned_b], dim=-1)

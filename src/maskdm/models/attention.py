"""Which of PyTorch's kernels computes a network's attention."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from maskdm.models.build import Backbone

FUSED = re.compile(r"_scaled_dot_product_(\w+?)_attention")


class _Calls(TorchFunctionMode):
    """Notes whether scaled_dot_product_attention is called."""

    seen = False

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.seen |= function is F.scaled_dot_product_attention
        return function(*args, **(kwargs or {}))


class _Kernels(TorchDispatchMode):
    """Notes the fused kernels that compute it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if found := FUSED.search(str(function)):
            self.seen.add(found[1])
        return function(*args, **(kwargs or {}))


def attention_kernels(model: Backbone) -> list[str]:
    """Names of the kernels by which PyTorch computes a network's attention.

    It chooses by device and precision: of the network, and of the autocast round this call.
    `flash`, `efficient`, `cudnn` are fused: their memory grows with the number of tokens, not its
    square; `math` is products and a softmax. Found by asking the network about a part of an image.

    Returns:
        Sorted; empty for a network that has no such attention.
    """
    device = model.device
    values = model.patch_size**2 * model.image_shape[2]
    num = min(model.num_patches, 64)
    patches = torch.zeros(1, num, values, device=device)
    positions = torch.arange(num, device=device)[None]
    labels = torch.zeros(1, dtype=torch.int64, device=device) if model.config.num_classes else None
    t = torch.zeros(1, device=device)
    with _Kernels() as kernels, _Calls() as calls:
        model(patches, positions, t, labels)
    return sorted(kernels.seen) or (["math"] if calls.seen else [])

"""Compiling a network: one graph for one shape, and never at the price of the work."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class NotCompiled(RuntimeError):
    """The compiler can't do it; the network runs as written."""


class CompiledForward:
    """A network's forward, as written or compiled; stands in the network's place.

    It is compiled for patches of one shape, as one graph; other shapes run as written. Weights,
    names and checkpoints are the network's own, compiled or not.

    Args:
        model: the network; its `forward` becomes this.
        backend: of torch.compile.
    """

    def __init__(self, model: nn.Module, backend: str | Callable[..., Any] = "inductor"):
        self._eager: Callable[..., Tensor] = model.forward
        self._compiled: Callable[..., Tensor] | None = None
        self._shape: tuple[int, ...] | None = None
        self._backend = backend
        model.forward = self

    def __call__(self, patches: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._compiled is not None and patches.shape == self._shape:
            return self._compiled(patches, *args, **kwargs)
        return self._eager(patches, *args, **kwargs)

    def run_as_written(self) -> None:
        """Leaves the compiled graph, and frees it."""
        if self._compiled is not None:
            self._compiled = None
            torch.compiler.reset()

    def compile(
        self, shape: tuple[int, ...], attempt: Callable[[], object], cuda_graphs: bool = False
    ) -> float:
        """Compiles for patches of a shape.

        Args:
            shape: (B, V, P).
            attempt: uses the network as it will be used, changing nothing.
            cuda_graphs: record its kernels and replay them, which spares their launches. An
                answer, and its gradients, then last only until the network is asked again.

        Returns:
            Seconds that it took.

        Raises:
            NotCompiled: it can't be done; the network runs as written.
        """
        options: dict[str, Any] | None = {"triton.cudagraphs": True} if cuda_graphs else None
        self._shape = tuple(shape)
        self._compiled = torch.compile(
            self._eager, backend=self._backend, fullgraph=True, dynamic=False, options=options
        )
        start = time.perf_counter()
        try:
            for _ in range(3 if cuda_graphs else 1):  # compiled, recorded, replayed
                attempt()
        except RuntimeError as error:  # what is wrong with the network itself is met again
            self._compiled = None
            raise NotCompiled(textwrap.shorten(str(error), 160, placeholder=" ...")) from error
        return time.perf_counter() - start


def wants_compiling(setting: str, device: torch.device) -> bool:
    """Whether to compile: `auto` does on GPUs, where it pays within minutes."""
    return setting in ("on", "graphs") or (setting == "auto" and device.type == "cuda")

"""Compiling a network: one graph for one shape; what fails runs eagerly."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit

from maskdm.words import one_line

Shape = tuple[int, ...]


class NotCompiled(RuntimeError):
    """The network cannot be compiled, and runs eagerly."""


class CompiledForward:
    """A network's forward, eager or compiled; it replaces the network's own.

    It is compiled for patches of one shape, as one graph; other shapes run eagerly. Weights, names
    and checkpoints are the network's own, compiled or not; a copy runs eagerly.

    Args:
        model: the network; its `forward` becomes this.
        backend: of torch.compile.

    Attributes:
        shape: (B, V, P) that it was last compiled for, even if in vain; None = eager.
    """

    def __init__(self, model: nn.Module, backend: str | Callable[..., Any] = "inductor"):
        self._eager: Callable[..., Tensor] = model.forward
        self._compiled: Callable[..., Tensor] | None = None
        self._backend = backend
        self.shape: Shape | None = None
        model.forward = self

    def __call__(self, patches: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._compiled is not None and patches.shape == self.shape:
            return self._compiled(patches, *args, **kwargs)
        return self._eager(patches, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # A compiled function cannot be pickled, and a copy of it would keep these weights.
        return {**self.__dict__, "_compiled": None, "shape": None}

    def run_eagerly(self) -> None:
        """Frees the compiled graph."""
        if self._compiled is not None:
            self._compiled = None
            torch.compiler.reset()
        self.shape = None

    def compile(self, shape: Shape, attempt: Callable[[], object]) -> float:
        """Compiles for patches of a shape.

        Args:
            shape: (B, V, P).
            attempt: uses the network as it will be used, changing nothing.

        Returns:
            Seconds that it took.

        Raises:
            NotCompiled: it failed; the network runs eagerly.
        """
        self.shape, start = tuple(shape), time.perf_counter()
        try:
            self._compile(attempt)
        except RuntimeError as error:  # an error of the network itself comes again, eagerly
            reason = one_line(error, 160)
        else:
            return time.perf_counter() - start
        # Here the error is gone, and with it the tensors that its frames held.
        self._compiled = None
        torch.compiler.reset()
        clear_device_cache(garbage_collection=True)
        raise NotCompiled(reason)

    def _compile(self, attempt: Callable[[], object]) -> None:
        self._compiled = torch.compile(
            self._eager, backend=self._backend, fullgraph=True, dynamic=False
        )
        try:
            attempt()
        except FailOnRecompileLimitHit:  # networks of one class share a list of eight graphs
            torch.compiler.reset()
            attempt()


def wants_compiling(setting: str, device: torch.device) -> bool:
    """Whether to compile: `auto` does on GPUs, where it pays within minutes."""
    return setting in ("on", "graphs") or (setting == "auto" and device.type == "cuda")

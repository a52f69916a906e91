"""Compiling a network: one graph for one shape, and never at the price of the work."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

Shape = tuple[int, ...]


class NotCompiled(RuntimeError):
    """The compiler can't do it; the network runs as written."""


@dataclass(frozen=True)
class Compiled:
    """How compiling went.

    Attributes:
        seconds: that it took.
        cuda_graphs: whether kernels are replayed; the compiler leaves that out where it can't.
    """

    seconds: float
    cuda_graphs: bool


class CompiledForward:
    """A network's forward, as written or compiled; stands in the network's place.

    It is compiled for patches of one shape, as one graph; other shapes run as written. Weights,
    names and checkpoints are the network's own, compiled or not; a copy runs as written.

    Args:
        model: the network; its `forward` becomes this.
        backend: of torch.compile.

    Attributes:
        shape: (B, V, P) that it was last compiled for, even if in vain; None = as written.
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
        # What torch.compile gives can't be pickled, and a copy of it would keep these weights.
        return {**self.__dict__, "_compiled": None, "shape": None}

    def run_as_written(self) -> None:
        """Leaves the compiled graph, and frees it."""
        if self._compiled is not None:
            self._compiled = None
            torch.compiler.reset()
        self.shape = None

    def compile(
        self, shape: Shape, attempt: Callable[[], object], cuda_graphs: bool = False
    ) -> Compiled:
        """Compiles for patches of a shape.

        Args:
            shape: (B, V, P).
            attempt: uses the network as it will be used, changing nothing.
            cuda_graphs: record its kernels and replay them, which spares their launches. An
                answer, and its gradients, then last only until the network is asked again.

        Raises:
            NotCompiled: it can't be done; the network runs as written.
        """
        self.shape = tuple(shape)
        skipped, start = counters["inductor"]["cudagraph_skips"], time.perf_counter()
        try:
            self._compile(attempt, cuda_graphs)
        except RuntimeError as error:  # what is wrong with the network itself is met again
            reason = textwrap.shorten(str(error), 160, placeholder=" ...")
        else:
            replayed = cuda_graphs and counters["inductor"]["cudagraph_skips"] == skipped
            return Compiled(time.perf_counter() - start, replayed)
        # Here the error is gone, and with it the tensors that its frames held.
        self._compiled = None
        torch.compiler.reset()
        clear_device_cache(garbage_collection=True)
        raise NotCompiled(reason)

    def _compile(self, attempt: Callable[[], object], cuda_graphs: bool) -> None:
        options: dict[str, Any] | None = {"triton.cudagraphs": True} if cuda_graphs else None
        self._compiled = torch.compile(
            self._eager, backend=self._backend, fullgraph=True, dynamic=False, options=options
        )
        try:
            attempt()
        except FailOnRecompileLimitHit:  # networks of one class share a list of eight graphs
            torch.compiler.reset()
            attempt()
        if cuda_graphs:
            attempt()  # recorded
            attempt()  # replayed


def wants_compiling(setting: str, device: torch.device) -> bool:
    """Whether to compile: `auto` does on GPUs, where it pays within minutes."""
    return setting in ("on", "graphs") or (setting == "auto" and device.type == "cuda")

"""Compiling the network: one graph a stage, and never at the price of the run."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from maskdm.models.build import Backbone
from maskdm.training.step import Batch


class StageForward:
    """A network's forward, as written or compiled; stands in the network's place.

    A stage's shapes never change, so each is compiled for them alone, as one graph. Weights,
    names and checkpoints are the network's own, compiled or not.

    Args:
        model: the network; its `forward` becomes this.
        backend: of torch.compile.
    """

    def __init__(self, model: nn.Module, backend: str = "inductor"):
        self._eager: Callable[..., Tensor] = model.forward
        self._now = self._eager
        self._backend = backend
        model.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._now(*args, **kwargs)

    def run_as_written(self) -> None:
        """Leaves the compiled graph of the stage before."""
        self._now = self._eager

    def compile(self, model: Backbone, batch: Batch, graphs: bool = False) -> str:
        """Compiles for a stage, by a forward and a backward pass that change nothing.

        What the compiler can't do is left as it was: a run never ends for it.

        Args:
            model: the network.
            batch: a batch of the stage, of which only shapes matter.
            graphs: replay CUDA graphs, which spares the launches of small kernels.

        Returns:
            How it went, in words.
        """
        torch.compiler.reset()  # the graphs of the stage before
        self._now = torch.compile(self._eager, backend=self._backend, fullgraph=True, dynamic=False)
        start = time.perf_counter()
        try:
            answer = model(batch.x0, batch.visible, batch.t, batch.labels)
            parameters = [p for p in model.parameters() if p.requires_grad]
            torch.autograd.grad(answer.float().sum(), parameters, allow_unused=True)
        except TorchDynamoException as error:
            self._now = self._eager
            reason = textwrap.shorten(str(error), 160, placeholder=" ...")
            return f"not compiled, runs as written: {reason}"
        return f"compiled in {time.perf_counter() - start:.0f} s"


def wants_compiling(setting: str, device: torch.device) -> bool:
    """Whether to compile: `auto` does on GPUs, where it pays within minutes."""
    return setting == "on" or (setting == "auto" and device.type == "cuda")

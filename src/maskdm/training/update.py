"""What a step does with its batch: forward, backward, clipping, optimizer, averages.

On one GPU all of it can be recorded once a stage and replayed as one CUDA graph: a small network's
step is bound by the launches of its kernels, about a thousand, and a graph has one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn

from maskdm.models.backbone import Backbone
from maskdm.recipe import Recipe, Stage
from maskdm.training.ema import Averages
from maskdm.training.optim import clip_gradients, learning_rate
from maskdm.training.ready import CompiledForward as CompiledForward
from maskdm.training.ready import Ready, make_ready
from maskdm.training.step import Batch, backward
from maskdm.words import one_line

Parts = tuple[Accelerator, Backbone, nn.Module, AcceleratedOptimizer, Averages[Backbone]]

WARM_UPS = 3  # eager steps before one is recorded: libraries set themselves up in the first


@dataclass(frozen=True)
class Recording:
    """A recorded step.

    Attributes:
        batch: what it reads its batch from; kept, for a graph knows its tensors by address alone.
        numbers: float32 () each, where it reads the learning rate, and the shares of averages.
        answer: float32 (2,), where it leaves loss and norm.
        replay: does it with what these hold.
    """

    batch: Batch
    numbers: list[Tensor]
    answer: Tensor
    replay: Callable[[], None]


class Update:
    """Moves weights and averages by a stage's steps.

    Args:
        accelerator: the engine.
        model: the network itself, on the device.
        wrapped, stepper: network and optimizer as the engine prepared them.
        averages: of the weights; they have entered the stage, as has the optimizer.
        stage: whose steps it does.
        ready: what they need besides.

    Attributes:
        ready: the same.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: Backbone,
        wrapped: nn.Module,
        stepper: AcceleratedOptimizer,
        averages: Averages[Backbone],
        stage: Stage,
        ready: Ready,
    ):
        self._accelerator, self._model, self._wrapped = accelerator, model, wrapped
        self._stepper, self._averages = stepper, averages
        self._stage, self.ready = stage, ready
        self._recording: Recording | None = None

    def __call__(self, batch: Batch, stage_step: int) -> Tensor:
        """Does the stage's step of that number, counted from 0.

        Returns:
            Loss, and norm of the gradient before clipping: float32 (2,) on the device, which may
            last until the next call only.
        """
        lr = learning_rate(self._stage, stage_step)
        shares = self._averages.shares(self._stage, stage_step)
        recording = self._recording
        if recording is None:
            return self._do(batch, lr, shares)
        for known, new in zip(_tensors(recording.batch), _tensors(batch), strict=True):
            known.copy_(new)
        for number, value in zip(recording.numbers, (lr, *shares), strict=True):
            number.fill_(value)
        recording.replay()
        return recording.answer

    def _do(self, batch: Batch, lr: float | Tensor, shares: Sequence[float | Tensor]) -> Tensor:
        parts = (self._accelerator, self._model, self._wrapped, self._stepper)
        loss_and_norm = descend(*parts, self._stage, self.ready, batch, lr)
        self._averages.update(self._model, shares)
        return loss_and_norm

    def record(self, example: Batch) -> None:
        """Records a step as a CUDA graph, which later calls replay; changes nothing.

        What a replay works on stays where it is: nobody may replace the weights' or the optimizer's
        tensors, only write into them.

        Args:
            example: a batch of the stage's shapes on a GPU; kept, and overwritten.

        Raises:
            RuntimeError: the step has something that cannot be recorded; it is done eagerly.
        """
        device, num = example.x0.device, len(self._averages.shares(self._stage, 0))
        # Steps of no size: with a rate of 0 weights stay, with shares of 0 averages do.
        numbers = [torch.zeros((), device=device) for _ in range(1 + num)]
        answer = torch.zeros(2, device=device)

        def work() -> None:
            answer.copy_(self._do(example, numbers[0], numbers[1:]))

        with self._same_moments():
            replay = recorded(work, self._stepper.param_groups)
        self._recording = Recording(example, numbers, answer, replay)

    @contextlib.contextmanager
    def _same_moments(self) -> Iterator[None]:
        """Puts the optimizer's moments back after the block: those that are new become 0."""
        state = self._stepper.optimizer.state
        before = {key: {k: v.clone() for k, v in values.items()} for key, values in state.items()}
        try:
            yield
        finally:
            self._stepper.zero_grad()
            for parameter, values in state.items():
                for name, value in values.items():
                    known = before.get(parameter, {}).get(name)
                    value.zero_() if known is None else value.copy_(known)


def descend(
    accelerator: Accelerator,
    model: Backbone,
    wrapped: nn.Module,
    stepper: AcceleratedOptimizer,
    stage: Stage,
    ready: Ready,
    batch: Batch,
    lr: float | Tensor,
) -> Tensor:
    """An optimizer step along the gradient of a batch's loss; see `Update`.

    Returns:
        Loss, and norm of the gradient before clipping: float32 (2,) on the device.
    """
    for group in stepper.param_groups:
        group["lr"] = lr
    how = (ready.schedule, ready.diffusion, ready.micro_batch_size)
    loss = backward(accelerator, wrapped, batch, *how)
    norm = clip_gradients(accelerator, model, stage.clip)
    stepper.step()
    stepper.zero_grad()
    return torch.stack([loss, norm.to(loss.dtype)])


def recorded(work: Callable[[], None], groups: list[dict[str, Any]]) -> Callable[[], None]:
    """Records work on a GPU as a CUDA graph, after doing it a few times; gives what replays it.

    Args:
        work: launches kernels, and reads nothing from the device.
        groups: of the optimizer whose step is part of it.
    """
    stream = _stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                work()
    finally:
        torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    for group in groups:  # torch asks for it while recording, and warns of it otherwise
        group["capturable"] = True
    try:
        # Another thread, which feeds the batches, may use the GPU meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            work()
    finally:
        for group in groups:
            group["capturable"] = False
    return graph.replay


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """A GPU's stream for recording, the same for all stages.

    Where something keeps the node that adds up a weight's gradients, autograd knows the stream of
    its first use: it complains of another one, or cannot be recorded with it.
    """
    return torch.cuda.Stream(device)


def make_update(
    network: CompiledForward,
    parts: Parts,
    recipe: Recipe,
    stage: Stage,
    say: Callable[[str], None],
) -> Update:
    """Readies the network for a stage (`make_ready`), and its update, replayed where that pays.

    To be called on every rank.

    Args:
        network: the model's forward.
        parts: engine, model, and what else `Update` wants before the stage.
        recipe, stage: what is trained.
        say: is told what was done.

    Raises:
        RuntimeError: not even one image fits in the device's memory.
    """
    accelerator, model, *_ = parts
    ready = make_ready(network, model, recipe, stage, accelerator, say)
    update = Update(*parts, stage, ready)
    if ready.recorded is None:
        return update
    try:
        update.record(ready.recorded)
    except RuntimeError as error:
        reason = one_line(error, 160)
    else:
        say("  each step is replayed as one CUDA graph")
        return update
    # Here the error is gone, and with it the tensors that its frames held.
    clear_device_cache(garbage_collection=True)
    say(f"  note: no CUDA graph: {reason}")
    return update


def _tensors(batch: Batch) -> list[Tensor]:
    """The tensors in which batches differ: all but the places of patches that are all seen."""
    parts = [part for part in vars(batch).values() if part is not None]
    return [part for part in parts if part.stride(0)]  # expanded: each image's places are the same

"""Losses and times between two lines of metrics, read from the device once a line."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from maskdm.recipe import Recipe, Stage
from maskdm.runs.checkpoint import Progress

RECENT = 50  # losses whose mean is shown while training goes on


class NonFiniteLoss(RuntimeError):
    """Training diverged: the loss or the gradient is NaN or infinite."""


class Tick:
    """Collects each step's loss and gradient norm without a host sync, and times the loop."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._pending: list[Tensor] = []  # (loss, gradient norm) of steps not yet read
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._restart()

    def _restart(self) -> None:
        self._since = self._lap = time.perf_counter()
        self._first_images = self._progress.images
        self._waited_sec = self._paused_sec = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the block as time spent waiting for data."""
        start = time.perf_counter()
        yield
        self._waited_sec += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the block (previews, saving) from speed and training time."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._paused_sec += seconds
        self._lap += seconds

    @contextlib.contextmanager
    def excluded_from_speed(self) -> Iterator[None]:
        """Excludes the block (compiling) from speed, but not from training time."""
        start = time.perf_counter()
        yield
        self._paused_sec += time.perf_counter() - start

    def add(self, loss_and_norm: Tensor) -> None:
        """Takes a copy of a step's loss and gradient norm, float32 (2,) on the device."""
        self._pending.append(loss_and_norm.clone())

    def read(self, accelerator: Accelerator) -> None:
        """Brings the pending values to the host, averaged over ranks, into the progress.

        Raises NonFiniteLoss, on every rank, with the step at which it began.
        """
        if not self._pending:
            return
        values = accelerator.reduce(torch.stack(self._pending), "mean").tolist()  # the one sync
        self._pending.clear()
        now = time.perf_counter()
        self._progress.elapsed_sec += now - self._lap
        self._lap = now
        first_step = self._progress.step - len(values) + 1
        for step, (loss, norm) in enumerate(values, first_step):
            # fp16's loss scaler meets infinite gradients by design, and skips those steps
            if not math.isfinite(loss) or (accelerator.scaler is None and not math.isfinite(norm)):
                raise NonFiniteLoss(f"loss {loss:g}, gradient norm {norm:g} at step {step}")
            self._progress.tick.append((loss, norm))
            self._recent.append(loss)

    @property
    def recent_loss(self) -> float | None:
        """Mean of the last losses that were read; None before the first."""
        return math.fsum(self._recent) / len(self._recent) if self._recent else None

    def line(self) -> dict[str, Any]:
        """Sums up the time since the last line; begins the next."""
        now, progress = time.perf_counter(), self._progress
        losses = [loss for loss, _ in progress.tick]
        norms = [norm for _, norm in progress.tick if math.isfinite(norm)]  # see read
        seconds = now - self._since - self._paused_sec
        line = {
            "images": progress.images,
            "loss": math.fsum(losses) / len(losses),
            "grad_norm": math.fsum(norms) / len(norms) if norms else None,
            "images_per_sec": (progress.images - self._first_images) / seconds,
            "data_wait": self._waited_sec / seconds,
            "flops": progress.flops,
            "elapsed_sec": progress.elapsed_sec,
        }
        progress.tick = []
        self._restart()
        return line


def with_way_out(
    error: NonFiniteLoss, checkpoint: Path | None, recipe: Recipe, stage: Stage
) -> NonFiniteLoss:
    """The error with what was saved and what to try in its message."""
    saved = f"the last good checkpoint is {checkpoint}" if checkpoint else "nothing was saved"
    tries = ["a lower lr", "a longer warmup"]
    tries += [] if stage.clip else ["clip 1.0"]
    if recipe.diffusion_of(stage).schedule == "linear":
        tries += ["schedule cosine (90 % masking diverges with linear)"]
    return NonFiniteLoss(f"{error}; {saved}; try {', '.join(tries)}")

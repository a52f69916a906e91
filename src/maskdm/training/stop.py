"""Stopping on request: after a signal the loop saves and leaves."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While it is open, Ctrl-C and SIGTERM set a flag; a second one acts as usual."""

    def __init__(self) -> None:
        self.is_set = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # only it may set handlers
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def agreed(self, accelerator: Accelerator, may_ask: bool) -> bool:
        """Whether any rank got a signal; ranks exchange that only where `may_ask`.

        Every rank must call this at the same steps with the same `may_ask`.
        """
        if accelerator.num_processes == 1:
            return self.is_set
        if not may_ask:
            return False
        flag = torch.tensor(float(self.is_set), device=accelerator.device)
        return accelerator.reduce(flag, "sum").item() > 0  # a sync, once a tick

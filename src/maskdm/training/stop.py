"""Stopping on request: after a signal the loop saves and leaves."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator

FROM_PEOPLE = (signal.SIGINT, signal.SIGTERM)
# A closed terminal, and a queue whose time is up. Both may come twice while the run is being saved.
# Windows has neither.
FROM_SYSTEM = tuple(
    getattr(signal, name) for name in ("SIGHUP", "SIGUSR1") if hasattr(signal, name)
)


class StopRequest:
    """While it is open, Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 set a flag.

    A second Ctrl-C or SIGTERM acts as usual. Under nohup, SIGHUP stays ignored.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # only it may set handlers
            for number in (*FROM_PEOPLE, *FROM_SYSTEM):
                if number in FROM_SYSTEM and signal.getsignal(number) is signal.SIG_IGN:
                    continue
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore((*FROM_PEOPLE, *FROM_SYSTEM))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True
        if number in FROM_PEOPLE:
            self._restore(FROM_PEOPLE)

    def _restore(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if number in self._previous:
                signal.signal(number, self._previous.pop(number))  # type: ignore[arg-type]

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

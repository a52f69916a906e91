"""When the loop saves or leaves: after a signal, and when its last checkpoint is old."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
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
        if not self.is_set:  # by the system itself: the handler may interrupt a print
            with contextlib.suppress(OSError):
                os.write(2, b"\nsaving after this step; press Ctrl-C again to stop now\n")
        self.is_set = True
        if number in FROM_PEOPLE:
            self._restore(FROM_PEOPLE)

    def _restore(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if number in self._previous:
                signal.signal(number, self._previous.pop(number))  # type: ignore[arg-type]


class SaveTimer:
    """Says when the last checkpoint is too old.

    Args:
        minutes: the greatest age.
    """

    def __init__(self, minutes: float):
        self._seconds = 60 * minutes
        self.restart()

    def restart(self) -> None:
        """To be called when a checkpoint has been saved."""
        self._since = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._since > self._seconds


def agreed(accelerator: Accelerator, may_ask: bool, *flags: bool) -> list[bool]:
    """For each flag whether any rank has set it; ranks exchange that only where `may_ask`.

    Every rank must call this at the same steps with the same `may_ask`.
    """
    if accelerator.num_processes == 1:
        return list(flags)
    if not may_ask:
        return [False] * len(flags)
    mine = torch.tensor(flags, dtype=torch.float32, device=accelerator.device)
    return (accelerator.reduce(mine, "sum") > 0).tolist()  # a sync, once a tick

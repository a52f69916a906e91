"""When the loop saves or leaves: after a signal, and when its last checkpoint is old."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator

# Ctrl-C, a queue whose time is up, a closed terminal. Windows has only the first two.
SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
)
SAME_REQUEST_SEC = 2.0  # a terminal or a queue, and the launcher: each tells every process


class StopRequest:
    """While it is open, Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 set a flag.

    A later Ctrl-C acts as usual; the others may come as often as they like, since whoever cannot
    wait sends SIGKILL. Under nohup, SIGHUP stays ignored.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._previous: dict[int, Any] = {}

    @property
    def is_set(self) -> bool:
        """Whether a signal has come."""
        return self._since is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # only it may set handlers
            for number in SIGNALS:
                is_hangup = number == getattr(signal, "SIGHUP", None)
                if is_hangup and signal.getsignal(number) is signal.SIG_IGN:
                    continue
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in [*self._previous]:
            signal.signal(number, self._previous.pop(number))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._since is None:  # by the system itself: the handler may interrupt a print
            self._since = now
            with contextlib.suppress(OSError):
                os.write(2, b"\nsaving after this step; press Ctrl-C again to stop now\n")
        elif number == signal.SIGINT and now - self._since > SAME_REQUEST_SEC:
            usual = self._previous.get(number)
            (usual if callable(usual) else signal.default_int_handler)(number, frame)


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

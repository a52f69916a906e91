"""Long computations over rows, in pieces: shared among ranks, continued after a kill."""

from __future__ import annotations

import functools
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from maskdm.engine import process_state
from maskdm.files import write_whole
from maskdm.images.joined import JoinedArrays

PIECE = re.compile(r"(\d{8})-(\d{8})\.npy")
PLAIN_LINE_SEC = 10.0  # without a terminal, a line of progress at most this often


def in_pieces(
    folder: Path,
    num: int,
    size: int,
    compute: Callable[[int, int], np.ndarray],
    what: str,
    show: bool = False,
) -> JoinedArrays:
    """Rows 0..num-1 of an array that is computed piece by piece, each piece kept in a file.

    Pieces that are there already are not computed again; the missing ones are shared among the
    ranks. To be called on every rank, with the same arguments.

    Args:
        folder: of the pieces `START-STOP.npy`; made if it isn't there. All ranks must see it.
        num: rows wanted, at least 1.
        size: rows in a piece, at most.
        compute: gives rows start..stop-1; what it gives must not depend on how they are cut.
        what: said of the progress, `sampling`.
        show: show the progress.

    Returns:
        The rows, memory-mapped.

    Raises:
        ValueError: the folder can't be written, or ranks don't see one folder.
    """
    state = process_state()
    missing = broadcast_object_list([_missing(folder, num, size) if state.is_main_process else []])
    mine = missing[0][state.process_index :: state.num_processes]
    if mine:
        with Steps(sum(b - a for a, b in mine), what, show and state.is_main_process) as steps:
            for start, stop in mine:
                rows = compute(start, stop)
                name = f"{start:08d}-{stop:08d}.npy"
                write_whole(folder / name, functools.partial(np.save, arr=rows))
                steps.add(stop - start)
    state.wait_for_everyone()
    return _joined(folder, num)


class Steps:
    """How far a computation has come: a bar on a terminal, else now and then a line.

    Args:
        total: units of work.
        what: what is done.
        show: whether to show anything.
    """

    def __init__(self, total: int, what: str, show: bool):
        is_terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=what, unit="img", disable=not (show and is_terminal))
        self._plain = show and not is_terminal
        self._what, self._done, self._total = what, 0, total
        self._start = self._told = time.monotonic()

    def add(self, num: int) -> None:
        """Counts so many units as done."""
        self._bar.update(num)
        self._done += num
        now = time.monotonic()
        if self._plain and now - self._told > PLAIN_LINE_SEC:
            self._told, speed = now, self._done / (now - self._start)
            left_sec = (self._total - self._done) / speed
            print(
                f"{self._what}: {self._done:,} of {self._total:,}, {speed:,.3g}/s, "
                f"{left_sec:,.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()


def _found(folder: Path) -> dict[tuple[int, int], Path]:
    """The whole pieces in a folder, by the rows they hold."""
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if match := PIECE.fullmatch(path.name):
            found[int(match[1]), int(match[2])] = path
    return found


def _missing(folder: Path, num: int, size: int) -> list[tuple[int, int]]:
    """Which rows of the first num are in no piece, cut in pieces of at most `size`."""
    is_there = np.zeros(num, bool)
    for (start, stop), path in _found(folder).items():
        if _load(path, stop - start) is None:
            path.unlink()
        else:
            is_there[start:stop] = True
    missing, start = [], 0
    while start < num:
        if is_there[start]:
            start += 1
            continue
        stop = start
        while stop < min(num, start + size) and not is_there[stop]:
            stop += 1
        missing.append((start, stop))
        start = stop
    return missing


def _load(path: Path, num: int) -> np.ndarray | None:
    """A piece, memory-mapped; None where the file is damaged."""
    try:
        rows = np.load(path, mmap_mode="r")
    except (ValueError, EOFError):
        return None
    return rows if len(rows) == num else None


def _joined(folder: Path, num: int) -> JoinedArrays:
    parts, end = [], 0
    for (start, stop), path in _found(folder).items():
        if start <= end < stop:
            rows = _load(path, stop - start)
            if rows is None:
                break
            parts.append(rows[end - start : num - start])
            end = min(stop, num)
        if end == num:
            return JoinedArrays(parts)
    raise ValueError(f"{folder} lacks what other ranks computed: all nodes need one shared disk")

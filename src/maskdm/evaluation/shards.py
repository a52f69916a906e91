"""Long computations over rows, shard by shard: shared among ranks, continued after a kill."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from maskdm.engine import process_state
from maskdm.files import allow_open_files, write_whole
from maskdm.images.joined import JoinedArrays

SHARD = re.compile(r"(\d{8})-(\d{8})\.npy")
Compute = Callable[[int, int], np.ndarray]  # (start, stop) -> rows
PLAIN_LINE_SEC = 10.0  # without a terminal, a line of progress at most this often


def in_shards(
    folder: Path, num: int, size: int, compute: Compute, what: str, show: bool = False
) -> JoinedArrays:
    """Rows 0..num-1 of an array that is computed shard by shard, each kept in a memory-mapped file.

    Shards that exist are not computed again; the missing ones are shared among the ranks. To be
    called on every rank, with the same arguments.

    Args:
        folder: of the shards `START-STOP.npy`, made if need be. All ranks must see it.
        num: rows, at least 1.
        size: rows in a shard, at most.
        compute: gives rows start..stop-1, the same ones however they are sharded.
        what: names the work beside its progress, `sampling`.
        show: show the progress.

    Raises ValueError where the folder cannot be written, or the ranks do not see the same one.
    """
    state = process_state()
    missing = broadcast_object_list([_missing(folder, num, size) if state.is_main_process else []])
    mine = missing[0][state.process_index :: state.num_processes]
    if mine:
        total = sum(stop - start for start, stop in mine)
        with progress_bar(total, what, show and state.is_main_process) as bar:
            for start, stop in mine:
                path = folder / f"{start:08d}-{stop:08d}.npy"
                write_whole(path, functools.partial(np.save, arr=compute(start, stop)))
                bar.update(stop - start)
    state.wait_for_everyone()
    return _joined(folder, num)


def progress_bar(total: int, what: str, show: bool) -> tqdm[Any]:
    """A bar of images on a terminal; otherwise, after a while, a line now and then."""
    plain: dict[str, Any] = {}
    if not sys.stderr.isatty():
        plain = {"mininterval": PLAIN_LINE_SEC, "delay": PLAIN_LINE_SEC}
        plain["bar_format"] = "{desc}: {n:,} of {total:,}, {rate_fmt}, {remaining} left\n"
    return tqdm(total=total, desc=what, unit="img", disable=not show, **plain)


def _shards(folder: Path) -> dict[tuple[int, int], Path]:
    """The files of a folder's shards, by the rows that they hold."""
    matches = ((SHARD.fullmatch(path.name), path) for path in sorted(folder.glob("*")))
    return {(int(match[1]), int(match[2])): path for match, path in matches if match}


def _missing(folder: Path, num: int, size: int) -> list[tuple[int, int]]:
    """Which of the first num rows are in no shard, cut into shards of at most `size`."""
    exists = np.zeros(num, bool)
    for (start, stop), path in _shards(folder).items():
        if _load(path, stop - start) is None:
            path.unlink()
        else:
            exists[start:stop] = True
    rows = np.flatnonzero(~exists)
    gaps = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
    parts = [gap[i : i + size] for gap in gaps for i in range(0, len(gap), size)]
    return [(int(part[0]), int(part[-1]) + 1) for part in parts]


def _load(path: Path, num: int) -> np.ndarray | None:
    """A shard, memory-mapped; None where the file is damaged."""
    try:
        rows = np.load(path, mmap_mode="r")
    except (ValueError, EOFError):
        return None
    return rows if len(rows) == num else None


def _joined(folder: Path, num: int) -> JoinedArrays:
    allow_open_files()  # of which each shard is one
    parts, end = [], 0
    for (start, stop), path in _shards(folder).items():
        if start <= end < stop and (rows := _load(path, stop - start)) is not None:
            parts.append(rows[end - start : num - start])
            end = min(stop, num)
        if end == num:
            return JoinedArrays(parts)
    raise ValueError(
        f"{folder} lacks what other ranks computed: all nodes must share the disk that it is on"
    )

"""Work on images, on all cores, in order, a bounded number at a time."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from typing import TypeVar

import loky
import numpy as np
from loky.process_executor import TerminatedWorkerError

from maskdm.images.prepare import Content
from maskdm.images.source import Item

Result = TypeVar("Result")

CHUNK_IMAGES = 64  # sent to a worker at once,
CHUNK_BYTES = 2**22  # or fewer, where they are large before or after
PENDING_BYTES = 2**27  # of encoded images that are read ahead, but for a single chunk
NUM_INLINE = 4  # so few chunks are done here: workers take half a second to start
WATCH_SEC = 0.5  # between two looks of a worker at whether we are still there


def num_cores() -> int:
    """Cores that this process may use, a container's quota heeded."""
    return int(loky.cpu_count())


def map_chunks(
    function: Callable[[Sequence[Content]], Result],
    items: Iterator[Item],
    result_bytes: int,
    num_workers: int | None = None,
) -> Generator[tuple[list[Item], Result]]:
    """Applies a function to the contents of chunks of items, and yields the results in order.

    Workers are processes: decoders hold Python's lock too often for threads, and one that crashes
    doesn't take the run along.

    Args:
        function: known to a worker by its module and name, or a `functools.partial` of such.
        items: the images; read here, as far ahead as workers need.
        result_bytes: what an image makes of the result.
        num_workers: None = one for each core.

    Yields:
        The items, their contents gone, with what the function made of them.

    Raises:
        ValueError: a decoder crashed.
    """
    chunks = _chunks(items, max(1, min(CHUNK_IMAGES, CHUNK_BYTES // max(1, result_bytes))))
    chunks, is_little = _peek(chunks)
    num_workers = num_workers or num_cores()
    if num_workers == 1 or is_little:
        for chunk in chunks:
            yield _emptied(chunk), function([item.content for item in chunk])
        return
    pool = loky.ProcessPoolExecutor(num_workers, initializer=_leave_with, initargs=(os.getpid(),))
    pending: deque[tuple[list[Item], int, Future[Result]]] = deque()
    oldest, num_bytes = "", 0
    try:
        for chunk in itertools.chain(chunks, [[]]):
            if chunk:
                contents = [item.content for item in chunk]
                size = _chunk_bytes(chunk)
                pending.append((_emptied(chunk), size, pool.submit(function, contents)))
                num_bytes += size
            while pending and (
                not chunk or len(pending) > 2 * num_workers or num_bytes > PENDING_BYTES
            ):
                items_done, size, future = pending.popleft()
                oldest, num_bytes = items_done[0].name, num_bytes - size
                yield items_done, future.result()
    except TerminatedWorkerError:
        raise ValueError(
            "a worker died (a decoder that crashed, or too little memory) on one of the images "
            f"from {oldest or 'the first'} on: take the bad one out"
        ) from None
    finally:
        pool.shutdown(wait=True, kill_workers=True)


def _leave_with(parent: int) -> None:
    """Makes a worker leave when its parent has died: a killed parent can't send it home."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SEC)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which sends us home
    threading.Thread(target=watch, daemon=True).start()


def _chunks(items: Iterator[Item], most: int) -> Iterator[list[Item]]:
    """Items in lists of at most so many, and of no more bytes than a chunk should have."""
    chunk: list[Item] = []
    num_bytes = 0
    for item in items:
        chunk.append(item)
        num_bytes += _num_bytes(item.content)
        if len(chunk) >= most or num_bytes >= CHUNK_BYTES:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


def _peek(chunks: Iterator[list[Item]]) -> tuple[Iterator[list[Item]], bool]:
    """All chunks again, and whether they are so few and small that workers don't pay."""
    first = list[list[Item]]()
    for chunk in chunks:
        first.append(chunk)
        if len(first) > NUM_INLINE or sum(map(_chunk_bytes, first)) > PENDING_BYTES:
            return itertools.chain(iter(first), chunks), False
    return iter(first), True


def _chunk_bytes(chunk: list[Item]) -> int:
    return sum(_num_bytes(item.content) for item in chunk)


def _num_bytes(content: Content) -> int:
    if isinstance(content, np.ndarray):
        return content.nbytes
    return len(content) if isinstance(content, bytes) else 0


def _emptied(chunk: list[Item]) -> list[Item]:
    """Items without their contents, which may be large."""
    return [Item(item.name, b"", item.label) for item in chunk]

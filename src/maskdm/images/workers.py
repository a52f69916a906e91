"""Processing images on all cores: results in order, a bounded number of images at a time."""

from __future__ import annotations

import contextlib
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
import psutil
from loky.process_executor import TerminatedWorkerError

from maskdm.images.decode import Content
from maskdm.images.source import Item

Result = TypeVar("Result")
Chunk = tuple[list[Item], list[Content], int]  # items without contents, these, their bytes

CHUNK_IMAGES = 64  # sent to a worker at once,
CHUNK_BYTES = 2**22  # or fewer, where they or their results are large
PENDING_BYTES = 2**27  # of encoded images that are read ahead, beyond a single chunk
NUM_INLINE = 4  # chunks that need no workers, which take half a second to start
WATCH_SEC = 0.5  # interval at which a worker checks that its parent is alive


def num_cores() -> int:
    """Cores that this process may use; a container's quota counts."""
    return int(loky.cpu_count())


def map_chunks(
    function: Callable[[Sequence[Content]], Result], items: Iterator[Item], result_bytes: int
) -> Generator[tuple[list[Item], Result]]:
    """Applies a function to the contents of chunks of items, and yields the results in order.

    Workers are processes: decoders hold Python's lock too often for threads, and a crash in one
    does not end the run.

    Args:
        function: a module's function, or a `functools.partial` of one, which workers import.
        items: the images; read here, as far ahead as workers need.
        result_bytes: an image's share of the result.

    Yields the items without their contents, and the result. Raises ValueError if a decoder crashed.
    """
    chunks = _chunks(items, max(1, min(CHUNK_IMAGES, CHUNK_BYTES // max(1, result_bytes))))
    num_workers, first = num_cores(), list[Chunk]()
    for chunk in chunks:
        first.append(chunk)
        if len(first) > NUM_INLINE or sum(size for *_, size in first) > PENDING_BYTES:
            break
    else:  # too few and small for workers to pay off
        num_workers = 1
    chunks = itertools.chain(first, chunks)
    del first  # or the contents would stay
    if num_workers == 1:
        for done, contents, _ in chunks:
            yield done, function(contents)
        return
    pool = loky.ProcessPoolExecutor(num_workers, initializer=_leave_with, initargs=(os.getpid(),))
    pending: deque[tuple[list[Item], int, Future[Result]]] = deque()
    oldest, num_bytes = "", 0  # the first image that may not be done; bytes in `pending`
    try:
        for sent, contents, size in itertools.chain(chunks, [([], [], 0)]):
            if sent:
                pending.append((sent, size, pool.submit(function, contents)))
                num_bytes += size
            while pending and (
                not sent or len(pending) > 2 * num_workers or num_bytes > PENDING_BYTES
            ):
                done, size, future = pending.popleft()
                oldest, num_bytes = done[0].name, num_bytes - size
                yield done, future.result()
    except TerminatedWorkerError:
        raise ValueError(
            "a worker process died (a decoder crashed, or memory ran out) on one of the images "
            f"from {oldest or 'the first'} on: remove that image"
        ) from None
    finally:
        pool.shutdown(wait=True, kill_workers=True)


def _leave_with(parent: int) -> None:
    """Makes a worker exit when its parent dies: a killed parent cannot stop its workers."""

    def watch() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(parent)
            # On Unix the parent's id changes at once; on Windows it stays.
            while os.getppid() == parent and process.is_running():
                time.sleep(WATCH_SEC)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops us
    threading.Thread(target=watch, daemon=True).start()


def _chunks(items: Iterator[Item], most: int) -> Iterator[Chunk]:
    """Chunks of at most so many items, and of about CHUNK_BYTES at most."""
    chunk, contents, num_bytes = list[Item](), list[Content](), 0
    for item in items:
        chunk.append(Item(item.name, b"", item.label))
        contents.append(item.content)
        if isinstance(item.content, np.ndarray):
            num_bytes += item.content.nbytes
        elif isinstance(item.content, bytes):
            num_bytes += len(item.content)
        if len(chunk) >= most or num_bytes >= CHUNK_BYTES:
            yield chunk, contents, num_bytes
            chunk, contents, num_bytes = [], [], 0
    if chunk:
        yield chunk, contents, num_bytes

"""A drawing watched while it runs: in a thread of its own, a frame now and then."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from maskdm.app.drawing import Drawing
from maskdm.sampling.generate import to_uint8

FRAME_SEC = 0.25  # between two frames
UNDRAWN = 128  # grey of images whose turn has not come
NOISY, ESTIMATE = "noisy image", "clean estimate"


class Stopped(Exception):
    """Nobody watches the drawing any more."""


@dataclass(frozen=True)
class Frame:
    """A drawing at some moment.

    Attributes:
        images: uint8 (num, H, W, C).
        part: of its evaluations that are done, 0 to 1.
        elapsed_sec: since it began.
        is_last: whether these are the finished images.
    """

    images: np.ndarray
    part: float
    elapsed_sec: float
    is_last: bool = False

    @property
    def remaining_sec(self) -> float:
        """At the same speed; infinite before the first evaluation."""
        if not self.part:
            return float("inf")
        return self.elapsed_sec * max(0.0, 1 - self.part) / self.part


def watched(drawing: Drawing, show: str = NOISY, frame_sec: float = FRAME_SEC) -> Iterator[Frame]:
    """Draws, and gives a frame every `frame_sec` seconds at most, the finished images last.

    A generator that is closed ends the drawing at its next evaluation.

    Args:
        drawing: what to draw.
        show: NOISY = what the sampler holds; ESTIMATE = what the network takes the clean image for.
        frame_sec: between two frames.

    Raises what the drawing raises.
    """
    answers: queue.SimpleQueue[Frame | Exception] = queue.SimpleQueue()
    is_over = threading.Event()
    images = np.full((drawing.num, *drawing.image_shape), UNDRAWN, np.uint8)
    start, last, done = time.perf_counter(), 0.0, 0

    def look(numbers: list[int], x: Tensor, x0: Tensor) -> None:
        nonlocal last, done
        if is_over.is_set():
            raise Stopped
        done += len(numbers)
        elapsed = time.perf_counter() - start
        if elapsed - last < frame_sec:
            return
        last = elapsed
        shown = to_uint8(x0 if show == ESTIMATE else x).cpu().numpy()
        images[[number - drawing.first for number in numbers]] = shown
        part = min(1.0, done / (drawing.num * drawing.evaluations))
        answers.put(Frame(images.copy(), part, elapsed))

    def draw() -> None:
        try:
            finished = drawing.draw(look)
        except Stopped:
            return
        except Exception as error:  # whatever it is, the watcher raises it
            answers.put(error)
            return
        answers.put(Frame(finished, 1.0, time.perf_counter() - start, is_last=True))

    threading.Thread(target=draw, daemon=True).start()
    try:
        yield from _frames(answers)
    finally:
        is_over.set()


def _frames(answers: queue.SimpleQueue[Frame | Exception]) -> Iterator[Frame]:
    """Frames until the last one, skipping those that came while nobody was looking."""
    while True:
        answer = answers.get()
        while not answers.empty() and not isinstance(answer, Exception):
            answer = answers.get()
        if isinstance(answer, Exception):
            raise answer
        yield answer
        if answer.is_last:
            return

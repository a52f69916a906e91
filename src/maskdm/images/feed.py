"""Batches of images on the device, fetched ahead of the training step."""

from __future__ import annotations

import functools
import math
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from maskdm.images.joined import Array
from maskdm.images.order import ImageOrder
from maskdm.images.store import Store
from maskdm.words import size_text

NUM_AHEAD = 2  # batches fetched before they are requested
RESIDENT_SHARE = 0.25  # of a GPU's memory that images may fill with resident auto
COPY_BYTES = 2**26  # copied to the device at a time
MOST_WAITING = 0.05  # share of time spent waiting for images, above which a note is due

Fetched = tuple[Tensor, Tensor | None, torch.cuda.Event | None]
"""Images, uint8 (B, H, W, C), and labels, int64 (B,), on the device; what it has to wait for."""


class Feed:
    """A rank's share of each batch, in the endless order of the run.

    Images are kept in the device's memory where `residence` says so; else a thread gathers the
    next batches from the memory-mapped store and copies them to a GPU from pinned memory while it
    computes. Batches are a function of the position alone.

    Args:
        store: the images.
        subset: indices of the images to train on, int64, sorted.
        order: their order; of as many images as the subset has.
        rank, num_ranks: choose the share of each batch.
        device: of the batches.
        resident: `auto`, `on` or `off`, as in `recipe.Data`.
        with_labels: whether batches have labels.
    """

    def __init__(
        self,
        store: Store,
        subset: np.ndarray,
        order: ImageOrder,
        rank: int,
        num_ranks: int,
        device: torch.device,
        resident: str = "auto",
        with_labels: bool = False,
    ):
        self._order, self._rank, self._num_ranks, self._device = order, rank, num_ranks, device
        num_bytes = len(subset) * math.prod(store.images.shape[1:])
        self.is_resident, self.how = residence(num_bytes, device, resident)
        self._images: Array | Tensor = store.images
        self._subset, self._labels = subset, None
        if with_labels:
            assert store.labels is not None
            self._labels = torch.from_numpy(store.labels[subset])
        if self.is_resident:
            self._images = _to_device(store.images, subset, device)
            self._labels = None if self._labels is None else self._labels.to(device)
        is_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if is_gpu and not self.is_resident else None
        # In every new thread the device is GPU 0.
        enter = functools.partial(torch.cuda.set_device, _number(device)) if is_gpu else None
        self._thread = ThreadPoolExecutor(1, "feed", enter)
        self._ahead: dict[tuple[int, int], Future[Fetched]] = {}  # by position and batch size
        self._num_slow, self._is_noted = 0, False

    def next(self, position: int, batch_size: int) -> tuple[Tensor, Tensor | None]:
        """This rank's share of the global batch that starts at `position` of the order.

        Returns:
            uint8 (B, H, W, C) and int64 (B,) or None, on the device, B = batch_size / ranks.
        """
        places = [(position + i * batch_size, batch_size) for i in range(NUM_AHEAD + 1)]
        kept = {place: self._ahead[place] for place in places if place in self._ahead}
        for place in self._ahead.keys() - kept.keys():  # of an earlier stage
            self._ahead[place].cancel()
        self._ahead = {p: kept.get(p) or self._thread.submit(self._fetch, *p) for p in places}
        images, labels, ready = self._ahead.pop(places[0]).result()
        if ready is not None:
            now = torch.cuda.current_stream(self._device)
            now.wait_event(ready)
            images.record_stream(now)
            if labels is not None:
                labels.record_stream(now)
        return images, labels

    def close(self) -> None:
        """Stops the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def note_waiting(self, share: float) -> str | None:
        """A note for a run that waits too long for images: once, else None.

        A single slow interval, such as a cold start, is ignored. `share` is that of the time since
        the last call which was spent waiting.
        """
        self._num_slow = self._num_slow + 1 if share > MOST_WAITING else 0
        if self._num_slow < 2 or self._is_noted:
            return None
        self._is_noted = True
        advice = "move the store to a faster disk with the environment variable MASKDM_CACHE"
        if not self.is_resident:
            advice += ", or keep the images in memory with --data.resident on"
        return f"note: {100 * share:.0f} % of the time is spent waiting for images: {advice}"

    def _fetch(self, position: int, batch_size: int) -> Fetched:
        chosen = self._order.rank_indices(position, batch_size, self._rank, self._num_ranks)
        places = torch.from_numpy(chosen)
        if isinstance(self._images, Tensor):
            places = self._copied(places)
            labels = None if self._labels is None else self._labels[places]
            return self._images.index_select(0, places), labels, None
        images = _gather(self._images, self._subset[chosen])
        with torch.cuda.stream(self._stream):  # without one, this does nothing
            images = self._copied(images)
            labels = None if self._labels is None else self._copied(self._labels[places])
        return images, labels, self._stream.record_event() if self._stream else None

    def _copied(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; a copy to a GPU does not wait for the step to end."""
        if self._device.type != "cuda":
            return tensor.to(self._device)
        return tensor.pin_memory().to(self._device, non_blocking=True)


def residence(num_bytes: int, device: torch.device, wanted: str) -> tuple[bool, str]:
    """Whether to keep the images in the device's memory, and the reason in words.

    `auto` keeps them on a GPU where they fill at most a quarter of its memory: the rest is for the
    model, its gradients and the activations. `on` and `off` decide by themselves.
    """
    kept = f"{size_text(num_bytes)} resident in the memory of {device}"
    mapped = f"{size_text(num_bytes)} memory-mapped, {NUM_AHEAD} batches ahead"
    if wanted == "on":
        return True, f"{kept}, as in the recipe"
    if wanted == "off" or device.type != "cuda":
        return False, mapped
    total = torch.cuda.get_device_properties(device).total_memory
    room = f"a quarter of its {size_text(total)}"
    if num_bytes <= RESIDENT_SHARE * total:
        return True, f"{kept} (at most {room})"
    return False, f"{mapped} (more than {room} of {device})"


def _number(device: torch.device) -> int:
    """A GPU's number, which the device of a run on one GPU does not name."""
    return torch.cuda.current_device() if device.index is None else device.index


def _to_device(images: Array, subset: np.ndarray, device: torch.device) -> Tensor:
    """A copy of the chosen images on the device: uint8 (n, H, W, C)."""
    copy = torch.empty((len(subset), *images.shape[1:]), dtype=torch.uint8, device=device)
    step = max(1, COPY_BYTES // math.prod(images.shape[1:]))
    for start in range(0, len(subset), step):
        copy[start : start + step] = torch.from_numpy(images[subset[start : start + step]])
    return copy


def _gather(images: Array, indices: np.ndarray) -> Tensor:
    """The images with these indices: uint8 (n, H, W, C)."""
    if not isinstance(images, np.ndarray):
        return torch.from_numpy(images[indices])
    rows = torch.from_numpy(images).flatten(1)  # torch copies whole rows, on several threads
    chosen = rows.index_select(0, torch.from_numpy(indices))
    return chosen.view(len(indices), *images.shape[1:])

"""Batches on the device, ahead of the step that wants them."""

from __future__ import annotations

import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from maskdm.images.joined import Array
from maskdm.images.order import ImageOrder
from maskdm.images.problems import size_text
from maskdm.images.store import Store

NUM_AHEAD = 2  # batches fetched before they are asked for
RESIDENT_SHARE = 0.25  # of a GPU's memory that images may fill by themselves
COPY_BYTES = 2**26  # copied to the device at a time
MOST_WAITING = 0.05  # share of the time spent waiting for images that goes without a word

Place = tuple[int, int]  # position in the order, global batch size


@dataclass(frozen=True)
class Fetched:
    """A rank's share of a batch.

    Attributes:
        images: uint8 (B, H, W, C) on the device.
        labels: int64 (B,) on the device, or None.
        ready: what the device has to wait for, or None.
    """

    images: Tensor
    labels: Tensor | None
    ready: torch.cuda.Event | None


class Feed:
    """A rank's share of each batch, read in the endless order of the run.

    Images lie in the device's memory where that was asked for or is sensible; else a thread
    gathers the next batches from the memory-mapped store, and copies them to a GPU from pinned
    memory beside the computation. What comes is a function of the position alone.

    Args:
        store: the images.
        subset: those that are trained on, int64, sorted.
        order: in which; of as many images as the subset has.
        rank, num_ranks: whose share.
        device: where batches go.
        resident: `auto`, `on` or `off`, as in `recipe.Data`.
        with_labels: whether labels are wanted.
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
        self._labels = None
        if with_labels:
            assert store.labels is not None
            self._labels = torch.from_numpy(store.labels[subset])
        if self.is_resident:
            self._images: Array | Tensor = _to_device(store.images, subset, device)
            self._labels = None if self._labels is None else self._labels.to(device)
        else:
            self._images, self._subset = store.images, subset
            self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "feed", self._enter_thread)
        self._ahead: dict[Place, Future[Fetched]] = {}
        self._num_slow, self._is_told = 0, False

    def next(self, position: int, batch_size: int) -> tuple[Tensor, Tensor | None]:
        """This rank's share of the global batch that starts at `position` of the order.

        Returns:
            uint8 (B, H, W, C) and int64 (B,) or None, on the device, B = batch_size / ranks.
        """
        places = [(position + i * batch_size, batch_size) for i in range(NUM_AHEAD + 1)]
        known = {place: self._ahead[place] for place in places if place in self._ahead}
        for place in self._ahead.keys() - known.keys():  # of a stage that has ended
            self._ahead[place].cancel()
        self._ahead = {p: known.get(p) or self._thread.submit(self._fetch, *p) for p in places}
        fetched = self._ahead.pop(places[0]).result()
        if fetched.ready is not None:
            now = torch.cuda.current_stream(self._device)
            now.wait_event(fetched.ready)
            fetched.images.record_stream(now)
            if fetched.labels is not None:
                fetched.labels.record_stream(now)
        return fetched.images, fetched.labels

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def note_waiting(self, share: float) -> str | None:
        """What to say of the share of time spent waiting for images, if anything: once a run.

        A single slow stretch, such as a cold start, goes without a word.
        """
        self._num_slow = self._num_slow + 1 if share > MOST_WAITING else 0
        if self._num_slow < 2 or self._is_told:
            return None
        self._is_told = True
        advice = "name a faster disk with the environment variable MASKDM_CACHE"
        if not self.is_resident:
            advice += ", or keep the images in memory with --data.resident on"
        return f"note: {100 * share:.0f} % of the time goes into waiting for images: {advice}"

    def _enter_thread(self) -> None:
        """A new thread's device is GPU 0, whatever this one's is."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def _fetch(self, position: int, batch_size: int) -> Fetched:
        chosen = self._order.rank_indices(position, batch_size, self._rank, self._num_ranks)
        places = torch.from_numpy(chosen)
        if self.is_resident:
            assert isinstance(self._images, Tensor)
            if self._device.type == "cuda":
                places = places.pin_memory()  # else the copy waits for the step to end
            places = places.to(self._device, non_blocking=True)
            images = self._images.index_select(0, places)
            return Fetched(images, self._chosen_labels(places), None)
        assert not isinstance(self._images, Tensor)
        images, labels = _gather(self._images, self._subset[chosen]), self._chosen_labels(places)
        if self._stream is None:
            labels = None if labels is None else labels.to(self._device)
            return Fetched(images.to(self._device), labels, None)
        with torch.cuda.stream(self._stream):
            images = images.pin_memory().to(self._device, non_blocking=True)
            if labels is not None:
                labels = labels.pin_memory().to(self._device, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record(self._stream)
        return Fetched(images, labels, ready)

    def _chosen_labels(self, places: Tensor) -> Tensor | None:
        return None if self._labels is None else self._labels[places]


def residence(num_bytes: int, device: torch.device, wanted: str) -> tuple[bool, str]:
    """Whether the images go into the device's memory, and the reason in words.

    By itself only onto a GPU, where they take at most a quarter of its memory: the rest is for
    the model, its gradients and the activations.
    """
    size = size_text(num_bytes)
    if wanted == "on":
        return True, f"{size} resident in the memory of {device}, as the recipe says"
    if wanted == "off" or device.type != "cuda":
        return False, f"{size} memory-mapped, {NUM_AHEAD} batches ahead"
    total = torch.cuda.get_device_properties(device).total_memory
    room = f"a quarter of its {size_text(total)}"
    if num_bytes <= RESIDENT_SHARE * total:
        return True, f"{size} resident in the memory of {device} (at most {room})"
    return False, f"{size} memory-mapped, {NUM_AHEAD} batches ahead (more than {room} of {device})"


def _to_device(images: Array, subset: np.ndarray, device: torch.device) -> Tensor:
    """A copy of the chosen images on the device: uint8 (n, H, W, C)."""
    copy = torch.empty((len(subset), *images.shape[1:]), dtype=torch.uint8, device=device)
    step = max(1, COPY_BYTES // math.prod(images.shape[1:]))
    for start in range(0, len(subset), step):
        copy[start : start + step] = torch.from_numpy(images[subset[start : start + step]])
    return copy


def _gather(images: Array, indices: np.ndarray) -> Tensor:
    """The images with these numbers: uint8 (n, H, W, C)."""
    if not isinstance(images, np.ndarray):
        return torch.from_numpy(images[indices])
    rows = torch.from_numpy(images).flatten(1)  # torch copies whole rows, on several threads
    chosen = rows.index_select(0, torch.from_numpy(indices))
    return chosen.view(len(indices), *images.shape[1:])

"""Arrays in pieces, read as one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class JoinedArrays:
    """Several arrays as one along their first axis, read by slices or by index arrays.

    Args:
        parts: (n, ...) each, of one type and with the same further axes; at least one.
    """

    def __init__(self, parts: Sequence[np.ndarray]):
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.shape = (int(self._ends[-1]), *parts[0].shape[1:])
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, where: int | slice | np.ndarray) -> np.ndarray:
        """A copy: (n, ...), or without the first axis for a single index."""
        if isinstance(where, np.ndarray):
            indices = where
        else:
            indices = np.asarray(range(len(self))[where])
        flat = np.atleast_1d(indices)
        numbers = np.searchsorted(self._ends, flat, side="right")
        joined = np.empty((len(flat), *self.shape[1:]), self.dtype)
        for number in np.unique(numbers):
            chosen = numbers == number
            begin = self._ends[number] - len(self._parts[number])
            joined[chosen] = self._parts[number][flat[chosen] - begin]
        return joined if indices.ndim else joined[0]

    def columns(self, which: slice) -> JoinedArrays:
        """Some of the second axis, still unread."""
        return JoinedArrays([part[:, which] for part in self._parts])


class SelectedRows(JoinedArrays):
    """Some rows of an array, unread until they are asked for.

    Args:
        array: (N, ...).
        rows: which, int64 (n,).
    """

    def __init__(self, array: Array, rows: np.ndarray):
        self._array, self._rows = array, rows
        self.shape, self.dtype = (len(rows), *array.shape[1:]), array.dtype

    def __getitem__(self, where: int | slice | np.ndarray) -> np.ndarray:
        """A copy: (n, ...), or without the first axis for a single index."""
        chosen = self._rows[where]
        return self._array[chosen if isinstance(chosen, np.ndarray) else int(chosen)]

    def columns(self, which: slice) -> JoinedArrays:
        """Some of the second axis, still unread."""
        return SelectedRows(columns(self._array, which), self._rows)


Array = np.ndarray | JoinedArrays


def columns(array: Array, which: slice) -> Array:
    """Some of an array's second axis, (N, D) -> (N, d), without reading it."""
    return array.columns(which) if isinstance(array, JoinedArrays) else array[:, which]

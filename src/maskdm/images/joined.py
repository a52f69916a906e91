"""Several arrays read as one, and some rows of an array, without copying them first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class JoinedArrays:
    """Arrays (n, ...) of one type as one along their first axis, read by slices or index arrays."""

    def __init__(self, parts: Sequence[np.ndarray]):
        self.parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.shape = (int(self._ends[-1]), *parts[0].shape[1:])
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, where: int | slice | np.ndarray) -> np.ndarray:
        """A copy: (n, ...), or without the first axis for a single index."""
        if not isinstance(where, np.ndarray):
            where = np.asarray(range(len(self))[where])
        flat = np.atleast_1d(where)
        numbers = np.searchsorted(self._ends, flat, side="right")
        joined = np.empty((len(flat), *self.shape[1:]), self.dtype)
        for number in np.unique(numbers):
            chosen = numbers == number
            begin = self._ends[number] - len(self.parts[number])
            joined[chosen] = self.parts[number][flat[chosen] - begin]
        return joined if where.ndim else joined[0]


class SelectedRows(JoinedArrays):
    """Some rows, int64 (n,), of an array (N, ...), each read when it is indexed."""

    def __init__(self, array: Array, rows: np.ndarray):
        self.array, self.rows = array, rows
        self.shape, self.dtype = (len(rows), *array.shape[1:]), array.dtype

    def __getitem__(self, where: int | slice | np.ndarray) -> np.ndarray:
        """A copy: (n, ...), or without the first axis for a single index."""
        chosen = self.rows[where]
        return self.array[chosen if isinstance(chosen, np.ndarray) else int(chosen)]


Array = np.ndarray | JoinedArrays


def columns(array: Array, which: slice) -> Array:
    """Part of an array's second axis, (N, D) -> (N, d), without reading it."""
    if isinstance(array, SelectedRows):
        return SelectedRows(columns(array.array, which), array.rows)
    if isinstance(array, JoinedArrays):
        return JoinedArrays([part[:, which] for part in array.parts])
    return array[:, which]

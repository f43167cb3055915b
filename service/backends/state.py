"""The memory that the condition state lies in: the host's, or that of the device where the network runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
# An array of a state memory, whose rows can be sliced.
StateArray = Any


class StateMemory(Protocol):
    """Arrays of float32 rows, of which `denoise` takes slices without a copy to another memory."""

    def zeros(self, rows: int, shape: tuple[int, ...]) -> StateArray:
        """Return a new array (rows, *shape) of zeros. Raises `MemoryError` if there is no room for it."""
        ...

    def write(self, array: StateArray, places: Sequence[int] | slice, values: StateArray) -> None:
        """Set the rows of an array at these places. `values` are of the host or of this memory."""
        ...

    def take(self, array: StateArray, places: Sequence[int], out: StateArray) -> None:
        """Copy the rows of an array at these places to the first rows of `out`."""
        ...


class HostMemory:
    """Arrays of numpy."""

    def zeros(self, rows: int, shape: tuple[int, ...]) -> Floats:
        return np.zeros((rows, *shape), np.float32)

    def write(self, array: Floats, places: Sequence[int] | slice, values: Floats) -> None:
        array[places] = values

    def take(self, array: Floats, places: Sequence[int], out: Floats) -> None:
        # By default numpy copies `out` first, so that an index out of range leaves it as it was.
        np.take(array, np.asarray(places, np.intp), axis=0, out=out[: len(places)], mode="clip")

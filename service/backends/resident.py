"""Rows that live on a device: the part of a backend that keeps latents there and steps them.

Such a backend holds latents, solver history and condition states in numbered slots of device memory. For a
turn of several steps the host sends two small arrays: whole numbers that say where things lie, and the
coefficients of the steps. Nothing comes back but flags, which the engine reads one turn late, and the latents
of samples that are done. A backend without this part is given the rows of every step as arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ditserve.service.backends.adapters import RowUses
from ditserve.service.backends.state import Floats, StateArray

# The most steps of one turn.
MOST_STEPS: Final = 16
# The lines of `DeviceTurn.places` before those of the slabs: see there.
SLOT, ROW_OF, SUBTRACTED, NEWEST, NOISE = range(5)
SLAB: Final = 5
# The lines of `DeviceTurn.numbers`: ten step coefficients, then alpha and sigma of the picture that stays.
NUMBERS: Final = 12
# The batch sizes whose kernels are captured: 1, 2, 3, 4, 6, 8, 12 … 1024.
GRAPH_SIZES: Final = tuple(sorted({1, *(1 << k for k in range(1, 11)), *(3 << k for k in range(9))}))


class Slab(NamedTuple):
    """One tensor of the condition state for many keys; `SLAB + line` is its line in `DeviceTurn.places`."""

    array: StateArray
    line: int


@dataclass(frozen=True, slots=True, eq=False)
class DeviceTurn:
    """The numbers of k steps of one batch, whose R rows are one of the backend's batch sizes.

    The first n of the R rows are those of n samples, one each. The rows of guidance follow, then padding. A
    line of `places` (k, SLAB + lines, R) int64 has for every row, or for the sample of that row:

        SLOT        the slot of the sample; one beyond the last slot for what is no sample
        ROW_OF      the row of the sample whose latent this row sees
        SUBTRACTED  the row that guidance subtracts from the sample's; its own if it is not guided
        NEWEST      the place of the sample's newest estimate, 2 · slot or 2 · slot + 1
        NOISE       the block of `noise` that the sample's step adds, counted from 1; 0 for none
        SLAB + i    the place of the row's condition state in the slabs of line i

    `numbers` (k, NUMBERS, R) float32 are the coefficients of the samples' steps. `noise` (m, C, H, W) may be
    empty. `latents` are slots, and `estimates` places, that are read after the last step. `adapters` has
    those of every row; empty if no row has any.
    """

    places: npt.NDArray[np.int64]
    numbers: Floats
    noise: Floats
    latents: tuple[int, ...] = ()
    estimates: tuple[int, ...] = ()
    adapters: Sequence[RowUses] = ()

    @property
    def steps(self) -> int:
        return len(self.places)

    @property
    def rows(self) -> int:
        return int(self.places.shape[2])


class Landed(NamedTuple):
    """The outcome of a turn: whether the estimates are finite, (k, R), what was to be read, and its time."""

    finite: npt.NDArray[np.bool_]
    latents: list[Floats]
    estimates: list[Floats]
    device_s: float


class Ticket(Protocol):
    """A turn that a device was given."""

    def wait(self) -> Landed:
        """Return the outcome once the device is done. Errors of the turn are raised here."""
        ...


class ResidentRows(Protocol):
    """Latents with their solver history in the slots of a device, and the steps over them.

    All calls take effect in their order. None waits for the device but those that return what lies there. At
    most two turns may be under way.

    Args:
        noise_blocks: the most blocks of noise that a turn may have.
    """

    noise_blocks: int

    def put(self, slot: int, latent: Floats) -> None:
        """Set the latent (C, H, W) of a slot."""
        ...

    def put_history(self, slot: int, history: Sequence[Floats]) -> None:
        """Set the estimates (C, H, W) at 2 · slot and 2 · slot + 1; those that are not given become 0."""
        ...

    def put_source(self, slot: int, latent: Floats, noise: Floats, mask: Floats) -> None:
        """Set the picture and noise (C, H, W) that are put back into a slot where `mask` (1, H, W) is 0."""
        ...

    def latent(self, slot: int) -> Floats:
        """Return the latent (C, H, W) of a slot."""
        ...

    def history(self, slot: int) -> Floats:
        """Return the estimates (2, C, H, W) of a slot, at 2 · slot and at 2 · slot + 1."""
        ...

    def noise(self, blocks: int) -> Floats:
        """Return an array (blocks, C, H, W) of the host for the noise of the next turn."""
        ...

    def open(self, rows: int) -> None:
        """Make batches of so many rows ready, once. Raises `OutOfMemory` if there is no room for them."""
        ...

    def run(self, turn: DeviceTurn) -> Ticket:
        """Give the device a turn of an open batch size."""
        ...


@runtime_checkable
class KeepsRows(Protocol):
    """A backend that can keep rows on its device."""

    def keep_rows(self, slabs: Sequence[Slab], *, slots: int, rows: int) -> ResidentRows | None:
        """Return slots for latents of the bundle's own size, for batches of at most `rows` rows.

        None where they are better kept by the host. Raises `OutOfMemory`: the device has no room for them.
        """
        ...

    def modulate_there(self, timesteps: Floats, embeddings: Floats) -> tuple[StateArray, ...]:
        """Return the condition state as `Backend.modulate` does, in the memory of the device."""
        ...

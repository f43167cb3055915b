"""The slot pool: the latents of all running samples, in one block of memory, and the solver step over any of them.

Everything is allocated once. A step gathers the rows of a batch and, after the network has run, advances them in one
vectorised expression, whatever solver, grid and position each is at. All arithmetic is element by element, so a
sample's numbers do not depend on its company.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


class SlotPool:
    """`slots` latents of `shape` (C, H, W) and their solver history; batches of at most `rows` rows."""

    def __init__(self, slots: int, shape: tuple[int, int, int], *, rows: int, clip: bool) -> None:
        self.shape = shape
        self._clip = clip
        self._latents: Floats = np.zeros((slots, *shape), np.float32)  # x of every slot
        self._history: Floats = np.zeros((slots, *shape), np.float32)  # D of its last step
        self._free = list(range(slots))[::-1]
        self._x: Floats = np.zeros((rows, *shape), np.float32)  # the batch at hand
        self._estimate: Floats = np.empty((rows, *shape), np.float32)
        self._scratch: Floats = np.empty((rows, *shape), np.float32)
        self._gathered = np.empty(0, np.intp)  # the slots of the batch at hand

    def lone(self, size: tuple[int, int]) -> SlotPool:
        """A pool like this one for a single latent of another size."""
        return SlotPool(1, (self.shape[0], *size), rows=1, clip=self._clip)

    def reserve(self, rows: int) -> None:
        """Make batches of so many rows possible, between two steps."""
        if rows > len(self._x):
            self._x = np.zeros((rows, *self.shape), np.float32)

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> tuple[int, Floats]:
        """A free slot and its latent, to be filled with noise."""
        slot = self._free.pop()
        self._history[slot] = 0.0  # a history weight of 0 must not meet a NaN left behind
        return slot, self._latents[slot]

    def release(self, slot: int) -> None:
        self._free.append(slot)

    def latent(self, slot: int) -> Floats:
        """A copy of a slot's latent (C, H, W)."""
        latent: Floats = self._latents[slot]
        return latent.copy()

    def history(self, slot: int) -> Floats:
        """A copy of the solver's history of a slot (C, H, W)."""
        history: Floats = self._history[slot]
        return history.copy()

    def restore(self, slot: int, latent: Floats, history: Floats) -> None:
        """Put what another pool held into a slot."""
        self._latents[slot], self._history[slot] = latent, history

    def gather(self, slots: Sequence[int], guided: Sequence[int]) -> Floats:
        """The network's input: one row per slot, then a second one for each of `guided` (places in `slots`).

        The rows of the returned block (rows, C, H, W) past those hold leftovers and serve as padding.
        """
        n = len(slots)
        self._gathered = np.array(slots, np.intp)
        np.take(self._latents, self._gathered, axis=0, out=self._x[:n], mode="clip")
        if guided:
            self._x[n : n + len(guided)] = self._x[list(guided)]
        return self._x

    def advance(
        self, output: Floats, lines: Floats, generators: Sequence[np.random.Generator]
    ) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """One solver step of the slots last gathered: x' = a·x + b·D + c·D_previous + s·z, D = x0_x·x + x0_out·output.

        Args:
            output: the guided network output (n, C, H, W).
            lines: (n, 6): x0_x, x0_out, a, b, c, s.
            generators: one per slot; noise is drawn only where s is not zero.

        Returns:
            The estimates D (n, C, H, W), valid until the next call, and whether each is finite (n,).
        """
        slots = self._gathered
        n = len(slots)
        x0_x, x0_out, a, b, c, s = np.ascontiguousarray(lines.T).reshape(6, n, 1, 1, 1)
        x, d, scratch = self._x[:n], self._estimate[:n], self._scratch[:n]
        with np.errstate(all="ignore"):
            np.multiply(x, x0_x, out=d)
            d += np.multiply(output, x0_out, out=scratch)
            finite: npt.NDArray[np.bool_] = np.all(np.isfinite(d), axis=(1, 2, 3))
            if self._clip:
                np.clip(d, -1.0, 1.0, out=d)
            x *= a
            x += np.multiply(d, b, out=scratch)
            if c.any():
                np.take(self._history, slots, axis=0, out=scratch, mode="clip")
                x += np.multiply(scratch, c, out=scratch)
            for i in np.flatnonzero(s).tolist():
                generators[i].standard_normal(out=scratch[i], dtype=np.float32)
                x[i] += s[i] * scratch[i]
        self._latents[slots] = x
        self._history[slots] = d
        return d, finite

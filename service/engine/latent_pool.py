"""The latent pool: the latents of all samples of one size in one block, and the solver step over them.

Everything is allocated once. A step gathers the latents of a batch and, after the network has run, advances
them in one vectorised expression, whatever solver, grid and position each is at. All arithmetic is element by
element, so a sample's numbers do not depend on the samples beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ditserve.model.spec.sizes import Size
from ditserve.service.engine.trajectory import StepCoefficients

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Gathered:
    """The latents of some slots of a pool, copied for one forward pass.

    `slots` is (n,). `x` is the pool's block (rows, C, H, W), valid until the next `gather`: the first n rows
    are the latents in the order of `slots`, the others hold leftovers and are free for unconditional rows,
    windows and padding.
    """

    pool: LatentPool
    slots: npt.NDArray[np.intp]
    x: Floats


class LatentPool:
    """`slots` latents of `shape` (C, H, W) with their solver history, for batches of at most `rows` rows.

    Those of clips and volumes are (C, F, H, W), and all arithmetic is the same. With `clip` the estimates are
    clipped to -1..1.
    """

    def __init__(self, slots: int, shape: tuple[int, ...], *, rows: int, clip: bool) -> None:
        self.shape = shape
        self._clip = clip
        self._latents: Floats = np.zeros((slots, *shape), np.float32)  # x of every slot
        # D of its last two steps, of slot k at 2k and 2k + 1, and where the last one is.
        self._history: Floats = np.zeros((2 * slots, *shape), np.float32)
        self._newest = 2 * np.arange(slots)
        self._free = list(range(slots))[::-1]
        self._x: Floats = np.zeros((rows, *shape), np.float32)
        self._estimate: Floats = np.empty((rows, *shape), np.float32)
        self._scratch: Floats = np.empty((rows, *shape), np.float32)

    def single(self, size: Size) -> LatentPool:
        """Return a pool like this one for one latent of another size."""
        return LatentPool(1, (self.shape[0], *size), rows=1, clip=self._clip)

    def reserve(self, rows: int) -> None:
        """Make batches of `rows` rows possible. Called between two steps."""
        if rows > len(self._x):
            self._x = np.zeros((rows, *self.shape), np.float32)

    def take(self, latent: Floats, history: Sequence[Floats] = ()) -> int:
        """Put a latent (C, H, W) into a free slot; return the slot.

        `history` is the D (C, H, W) of its last steps, of none to two, the newest first.
        """
        slot = self._free[-1]
        self._latents[slot] = latent
        # Cleared even for a new sample: a history weight of 0 must not meet a NaN of the slot's last owner.
        self._history[2 * slot : 2 * slot + 2] = 0.0
        for place, estimate in enumerate(history, start=2 * slot):
            self._history[place] = estimate
        self._newest[slot] = 2 * slot
        return self._free.pop()

    def release(self, slot: int) -> None:
        """Make a slot free again."""
        self._free.append(slot)

    def latent(self, slot: int) -> Floats:
        """Return a copy of a slot's latent (C, H, W)."""
        latent: Floats = self._latents[slot]
        return latent.copy()

    def put(self, slot: int, latent: Floats) -> None:
        """Replace a slot's latent (C, H, W); its history stays."""
        self._latents[slot] = latent

    def history(self, slot: int) -> Floats:
        """Return a copy of a slot's solver history (2, C, H, W): the D of its last step, and the one before.

        They are 0 of steps that it has not taken.
        """
        newest = self._newest[slot]
        history: Floats = self._history[[newest, newest ^ 1]]
        return history

    def gather(self, slots: Sequence[int]) -> Gathered:
        """Copy the latents of `slots` into the first rows of the pool's block."""
        indices = np.array(slots, np.intp)
        np.take(self._latents, indices, axis=0, out=self._x[: len(slots)], mode="clip")
        return Gathered(self, indices, self._x)

    def advance(
        self,
        gathered: Gathered,
        output: Floats,
        coefficients: StepCoefficients,
        deviation: Floats,
        generators: Sequence[np.random.Generator],
    ) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Take one solver step: x' = a·x + b·D + c·D' + d·D'' + s·z with D = x0_x·x + x0_out·output.

        Args:
            gathered: the latents as `gather` returned them; its first n rows of `x` are overwritten.
            output: the guided network output (n, C, H, W).
            coefficients: columns (n, 1, 1, 1).
            deviation: what multiplies the noise, s or a learned one in its place, (n, 1, 1, 1) or (n, C, H,
                W).
            generators: one a slot; noise z is drawn only where s is not zero.

        Returns:
            The estimates D (n, C, H, W), valid until the next call, and whether each is finite (n,).
        """
        slots, n = gathered.slots, len(gathered.slots)
        s = coefficients.s
        newest = self._newest[slots]
        oldest = newest ^ 1
        x, estimate, scratch = gathered.x[:n], self._estimate[:n], self._scratch[:n]
        with np.errstate(all="ignore"):
            np.multiply(x, coefficients.x0_x, out=estimate)
            estimate += np.multiply(output, coefficients.x0_out, out=scratch)
            finite: npt.NDArray[np.bool_] = np.all(np.isfinite(estimate), axis=tuple(range(1, x.ndim)))
            if self._clip:
                np.clip(estimate, -1.0, 1.0, out=estimate)
            x *= coefficients.a
            x += np.multiply(estimate, coefficients.b, out=scratch)
            for weight, places in ((coefficients.c, newest), (coefficients.d, oldest)):
                if weight.any():
                    np.take(self._history, places, axis=0, out=scratch, mode="clip")
                    x += np.multiply(scratch, weight, out=scratch)
            for i in np.flatnonzero(s).tolist():
                generators[i].standard_normal(out=scratch[i], dtype=np.float32)
                x[i] += deviation[i] * scratch[i]
        self._latents[slots] = x
        self._history[oldest] = estimate
        self._newest[slots] = oldest
        return estimate, finite

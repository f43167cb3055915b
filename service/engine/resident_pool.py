"""The slots of samples whose latents live on a device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ditserve.model.spec.source import NoisySource
from ditserve.service.backends.resident import ResidentRows
from ditserve.service.engine.latent_pool import Floats


class ResidentPool:
    """The slots of the samples of the bundle's own size, and where the newest estimate of each lies."""

    def __init__(self, rows: ResidentRows, slots: int, shape: tuple[int, ...]) -> None:
        self.rows, self.slots, self.shape = rows, slots, shape
        self._free = list(range(slots))[::-1]
        self.newest = 2 * np.arange(slots)
        self._masked: set[int] = set()

    def take(self, latent: Floats, history: Sequence[Floats] = ()) -> int:
        """Put a latent and its solver history into a free slot, as `LatentPool.take` does."""
        slot = self._free[-1]
        self.rows.put(slot, latent)
        self.rows.put_history(slot, history)
        self.newest[slot] = 2 * slot
        return self._free.pop()

    def keep(self, slot: int, source: NoisySource[Floats] | None) -> None:
        """Let a slot keep what its sample's mask says of a picture; None: nothing."""
        known = None if source is None else source.source
        if source is not None and known is not None and known.mask is not None:
            self.rows.put_source(slot, known.latent, source.noise, known.mask)
            self._masked.add(slot)
        elif slot in self._masked:
            blank = np.zeros(self.shape, np.float32)
            self.rows.put_source(slot, blank, blank, np.ones((1, *self.shape[1:]), np.float32))
            self._masked.remove(slot)

    def release(self, slot: int) -> None:
        """Make a slot free again. What the device still does with it comes before what is put there."""
        self._free.append(slot)

    def latent(self, slot: int) -> Floats:
        """Return a slot's latent (C, H, W), after all turns that the device was given."""
        return self.rows.latent(slot)

    def put(self, slot: int, latent: Floats) -> None:
        """Replace a slot's latent (C, H, W); its history stays."""
        self.rows.put(slot, latent)

    def history(self, slot: int) -> Floats:
        """Return a slot's solver history (2, C, H, W), the newest first."""
        places = self.rows.history(slot)
        return places[::-1].copy() if self.newest[slot] & 1 else places

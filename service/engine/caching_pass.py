"""A forward pass whose first blocks run only for the rows that are due: those of a block cache.

Rows of different phase share the pass: the first blocks for those that are due, and the rest of the network
for all. What the blocks change is kept with each sample, for its next steps alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np

from ditserve.model.spec.block_cache import extrapolated
from ditserve.service.backends import CachingBackend
from ditserve.service.backends.state import StateArray
from ditserve.service.engine.forward import ForwardPass, Prediction
from ditserve.service.engine.groups import Group
from ditserve.service.engine.latent_pool import Floats, LatentPool
from ditserve.service.engine.row_layout import RowLayout
from ditserve.service.engine.samples import KnownChange, Sample

# The changes that an extrapolation is made of.
KEPT = 2


class CachingPass(ForwardPass):
    """The forward pass of a `CachingBackend`."""

    _row_cost = 1.0
    _computed: dict[tuple[str, int], Floats]

    def run(self, group: Group, samples: Sequence[Sample]) -> tuple[list[Prediction], int]:
        self._row_cost, self._computed = group.row_cost, {}
        for sample in samples:
            if not sample.since:
                sample.known_changes = []
            elif any(known.change is None for known in sample.known_changes):
                self._recall(group, sample)
        result = super().run(group, samples)
        for sample in samples:
            if (sample.id, 0) in self._computed:
                change = np.stack([self._computed[sample.id, row] for row in range(sample.rows)])
                pool, slot = group.places[sample.id]
                known = KnownChange(sample.cursor, pool.latent(slot), change)
                sample.known_changes = [*sample.known_changes, known][-KEPT:]
            if sample.trajectory.alike[sample.cursor] == 1:
                sample.known_changes = []  # the next step is another network's, or of other rows
        return result

    def _compute(self, x: Floats, state: tuple[StateArray, ...], first: int) -> Floats:
        backend = cast(CachingBackend, self._backend)
        if self._layout is None:
            # As many rows are due as are in the mean, and one at least.
            changes = self._trunk(x, state, range(0, len(x), backend.block_cache.every))
            return backend.tail(x, state, np.resize(changes, (len(x), *changes.shape[1:])))
        owners = self._layout.owners()[first : first + len(x)]
        due = [k for k, (sample, _) in enumerate(owners) if self._is_due(sample)]
        if due:
            for k, change in zip(due, self._trunk(x, state, due), strict=False):
                sample, row = owners[k]
                self._computed[sample.id, row] = change
        rows = [self._change(sample, row) for sample, row in owners]
        return backend.tail(x, state, np.stack([*rows, *rows[-1:] * (len(x) - len(rows))]))

    def _is_due(self, sample: Sample) -> bool:
        cache = cast(CachingBackend, self._backend).block_cache
        return not sample.known_changes or cache.is_due(sample.since)

    def _change(self, sample: Sample, row: int) -> Floats:
        """Return the change (h, w, D) of a row of a sample: just computed, or extrapolated."""
        if self._is_due(sample):
            return self._computed[sample.id, row]
        known = [(each.step, cast(Floats, each.change)[row]) for each in sample.known_changes]
        return extrapolated(known, sample.cursor)

    def _trunk(self, x: Floats, state: tuple[StateArray, ...], rows: Sequence[int]) -> Floats:
        """Return the changes of these rows, and of the last once more where a batch of more rows is run."""
        size = self._scheduler.size(len(rows), self._row_cost)
        places = [*rows, *[rows[-1]] * (size - len(rows))]
        part = tuple(tensor[places] for tensor in state)
        return cast(CachingBackend, self._backend).trunk(x[places], part)

    def _recall(self, group: Group, sample: Sample) -> None:
        """Compute the changes that a resumed sample knew, of the latents that they were made of."""
        pool, slot = group.places[sample.id]
        assert isinstance(pool, LatentPool)  # with further backbones no rows live on the device
        cursor, latent = sample.cursor, pool.latent(slot)
        try:
            for place, known in enumerate(sample.known_changes):
                sample.cursor = known.step
                pool.put(slot, known.latent)
                sample.known_changes[place] = known._replace(change=self._recalled(group, sample))
        finally:
            sample.cursor = cursor
            pool.put(slot, latent)

    def _recalled(self, group: Group, sample: Sample) -> Floats:
        """Return the changes (rows, h, w, D) of the rows of one sample, at the step where it stands."""
        layout = RowLayout.of([sample])
        gathered, _ = self._gather(layout, group)
        self._condition(layout, [sample])
        cap, parts = self._scheduler.cap(self._row_cost), list[Floats]()
        for first in range(0, layout.rows, cap):
            part = slice(first, min(first + cap, layout.rows))
            state, x = tuple(tensor[part] for tensor in self._state), gathered.x[part]
            parts.append(self._trunk(x, state, range(len(x)))[: len(x)])
        return np.concatenate(parts)

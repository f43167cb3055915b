"""Groups of samples by the size of their rows: only rows of one size share a pass.

A row is a latent as a whole, or a window of one. A sample that is denoised in windows therefore belongs to
the group of the bundle's own size. Which group has its turn is up to the `scheduler`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ditserve.model.spec.windows import Size
from ditserve.service.engine.latent_pool import Floats, LatentPool
from ditserve.service.engine.samples import Sample
from ditserve.service.engine.scheduler import Batch, Candidates, Scheduler
from ditserve.service.planning.costs import NO_WAITS, CostModel, Waits


class Place(NamedTuple):
    """The place of a sample's latent: a slot of a pool."""

    pool: LatentPool
    slot: int


class Group:
    """The samples whose rows have one size, the places of their latents, and the cost of their passes.

    `pool` holds the latents that are denoised as a whole. `row_cost` is the tokens of one row, in rows of the
    bundle's own size.
    """

    __slots__ = ("costs", "places", "pool", "row_cost", "samples", "size")

    def __init__(self, size: Size, pool: LatentPool, costs: CostModel, *, row_cost: float) -> None:
        self.size, self.pool, self.costs, self.row_cost = size, pool, costs, row_cost
        self.samples: dict[str, Sample] = {}
        self.places: dict[str, Place] = {}

    @property
    def rows(self) -> int:
        """Rows of the next step of all samples."""
        return sum(sample.rows for sample in self.samples.values())


class Groups:
    """The groups of one engine: that of the bundle's own size, and one for every other row size in use.

    Args:
        own: the bundle's own size.
        costs: the cost model of passes at that size. Another size starts from it, scaled by tokens, and
            learns by itself.
        make_pool: returns a pool for latents of a size. Memory is touched only as slots are used.
    """

    def __init__(
        self, own: Size, scheduler: Scheduler, costs: CostModel, make_pool: Callable[[Size], LatentPool]
    ) -> None:
        self._scheduler, self._make_pool = scheduler, make_pool
        self.own = Group(own, make_pool(own), costs, row_cost=1.0)
        self._groups = {own: self.own}
        self._run_before: set[tuple[Size, int]] = set()

    def admit(self, sample: Sample, latent: Floats, history: Sequence[Floats] = ()) -> Group:
        """Let a sample take steps from now on, in the group that is returned.

        It starts at `latent` (C, H, W), with the solver history that `LatentPool.take` describes. A sample of
        several rows advances by itself, so its latent is in a pool of its own.
        """
        group = self._group_for(sample)
        pool = group.pool if sample.one_row else group.pool.single(sample.geometry.size)
        group.places[sample.id] = Place(pool, pool.take(latent, history))
        group.samples[sample.id] = sample
        return group

    def remove(self, sample: Sample) -> None:
        """Drop a sample and free its slot; drop its group too if it was the last sample of another size."""
        group = self._groups[sample.geometry.row_size]
        del group.samples[sample.id]
        pool, slot = group.places.pop(sample.id)
        pool.release(slot)
        if not group.samples and group is not self.own:
            del self._groups[group.size]

    def place(self, sample: Sample) -> Place:
        """Return the place of a sample's latent."""
        return self._groups[sample.geometry.row_size].places[sample.id]

    def next_batch(self, now: float) -> tuple[Group, Batch[Sample]]:
        """Return the group whose turn it is and its samples that step now. A sample must be running."""
        waiting = [group for group in self._groups.values() if group.samples]
        batch = self._scheduler.next_batch([self._candidates(group) for group in waiting], now=now)
        return self._groups[batch.samples[0].geometry.row_size], batch

    def observe(
        self, group: Group, rows: int, seconds: float, host_s: float = 0.0, *, waits: Waits = NO_WAITS
    ) -> None:
        """Teach the cost model of a group the seconds of a step, as `CostModel.observe` takes them.

        The first pass of a size is left out, because it also allocates memory or compiles.
        """
        if (group.size, rows) in self._run_before:
            group.costs.observe(rows, seconds, host_s, waits=waits)
        self._run_before.add((group.size, rows))

    def _group_for(self, sample: Sample) -> Group:
        """Return the group of a new sample; make it if there is none."""
        size = sample.geometry.row_size
        group = self._groups.get(size)
        if group is None:
            # Only whole latents have rows of another size, so the cost of the sample is that of one row.
            row_cost = sample.geometry.cost
            costs = self.own.costs.scaled(row_cost)
            group = self._groups[size] = Group(size, self._make_pool(size), costs, row_cost=row_cost)
        return group

    def _candidates(self, group: Group) -> Candidates[Sample]:
        return Candidates(
            group.samples.values(),
            group.costs.saturation_rows(self._scheduler.cap(group.row_cost)),
            group.costs.predict,
            row_cost=group.row_cost,
            size=group.size,
        )

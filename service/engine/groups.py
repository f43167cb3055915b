"""Groups of samples by the size of their rows: only rows of one size share a pass, so the sizes take turns.

A row is a latent as a whole, or a window of one. A sample that is denoised in windows therefore belongs to
the group of the bundle's own size. The turns are deficit round robin (`DeficitRoundRobin`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple, TypeVar

from ditserve.service.engine.latent_pool import Floats, LatentPool
from ditserve.service.engine.samples import Sample
from ditserve.service.engine.scheduler import Batch, Scheduler
from ditserve.service.planning.costs import CostModel
from ditserve.service.windows import Size

MAX_VISITS: Final = 16  # a group runs after at most so many visits, however little it has waiting

G = TypeVar("G", bound=Hashable)


@dataclass(frozen=True, slots=True)
class GroupDemand:
    """The work of one group, in tokens or any one unit: its next batch, and all that it has waiting.

    Both are positive.
    """

    batch: float
    waiting: float


class DeficitRoundRobin(Generic[G]):
    """The order in which groups run: deficit round robin (Shreedhar & Varghese 1995).

    A group's share of the machine is in proportion to what it has waiting, so samples of large and of small
    groups advance equally fast. Groups are visited in a circle. Every visit adds credit to a group, and the
    group runs once its credit pays for its batch. A visit adds no less than a `MAX_VISITS`th of the batch, so
    a group with little to do never starves.

    A credit lasts as long as its group has something waiting.

    Example: A runs batches of 8 and has 80 waiting, B runs batches of 2 and has 5 waiting. The largest group
    earns a whole batch at every visit, so a visit adds a tenth of what waits: 8 to A, 0.5 to B. B runs at
    every fourth visit: 2 for every 32 of A, which is 5 to 80.
    """

    def __init__(self) -> None:
        # In the order of visits; the first group is the one that is visited now.
        self._credit: dict[G, float] = {}

    def next(self, demands: Mapping[G, GroupDemand]) -> G:
        """Return the group to run now, and charge it for its batch.

        `demands` has every group with work, at least one.
        """
        self._credit = {group: credit for group, credit in self._credit.items() if group in demands}
        for group in demands:
            self._credit.setdefault(group, 0.0)
        if len(demands) == 1:
            self._credit = dict.fromkeys(demands, 0.0)
            return next(iter(demands))
        largest = max(demands.values(), key=lambda demand: demand.waiting)
        rate = largest.batch / largest.waiting
        while True:
            group, credit = next(iter(self._credit.items()))
            demand = demands[group]
            if credit >= demand.batch:
                self._credit[group] = credit - demand.batch
                return group
            # Move the group to the end of the circle and visit the next one.
            del self._credit[group]
            self._credit[group] = credit
            visited = next(iter(self._credit))
            self._credit[visited] += max(rate * demands[visited].waiting, demands[visited].batch / MAX_VISITS)


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
        self._turns: DeficitRoundRobin[Size] = DeficitRoundRobin()
        self._run_before: set[tuple[Size, int]] = set()

    def admit(self, sample: Sample, latent: Floats, history: Floats | None = None) -> None:
        """Let a sample take steps from now on.

        It starts at `latent` (C, H, W), with the solver history (C, H, W) of its last step if it took one.
        """
        group, geometry = self._group_for(sample), sample.geometry
        pool = group.pool if geometry.windows is None else group.pool.single(geometry.size)
        group.places[sample.id] = Place(pool, pool.take(latent, history))
        group.samples[sample.id] = sample

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
        waiting = {size: group for size, group in self._groups.items() if group.samples}
        if len(waiting) == 1:
            (group,) = waiting.values()
        else:
            size = self._turns.next({size: self._demand(group, now) for size, group in waiting.items()})
            group = waiting[size]
        return group, self._batch(group, now)

    def observe(self, group: Group, rows: int, seconds: float, host_s: float = 0.0) -> None:
        """Teach the cost model of a group the seconds of a step of `rows` rows, `host_s` beside its pass.

        The first pass of a size is left out, because it also allocates memory or compiles.
        """
        if (group.size, rows) in self._run_before:
            group.costs.observe(rows, seconds, host_s)
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

    def _demand(self, group: Group, now: float) -> GroupDemand:
        batch = sum(sample.rows for sample in self._batch(group, now).samples)
        return GroupDemand(group.row_cost * batch, group.row_cost * group.rows)

    def _batch(self, group: Group, now: float) -> Batch[Sample]:
        saturation_rows = group.costs.saturation_rows(self._scheduler.cap(group.row_cost))
        return self._scheduler.next_batch(
            group.samples.values(), saturation_rows, group.row_cost, now=now, seconds=group.costs.predict
        )

"""Samples by the size of their rows: only rows of one size can share a forward pass, so sizes take turns.

A row is a latent as a whole, or a window of one: what is denoised in windows is among the samples of the bundle's own size.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from ditserve.service.engine.samples import Sample, Size
from ditserve.service.engine.scheduler import Batch, Scheduler
from ditserve.service.engine.slots import Floats, SlotPool
from ditserve.service.engine.turns import Demand, Turns
from ditserve.service.planning.costs import CostModel


class Group:
    """The samples with rows of one size, the slots of whole latents, and what a pass of them takes.

    `row_cost` is the tokens of one row, in rows of the bundle's own size.
    """

    __slots__ = ("costs", "pool", "row_cost", "samples", "size")

    def __init__(self, size: Size, pool: SlotPool, costs: CostModel, *, row_cost: float) -> None:
        self.size, self.pool, self.costs, self.row_cost = size, pool, costs, row_cost
        self.samples: dict[str, Sample] = {}

    @property
    def rows(self) -> int:
        """Rows of everybody's next step."""
        return sum(sample.rows for sample in self.samples.values())


class Groups:
    """The groups there are: always that of the bundle's own size, and one for every other size that somebody has.

    Args:
        costs: of passes at the bundle's own size; other sizes start from it, by their tokens, and learn for themselves.
        make_pool: slots for latents of a size. Memory is touched only as slots are used.
    """

    def __init__(
        self, own: Size, scheduler: Scheduler, costs: CostModel, make_pool: Callable[[Size], SlotPool]
    ) -> None:
        self._scheduler, self._make_pool = scheduler, make_pool
        self.own = Group(own, make_pool(own), costs, row_cost=1.0)
        self._groups = {own: self.own}
        self._turns: Turns[Size] = Turns()

    def seat(self, sample: Sample) -> Floats:
        """Give a sample its place; its latent, to be filled before it joins."""
        group = self._home(sample)
        if sample.windows is None:
            sample.pool, sample.row_cost = group.pool, group.row_cost
        else:
            sample.pool, sample.row_cost = group.pool.lone(sample.size), float(len(sample.windows))
        sample.slot, latent = sample.pool.take()
        return latent

    def join(self, sample: Sample) -> None:
        """Let a sample that has its place take steps."""
        self._home(sample).samples[sample.id] = sample

    def _home(self, sample: Sample) -> Group:
        """The group of a sample, made if need be."""
        size = sample.size if sample.windows is None else self.own.size
        group = self._groups.get(size)
        if group is None:
            row_cost = prod(size) / prod(self.own.size)
            costs = self.own.costs.scaled(row_cost)
            group = self._groups[size] = Group(size, self._make_pool(size), costs, row_cost=row_cost)
        return group

    def leave(self, sample: Sample) -> None:
        """Part from a sample, and from its group if it was the last one there."""
        group = self._home(sample)
        del group.samples[sample.id]
        sample.pool.release(sample.slot)
        if not group.samples and group is not self.own:
            del self._groups[group.size]

    def next_batch(self, now: float) -> tuple[Group, Batch[Sample]]:
        """Whose turn it is, and the samples that step now. There must be one."""
        waiting = {size: group for size, group in self._groups.items() if group.samples}
        if len(waiting) == 1:
            (group,) = waiting.values()
        else:
            size = self._turns.next({size: self._demand(group, now) for size, group in waiting.items()})
            group = waiting[size]
        return group, self._batch(group, now)

    def _demand(self, group: Group, now: float) -> Demand:
        batch = sum(sample.rows for sample in self._batch(group, now).samples)
        return Demand(group.row_cost * batch, group.row_cost * group.rows)

    def _batch(self, group: Group, now: float) -> Batch[Sample]:
        knee = group.costs.knee(self._scheduler.cap(group.row_cost))
        return self._scheduler.next_batch(
            group.samples.values(), knee, group.row_cost, now=now, seconds=group.costs.predict
        )

"""Groups of samples by what shares a pass: rows of one size, on one backbone.

A row is a latent as a whole, or a window of one. A sample that is denoised in windows therefore belongs to
a group of the bundle's own size. It changes its group where its next step is of another backbone. Which group
has its turn is up to the `scheduler`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ditserve.model.spec.sizes import Size
from ditserve.service.engine.latent_pool import Floats, LatentPool
from ditserve.service.engine.resident_pool import ResidentPool
from ditserve.service.engine.samples import Sample
from ditserve.service.engine.scheduler import Batch, Candidates, Scheduler
from ditserve.service.planning.costs import NO_WAITS, CostModel, Waits


class Place(NamedTuple):
    """The place of a sample's latent: a slot of a pool."""

    pool: LatentPool | ResidentPool
    slot: int


class GroupKey(NamedTuple):
    """The size of a group's rows, the name of their backbone, and whether they are on the device."""

    size: Size
    backbone: str = ""
    resident: bool = False


class Group:
    """The samples whose rows share a pass, the places of their latents, and the cost of their passes.

    `pool` holds the latents that are denoised as a whole; the groups of one size have the same. `resident`
    holds them instead, on the device, for the group whose rows live there. `row_cost` is the work of one row,
    in rows of the bundle's own size on its own backbone.
    """

    __slots__ = ("costs", "key", "places", "pool", "resident", "row_cost", "samples")

    def __init__(
        self,
        key: GroupKey,
        pool: LatentPool,
        costs: CostModel,
        *,
        row_cost: float,
        resident: ResidentPool | None = None,
    ) -> None:
        self.key, self.pool, self.costs, self.row_cost = key, pool, costs, row_cost
        self.resident = resident
        self.samples: dict[str, Sample] = {}
        self.places: dict[str, Place] = {}

    @property
    def rows(self) -> int:
        """Rows of the next step of all samples."""
        return sum(sample.rows for sample in self.samples.values())


class Groups:
    """The groups of one engine: one a backbone of the bundle's own size, and those of other sizes in use.

    Args:
        own: the bundle's own size.
        backbones: the further backbones by name, with the cost of their rows.
        costs: the cost model of passes at that size on the bundle's own backbone. Another group starts from
            it, scaled by its rows' cost, and learns by itself.
        make_pool: returns a pool for latents of a size. Memory is touched only as slots are used.
        resident: the pool of latents of the bundle's own size that live on the device, if any do. All of one
            row a step do then; there are no further backbones.
    """

    def __init__(
        self,
        own: Size,
        backbones: Mapping[str, float],
        scheduler: Scheduler,
        costs: CostModel,
        make_pool: Callable[[Size], LatentPool],
        resident: ResidentPool | None = None,
    ) -> None:
        self._scheduler, self._make_pool = scheduler, make_pool
        self._backbones = {"": 1.0, **backbones}
        key = GroupKey(own, resident=resident is not None)
        self.own = Group(key, make_pool(own), costs, row_cost=1.0, resident=resident)
        self._groups = {self.own.key: self.own}
        for name in backbones:
            self._make(GroupKey(own, name), self.own.pool, 1.0)
        self._lasting = frozenset(self._groups)
        self._of: dict[str, Group] = {}  # by sample
        self._run_before: set[tuple[GroupKey, int]] = set()

    @property
    def lasting(self) -> tuple[Group, ...]:
        """The groups of the bundle's own size, that of its own backbone first."""
        return tuple(self._groups[key] for key in self._groups if key in self._lasting)

    def admit(self, sample: Sample, latent: Floats, history: Sequence[Floats] = ()) -> Group:
        """Let a sample take steps from now on, in the group that is returned.

        It starts at `latent` (C, H, W), with the solver history that `LatentPool.take` describes. A sample of
        several rows advances by itself, so its latent is in a pool of its own.
        """
        group = self._group_for(sample)
        if group.resident is not None:
            place = Place(group.resident, group.resident.take(latent, history))
            group.resident.keep(place.slot, sample.source)
        else:
            pool = group.pool if sample.one_row else group.pool.single(sample.geometry.size)
            place = Place(pool, pool.take(latent, history))
        self._join(group, sample, place)
        return group

    def remove(self, sample: Sample) -> None:
        """Drop a sample and free its slot; drop its group too if it was the last sample of another size."""
        pool, slot = self._leave(sample)
        pool.release(slot)

    def place(self, sample: Sample) -> Place:
        """Return the place of a sample's latent."""
        return self._of[sample.id].places[sample.id]

    def regroup(self, sample: Sample) -> None:
        """Move a sample to the group of its next step. Its latent stays where it is."""
        if self._of[sample.id].key.backbone != sample.backbone:
            group = self._group_for(sample)
            place = self._leave(sample)
            self._join(group, sample, place)

    def next_batch(self, now: float) -> tuple[Group, Batch[Sample]]:
        """Return the group whose turn it is and its samples that step now. A sample must be running."""
        waiting = [group for group in self._groups.values() if group.samples]
        batch = self._scheduler.next_batch([self._candidates(group) for group in waiting], now=now)
        return self._of[batch.samples[0].id], batch

    def observe(
        self,
        group: Group,
        rows: int,
        seconds: float,
        host_s: float = 0.0,
        *,
        waits: Waits = NO_WAITS,
        device_s: float | None = None,
    ) -> None:
        """Teach the cost model of a group the seconds of a step, as `CostModel.observe` takes them.

        The first pass of a size is left out, because it also allocates memory or compiles.
        """
        if (group.key, rows) in self._run_before:
            group.costs.observe(rows, seconds, host_s, waits=waits, device_s=device_s)
        self._run_before.add((group.key, rows))

    def _group_for(self, sample: Sample) -> Group:
        """Return the group of a sample's next step; make it if there is none."""
        size = sample.geometry.row_size
        resident = self.own.resident is not None and sample.one_row and size == self.own.key.size
        key = GroupKey(size, sample.backbone, resident)
        if key in self._groups:
            return self._groups[key]
        # The latents of a size are in one pool, whatever backbone is next.
        pools = (group.pool for group in self._groups.values() if group.key.size == key.size)
        pool = next(pools, None) or self._make_pool(key.size)
        return self._make(key, pool, sample.geometry.row_area)

    def _make(self, key: GroupKey, pool: LatentPool, tokens: float) -> Group:
        """Make a group whose rows have `tokens` times the tokens of the bundle's own size."""
        row_cost = tokens * self._backbones[key.backbone]
        lasting = self._groups.get(GroupKey(self.own.key.size, key.backbone))
        costs = self.own.costs.scaled(row_cost) if lasting is None else lasting.costs.scaled(tokens)
        group = self._groups[key] = Group(key, pool, costs, row_cost=row_cost)
        return group

    def _join(self, group: Group, sample: Sample, place: Place) -> None:
        group.samples[sample.id], group.places[sample.id] = sample, place
        self._of[sample.id] = group

    def _leave(self, sample: Sample) -> Place:
        """Take a sample out of its group, and drop that if it is empty and of another size."""
        group = self._of.pop(sample.id)
        del group.samples[sample.id]
        place = group.places.pop(sample.id)
        if not group.samples and group.key not in self._lasting:
            del self._groups[group.key]
        return place

    def _candidates(self, group: Group) -> Candidates[Sample]:
        return Candidates(
            group.samples.values(),
            group.costs.saturation_rows(self._scheduler.cap(group.row_cost)),
            group.costs.predict,
            row_cost=group.row_cost,
            size=group.key,
        )

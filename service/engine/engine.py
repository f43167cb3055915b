"""The engine: many samples, each somewhere on its own trajectory, one forward pass at a time.

Samples of one image size and backbone share each pass; the windows of larger images share those of the
bundle's own size. Sizes and backbones take turns. Synchronous and single-threaded: one thread calls
everything here. The engine knows no queue, no HTTP and no file: requests come in as values, results go out in
the report of a step. The image of a sample depends on its request and its trajectory alone, not on the
samples beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import Final

import numpy as np

from ditserve.model.spec.diffusion import Schedule
from ditserve.model.spec.sizes import Size, size_name
from ditserve.service.backends import Backend, CachingBackend
from ditserve.service.engine.caching_pass import CachingPass
from ditserve.service.engine.conditions import ConditionCaches
from ditserve.service.engine.forward import Backbone, ForwardPass, Stepped
from ditserve.service.engine.groups import Group, Groups
from ditserve.service.engine.latent_pool import LatentPool
from ditserve.service.engine.resident import ResidentPass, open_resident
from ditserve.service.engine.sample_factory import SampleFactory
from ditserve.service.engine.samples import (
    Failed,
    Finished,
    Preview,
    Sample,
    SampleRequest,
    StepReport,
    not_finite,
)
from ditserve.service.engine.scheduler import Batch, Scheduler
from ditserve.service.engine.snapshots import Snapshot
from ditserve.service.engine.warm_up import warm_up
from ditserve.service.errors import DeadlineExceeded, InternalError, ServiceError
from ditserve.service.fleet import DemandBucket
from ditserve.service.planning.costs import CostModel, Waits
from ditserve.service.planning.ladder import Ladder
from ditserve.service.planning.planner import Change, Planner

# For so long a batch on a device that holds all samples goes on without being planned again.
HELD_S: Final = 0.005


class Engine:
    """The engine of one bundle, for up to `slots` samples at a time.

    Args:
        costs: the cost model of passes at the bundle's own size, on its own backbone.
        backbones: the bundle's further backbones by name.
        schedule: the noise schedule the bundle was trained with.
        clock: returns seconds, on the clock of the requests' deadlines.
        waited: returns the seconds for which the calling thread has ever waited for a processor.
    """

    def __init__(
        self,
        *,
        backend: Backend,
        conditions: ConditionCaches,
        scheduler: Scheduler,
        planner: Planner,
        ladder: Ladder,
        costs: CostModel,
        schedule: Schedule,
        clock: Callable[[], float],
        waited: Callable[[], float] = lambda: 0.0,
        slots: int = 64,
        backbones: Mapping[str, Backbone] | None = None,
    ) -> None:
        self.backend, self.conditions, self.scheduler = backend, conditions, scheduler
        self.planner, self.ladder, self.costs = planner, ladder, costs
        self.schedule, self.clock, self.waited = schedule, clock, waited
        self._samples: dict[str, Sample] = {}
        self._turn_began: float | None = None  # the end of the last step; None: it was idle since
        self._turn_waited = 0.0  # how long the thread had ever waited by then
        self._slots = slots
        self._held: tuple[Sample, ...] = ()  # on the device: they step on together until something changes
        self._held_until = 0.0
        self.step_s = 0.0  # predicted, of the step under way or else the last; other threads may read it
        # Twice the cap: a guided sample alone may exceed a cap of one row, and a batch may be padded.
        self._rows = 2 * scheduler.max_rows
        further = backbones or {}
        self._passes = {
            name: (CachingPass if isinstance(network, CachingBackend) else ForwardPass)(
                network, caches, scheduler, rows=self._rows, clock=clock, waited=waited
            )
            for name, (network, caches, _) in {"": (backend, conditions, 1.0), **further}.items()
        }
        caches = {name: forward.conditions for name, forward in self._passes.items()}
        self._factory = SampleFactory(backend, caches, ladder, schedule, clock)
        row_costs = {name: backbone.row_cost for name, backbone in further.items()}
        # A bundle with further backbones has its rows on the host: a trajectory leads from one to another.
        self._resident = (
            None if further else open_resident(backend, conditions, scheduler, slots=slots, clock=clock)
        )
        resident = None if self._resident is None else self._resident.pool
        own = backend.manifest.config.image_size
        self._groups = Groups(own, row_costs, scheduler, costs, self._make_pool, resident)

    def step(self, queued_rows: int = 0) -> StepReport:
        """Take the next step of the most urgent samples.

        If deadlines have passed, it reports those samples alone and takes no step.

        `queued_rows` is this worker's share of what still waits in the queue, for the planner to see.

        Raises:
            MemoryError: not even the smallest batch fits. Like any other error of the backend it leaves every
                latent as it was before the step.
        """
        began = self.clock()
        if self._turn_began is None:
            self._turn_began, self._turn_waited = began, self.waited()
        decoded_at = began + self.costs.decode_s  # when the image of a sample that is done now would be there
        if expired := self._expire(decoded_at):
            return StepReport(failed=expired)  # in a report of their own, because what follows may raise
        # Samples whose rows are on the host do not overlap with a turn on the device.
        if self._resident is not None:
            if self._resident.flights and len(self._groups.own.samples) < max(1, len(self._samples)):
                return self._land()
            if self._held and began < self._held_until:
                return self._turn(Batch(self._held, "idle"), (), began)
        changes = self._plan(began, queued_rows)
        if not self._samples:
            return StepReport(changes=changes)
        self._held_until = began + HELD_S

        # Schedule: the image size and backbone whose turn it is, and their samples that step now.
        group, batch = self._groups.next_batch(decoded_at)
        if group.resident is not None:
            return self._turn(batch, changes, began)
        self.step_s = group.costs.predict(sum(sample.rows for sample in batch.samples))
        # Predict: one forward pass over their rows, guided.
        network = self._passes[group.key.backbone]
        try:
            predictions, rows = network.run(group, batch.samples)
        except MemoryError:
            if group.key.size == self._groups.own.key.size:
                raise
            return StepReport(failed=self._give_up(group), changes=changes)
        # Update: one solver step of each sample.
        stepped = [result for prediction in predictions for result in prediction.advance()]
        # Finish: samples that are done or broken leave, previews are shown, and the cost model learns.
        now, waited = self.clock(), self.waited()
        finished, failed, previews = self._finish(stepped, began, now)
        # A step costs the whole turn: what the host does between two steps delays the samples as well.
        seconds, predicted_s = now - self._turn_began, group.costs.predict(rows)
        waits = Waits(network.waited_s, waited - self._turn_waited - network.waited_s)
        self._turn_began, self._turn_waited = now, waited
        self._groups.observe(group, rows, seconds, seconds - network.network_s, waits=waits)
        return StepReport(finished, failed, previews, changes, batch.stop_reason, rows, seconds, predicted_s)

    def _turn(self, batch: Batch[Sample], changes: tuple[Change, ...], began: float) -> StepReport:
        """Give the device the next steps of a batch; report the turn before, which runs until now."""
        assert self._resident is not None
        step_s = self.costs.predict(sum(sample.rows for sample in batch.samples))
        # Nobody waits for samples that step all together. They do so for a while without being planned again.
        alone = len(batch.samples) == len(self._samples)
        steps = self._resident.steps_ahead(batch.samples, step_s) if alone else 1
        self.step_s = steps * step_s
        slots = [self._groups.place(sample).slot for sample in batch.samples]
        self._held = ()
        if self._resident.launch(batch, slots, steps=steps, began=began):
            for sample in self._resident.flights[-1].done:
                self.costs.observe_image(sample.all_rows)
                self._drop(sample)
            self._held = tuple(self._samples.values()) if alone else ()
        if len(self._resident.flights) > 1:
            return replace(self._land(), changes=changes)
        self._turn_began, self._turn_waited = self.clock(), self.waited()
        return StepReport(changes=changes)

    def _land(self) -> StepReport:
        """Wait for the oldest turn on the device, and report it."""
        assert self._resident is not None
        landing = self._resident.land()
        for failed in landing.failed:
            self.cancel(failed.id)
        group, flight, waited = self._groups.own, landing.flight, self.waited()
        began = landing.at if self._turn_began is None else self._turn_began
        seconds, predicted_s = (landing.at - began) / flight.steps, group.costs.predict(flight.rows)
        host_s = max(0.0, seconds - landing.waited_s / flight.steps)
        waits = Waits(0.0, (waited - self._turn_waited) / flight.steps)
        self._turn_began, self._turn_waited = landing.at, waited
        self._groups.observe(group, flight.rows, seconds, host_s, waits=waits, device_s=landing.device_s)
        return landing.report(seconds, predicted_s)

    def add(self, request: SampleRequest, snapshot: Snapshot | None = None) -> None:
        """Let a sample join at the next step, from noise or where another engine of this bundle left it.

        Raises:
            InvalidRequest: its condition cannot be mixed, or the backend does not run its size.
            ModelReplaced: a rung names a network that this bundle has not.
            ValueError: its id is running already, there is no free slot, its rung is not one, or its snapshot
                does not fit.
        """
        if request.id in self._samples:
            raise ValueError(f"sample {request.id} is running already")
        if not self.free_samples:
            raise ValueError(f"no free slot for sample {request.id}")
        sample, latent, history = self._factory.make(request, snapshot)
        group = self._groups.admit(sample, latent, history)
        if not sample.one_row:
            for forward in self._passes.values():
                forward.reserve(group, sample.most_rows)
        if self.idle:
            self._turn_began = None
        self._samples[request.id] = sample
        self._held = ()

    def export(self, sample_id: str) -> Snapshot | None:
        """Return a snapshot for `add` to continue; None before the first step, or if no such sample runs."""
        sample = self._samples.get(sample_id)
        if sample is None or not sample.taken:
            return None
        pool, slot = self._groups.place(sample)
        return Snapshot.of(sample, pool.latent(slot), pool.history(slot))

    def cancel(self, sample_id: str) -> None:
        """Drop a sample: it takes no further step. An id that is not running is ignored."""
        if self._resident is not None:
            self._resident.forget(sample_id)
            self._held = ()
        sample = self._samples.get(sample_id)
        if sample is not None:
            self._drop(sample)

    def hand_back(self) -> tuple[str, ...]:
        """Drop every sample and return their ids, for another engine to run.

        Their seeds give the same images there.
        """
        leaving = () if self._resident is None else self._resident.leaving()
        ids = (*self._samples, *leaving)
        for sample_id in ids:
            self.cancel(sample_id)
        if self._resident is not None:
            self._resident.flights.clear()
        return ids

    def warm_up(self, budget_s: float = 1.0) -> None:
        """Teach the cost models by passes at growing batch sizes, for about `budget_s` seconds a backbone."""
        for group in self._groups.lasting:
            warm_up(
                self._pass_of(group),
                self._groups,
                group,
                self.scheduler,
                clock=self.clock,
                every_bucket=self.backend.buckets is not None,
                budget_s=budget_s,
            )
        self.step_s = self.costs.predict(1)

    def measure_idle(self, idle_s: float) -> None:
        """Look at the pace of a machine that ran nothing for `idle_s` seconds, by a pass of one row."""
        rows = self.scheduler.size(1)
        own = self._pass_of(self._groups.own)
        own.run_blank(np.zeros((rows, *self._groups.own.pool.shape), np.float32))
        self.costs.observe_idle(rows, own.network_s, idle_s)

    @property
    def condition_caches(self) -> tuple[ConditionCaches, ...]:
        """The caches of every backbone, the bundle's own first."""
        return tuple(dict.fromkeys(forward.conditions for forward in self._passes.values()))

    @property
    def idle(self) -> bool:
        return not self._samples and not self._flying

    @property
    def running(self) -> int:
        return len(self._samples)

    @property
    def free_samples(self) -> int:
        return self._slots - len(self._samples)

    @property
    def backlog_rows(self) -> int:
        """Rows until everything running is finished, in rows of the bundle's own size."""
        return ceil(sum(sample.geometry.cost * sample.remaining_rows for sample in self._samples.values()))

    def demand(self) -> tuple[DemandBucket, ...]:
        """Return the backlog by deadline."""
        planned = [sample.planned() for sample in self._samples.values()]
        return self.planner.demand(planned, self.clock(), self.costs, max_rows=self.scheduler.max_rows)

    def progress(self) -> dict[str, tuple[int, int]]:
        """Return by sample the steps taken and all steps."""
        return {sample.id: (sample.taken, sample.steps) for sample in self._samples.values()}

    @property
    def _flying(self) -> bool:
        """True while a turn on the device is not reported."""
        return self._resident is not None and bool(self._resident.flights)

    def _pass_of(self, group: Group) -> ForwardPass | ResidentPass:
        """Return what runs the rows of a group."""
        if group.resident is not None and self._resident is not None:
            return self._resident
        return self._passes[group.key.backbone]

    def _drop(self, sample: Sample) -> None:
        del self._samples[sample.id]
        self._groups.remove(sample)

    def _expire(self, now: float) -> tuple[Failed, ...]:
        """Fail the samples whose deadline has passed at `now`."""
        late = [
            sample
            for sample in self._samples.values()
            if sample.deadline_at is not None and sample.deadline_at <= now
        ]
        return tuple(
            self._fail(
                sample, DeadlineExceeded(f"the deadline passed after {sample.taken} of {sample.steps} steps")
            )
            for sample in late
        )

    def _plan(self, now: float, queued_rows: int) -> tuple[Change, ...]:
        """Move samples to the rungs that the planner wants them on; return the moves."""
        planned = [sample.planned() for sample in self._samples.values()]
        max_rows = self.scheduler.max_rows
        changes = self.planner.plan(planned, now, self.costs, max_rows=max_rows, queued_rows=queued_rows)
        for change in changes:
            sample = self._samples[change.sample_id]
            self._factory.follow(sample, change)
            self._groups.regroup(sample)
            if sample.source is not None and not sample.taken:
                # Its first step is at another level now.
                pool, slot = self._groups.place(sample)
                pool.put(slot, sample.source.start(sample.level, sample.rung.strength))
        return tuple(changes)

    def _make_pool(self, size: Size) -> LatentPool:
        manifest = self.backend.manifest
        shape = (manifest.config.in_channels, *size)
        return LatentPool(self._slots, shape, rows=self._rows, clip=manifest.diffusion.clip_x0)

    def _finish(
        self, stepped: Sequence[Stepped], began: float, now: float
    ) -> tuple[tuple[Finished, ...], tuple[Failed, ...], tuple[Preview, ...]]:
        """Count the step of each sample, drop those that are done or not finite, take previews."""
        finished: list[Finished] = []
        failed: list[Failed] = []
        previews: list[Preview] = []
        for sample, estimate, finite in stepped:
            if not finite:
                failed.append(self._fail(sample, not_finite(sample.taken + 1, sample.steps)))
                continue
            sample.advance(began)
            pool, slot = self._groups.place(sample)
            if sample.source is not None:
                pool.put(slot, sample.keep(pool.latent(slot)))
            if not sample.remaining_steps:
                finished.append(sample.finished(pool.latent(slot), now))
                self.costs.observe_image(sample.all_rows)
                self._drop(sample)
            elif sample.shows_preview:
                latent = sample.keep(estimate.copy(), clean=True)
                previews.append(Preview(sample.id, sample.taken, sample.steps, latent))
            if sample.remaining_steps:
                self._groups.regroup(sample)
        return tuple(finished), tuple(failed), tuple(previews)

    def _give_up(self, group: Group) -> tuple[Failed, ...]:
        """Fail all samples of a size of which not even one row fits in memory; other sizes go on."""
        size = size_name(group.key.size)
        error = f"An image of {size} latent pixels does not fit in this worker's memory."
        return tuple(self._fail(sample, InternalError(error)) for sample in tuple(group.samples.values()))

    def _fail(self, sample: Sample, error: ServiceError) -> Failed:
        self.cancel(sample.id)
        return Failed(sample.id, error)

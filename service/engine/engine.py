"""The engine: many samples, each somewhere on its own course, one forward pass at a time.

Samples of one image size share each pass, and with those of the bundle's own size the windows of larger ones; the sizes take turns.
Synchronous and single-threaded: one thread calls everything here. It knows no queue, no HTTP and no file; requests come
in as values, results go out in the report of a step. A sample's image depends on its request and its course alone, not
on its company.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from math import ceil
from typing import Final

import numpy as np

from ditserve.model.spec.diffusion import Schedule
from ditserve.service.backends import Backend
from ditserve.service.engine.conditions import Conditions
from ditserve.service.engine.courses import Course, plot, replot
from ditserve.service.engine.groups import Group, Groups
from ditserve.service.engine.passes import ForwardPass, Stepped
from ditserve.service.engine.samples import Failed, Finished, Preview, Sample, SampleRequest, Size, StepReport
from ditserve.service.engine.scheduler import Scheduler
from ditserve.service.engine.slots import SlotPool
from ditserve.service.engine.snapshots import Snapshot
from ditserve.service.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NumericalError,
    ServiceError,
)
from ditserve.service.jobs import Due
from ditserve.service.planning.costs import CostModel
from ditserve.service.planning.ladder import Ladder, steps_left
from ditserve.service.planning.planner import Change, Planner
from ditserve.service.rung import Rung
from ditserve.service.windows import Windows, windows_over

PLOTTED: Final = 256  # courses from noise that are kept: most requests ask for the same few


class Engine:
    """Runs up to `slots` samples.

    Args:
        costs: of passes at the bundle's own size.
        schedule: the noise schedule the bundle was trained with.
        clock: seconds, on the clock of the requests' deadlines.
    """

    def __init__(
        self,
        *,
        backend: Backend,
        conditions: Conditions,
        scheduler: Scheduler,
        planner: Planner,
        ladder: Ladder,
        costs: CostModel,
        schedule: Schedule,
        clock: Callable[[], float],
        slots: int = 64,
    ) -> None:
        manifest = backend.manifest
        self.backend, self.conditions, self.scheduler = backend, conditions, scheduler
        self.planner, self.ladder, self.costs = planner, ladder, costs
        self.schedule, self.clock = schedule, clock
        self._plot = lru_cache(PLOTTED)(partial(plot, schedule=schedule))
        self._samples: dict[str, Sample] = {}
        self._slots = slots
        self._bucketed = backend.buckets is not None
        self._run_before: set[tuple[Size, int]] = set()
        # Twice the rows: a guided sample alone may exceed a cap of one row, and a batch is padded past its end.
        self._rows = 2 * scheduler.max_rows
        self._forward = ForwardPass(backend, conditions, scheduler, rows=self._rows)
        height, width = manifest.config.image_size
        self._groups = Groups((height, width), scheduler, costs, self._make_pool)

    def step(self, queued_rows: int = 0) -> StepReport:
        """Take the next step of the most urgent samples; or, when deadlines have passed, report those alone.

        `queued_rows` is this worker's share of what still waits in the queue, for the planner to see.

        Raises:
            MemoryError: not even the smallest batch fits. Like any other error of the backend it leaves every latent as
                it was before the step.
        """
        began = self.clock()
        decoded = began + self.costs.decode_s  # when the image of a sample that is done now would be there
        if expired := self._expire(decoded):
            return StepReport(failed=expired)  # told at once: what follows may raise
        changes = self._plan(began, queued_rows)
        if not self._samples:
            return StepReport(changes=changes)
        group, batch = self._groups.next_batch(decoded)
        try:
            predictions, rows = self._forward.run(group, batch.samples)
        except MemoryError:
            if group is self._groups.own:
                raise
            return StepReport(failed=self._give_up(group), changes=changes)
        stepped = [each for prediction in predictions for each in prediction.advance()]
        now = self.clock()
        finished, failed, previews = self._finish(stepped, began, now)
        predicted = group.costs.predict(rows)
        self._observe(group, rows, now - began)
        return StepReport(
            finished, failed, previews, changes, batch.stop_reason, rows, now - began, predicted
        )

    def add(self, request: SampleRequest, snapshot: Snapshot | None = None) -> None:
        """Let a sample join at the next step; with a snapshot, where another engine of this bundle left it.

        Raises:
            InvalidRequest: its condition cannot be mixed, or the backend does not run its size.
            ValueError: its id is running already, there is no free slot, its rung is not one, or its snapshot does not fit.
        """
        if request.id in self._samples:
            raise ValueError(f"sample {request.id} is running already")
        if not self.free_samples:
            raise ValueError(f"no free slot for sample {request.id}")
        size, windows = self._size(request)
        if snapshot is not None and snapshot.latent.shape[1:] != size:
            raise ValueError(f"the snapshot of sample {request.id} is of another size")
        condition = self.conditions.get(request.condition, request.mix)
        unconditional = condition.key == self.conditions.null.key  # guiding it would change nothing
        if snapshot is None:
            course = self._plot(request.rung, 1.0 if unconditional else request.guidance_scale)
        else:
            course = snapshot.course(self.schedule)
        sample = Sample(
            request,
            condition,
            course,
            added_at=self.clock(),
            size=size,
            floor=self._floor(request),
            windows=windows,
        )
        if windows is not None:
            self._forward.reserve(self._groups.own, 2 * len(windows))
        latent = self._groups.seat(sample)
        if snapshot is None:
            sample.generator.standard_normal(out=latent, dtype=np.float32)
        else:
            snapshot.resume(sample)
            sample.pool.restore(sample.slot, snapshot.latent, snapshot.history)
        self._groups.join(sample)
        self._samples[request.id] = sample

    def export(self, sample_id: str) -> Snapshot | None:
        """Where a sample stands, for `add` to continue from; None before its first step, or if it is not running."""
        sample = self._samples.get(sample_id)
        if sample is None or not sample.taken:
            return None
        return Snapshot.of(sample, sample.pool.latent(sample.slot), sample.pool.history(sample.slot))

    def cancel(self, sample_id: str) -> None:
        """Drop a sample: it takes no further step. One that is not running is ignored."""
        sample = self._samples.pop(sample_id, None)
        if sample is not None:
            self._groups.leave(sample)

    def hand_back(self) -> tuple[str, ...]:
        """Drop every sample and name them, for someone else to run: their seeds give the same images there."""
        ids = tuple(self._samples)
        for sample_id in ids:
            self.cancel(sample_id)
        return ids

    def warm_up(self, budget_s: float = 1.0) -> None:
        """Run the network at growing batch sizes: the cost model then starts from facts.

        A backend that runs any size is given about `budget_s` seconds. One that has buckets is run at each: what it does at the first
        run of a bucket, no sample should wait for.
        """
        began, rows = self.clock(), 1
        while rows <= self.scheduler.max_rows:
            rows = self.scheduler.size(rows)
            x = np.zeros((rows, *self._groups.own.pool.shape), np.float32)
            try:
                for _ in range(2):
                    start = self.clock()
                    self._forward.blank(x)
                    seconds = self.clock() - start
                    self._observe(self._groups.own, rows, seconds)
            except MemoryError:
                if not self.scheduler.shrink(rows):
                    raise
                return
            if self._bucketed:
                rows += 1
                continue
            if (
                self.clock() - began + 4 * seconds > budget_s
            ):  # the next size would run twice, at twice the price
                return
            rows *= 2

    @property
    def idle(self) -> bool:
        return not self._samples

    @property
    def running(self) -> int:
        return len(self._samples)

    @property
    def free_samples(self) -> int:
        return self._slots - len(self._samples)

    @property
    def backlog_rows(self) -> int:
        """Rows until everything running is finished, in rows of the bundle's own size."""
        return ceil(sum(sample.row_cost * sample.remaining_rows for sample in self._samples.values()))

    def dues(self) -> tuple[Due, ...]:
        """The backlog by deadline."""
        planned = [sample.planned() for sample in self._samples.values()]
        return self.planner.dues(planned, self.clock(), self.costs, max_rows=self.scheduler.max_rows)

    def progress(self) -> dict[str, tuple[int, int]]:
        """Steps taken and steps in all, by sample."""
        return {sample.id: (sample.taken, sample.steps) for sample in self._samples.values()}

    def _observe(self, group: Group, rows: int, seconds: float) -> None:
        """Let the cost model learn from a pass, unless it was the first of its size: that also pays for memory, or compiles."""
        if (group.size, rows) in self._run_before:
            group.costs.observe(rows, seconds)
        self._run_before.add((group.size, rows))

    def _expire(self, now: float) -> tuple[Failed, ...]:
        late = [
            each
            for each in self._samples.values()
            if each.deadline_at is not None and each.deadline_at <= now
        ]
        return tuple(
            self._fail(
                sample, DeadlineExceeded(f"the deadline passed after {sample.taken} of {sample.steps} steps")
            )
            for sample in late
        )

    def _plan(self, now: float, queued_rows: int) -> tuple[Change, ...]:
        planned = [sample.planned() for sample in self._samples.values()]
        max_rows = self.scheduler.max_rows
        changes = self.planner.plan(planned, now, self.costs, max_rows=max_rows, queued_rows=queued_rows)
        for change in changes:
            sample = self._samples[change.sample_id]
            sample.follow(change, self._rerouted(sample, change.rung))
        return tuple(changes)

    def _rerouted(self, sample: Sample, rung: Rung) -> Course:
        """The way on from where the sample stands; steps already taken are never redone."""
        scale = sample.course.scale
        if not sample.taken:
            return self._plot(rung, scale)
        steps = min(steps_left(sample.remaining_steps, sample.rung, rung), sample.timestep + 1)
        return replot(
            rung, scale, self.schedule, timestep=sample.timestep, steps=steps, previous=sample.previous
        )

    def _floor(self, request: SampleRequest) -> Rung:
        return self.ladder.lowest(request.rung, request.min_steps) if request.allow_degraded else request.rung

    def _size(self, request: SampleRequest) -> tuple[Size, Windows | None]:
        """The latent size of a request and the windows it is denoised in, if the backend runs it."""
        own = self._groups.own.size
        size = request.size or own
        if request.windows:
            if size == own or size[0] < own[0] or size[1] < own[1]:
                raise InvalidRequest(f"Only what is larger than {own[0]}x{own[1]} latent pixels has windows.")
            return size, windows_over(size, own)
        if size != own:
            multiple = self.backend.size_multiple
            if multiple is None or any(side < 1 or side % multiple for side in size):
                raise InvalidRequest(f"This worker makes no images of {size[0]}x{size[1]} latent pixels.")
        return size, None

    def _make_pool(self, size: Size) -> SlotPool:
        manifest = self.backend.manifest
        shape = (manifest.config.in_channels, *size)
        return SlotPool(self._slots, shape, rows=self._rows, clip=manifest.diffusion.clip_x0)

    def _finish(
        self, stepped: Sequence[Stepped], began: float, now: float
    ) -> tuple[tuple[Finished, ...], tuple[Failed, ...], tuple[Preview, ...]]:
        """Count the step; part from samples that are done or broken; show what was asked to be shown."""
        finished: list[Finished] = []
        failed: list[Failed] = []
        previews: list[Preview] = []
        for sample, estimate, sound in stepped:
            if not sound:
                step = f"step {sample.taken + 1} of {sample.steps}"
                failed.append(
                    self._fail(sample, NumericalError(f"the model's output at {step} is not finite"))
                )
                continue
            sample.advance(began)
            if not sample.remaining_steps:
                finished.append(sample.finished(sample.pool.latent(sample.slot), now))
                self.cancel(sample.id)
            elif sample.request.previews and sample.taken % sample.request.previews == 0:
                previews.append(Preview(sample.id, sample.taken, sample.steps, estimate.copy()))
        return tuple(finished), tuple(failed), tuple(previews)

    def _give_up(self, group: Group) -> tuple[Failed, ...]:
        """Not even one row of this size fits in memory; other sizes go on."""
        height, width = group.size
        error = f"An image of {height}x{width} latent pixels does not fit in this worker's memory."
        return tuple(self._fail(sample, InternalError(error)) for sample in tuple(group.samples.values()))

    def _fail(self, sample: Sample, error: ServiceError) -> Failed:
        self.cancel(sample.id)
        return Failed(sample.id, error)

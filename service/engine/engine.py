"""The engine: many samples, each somewhere on its own course, one forward pass at a time.

Synchronous and single-threaded: one thread calls everything here. It knows no queue, no HTTP and no file; requests come
in as values, results go out in the report of a step. A sample's image depends on its request and its course alone, not
on its company.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from model.diffusion import Schedule, guided
from service.backends import Backend
from service.engine.conditions import CHUNK, Conditions, Want
from service.engine.courses import Course, plot, replot
from service.engine.samples import Failed, Finished, Preview, Sample, SampleRequest, StepReport
from service.engine.scheduler import Batch, Scheduler
from service.engine.slots import Floats, SlotPool
from service.errors import DeadlineExceeded, NumericalError, ServiceError
from service.planning.costs import CostModel
from service.planning.planner import Change, Planner
from service.planning.rungs import Ladder, Rung, steps_left

WEIGHT = -1  # the last column of a course's lines


class Engine:
    """Runs up to `slots` samples.

    Args:
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
        self._samples: dict[str, Sample] = {}
        shape = (manifest.config.in_channels, *manifest.config.image_size)
        # Twice the rows: a guided sample alone may exceed a cap of one row, and a batch is padded past its end.
        rows = 2 * max(scheduler.max_rows, 1)
        self._pool = SlotPool(slots, shape, rows=rows, clip=manifest.diffusion.clip_x0)
        self._state = tuple(np.zeros((rows, *entry.shape), np.float32) for entry in manifest.state)

    def step(self, queued_rows: int = 0) -> StepReport:
        """Take the next step of the most urgent samples; or, when deadlines have passed, report those alone.

        `queued_rows` is this worker's share of what still waits in the queue, for the planner to see.

        Raises:
            MemoryError: not even the smallest batch fits. Like any other error of the backend it leaves every latent as
                it was before the step.
        """
        began = self.clock()
        if expired := self._expire(began):
            return StepReport(failed=expired)  # told at once: what follows may raise
        changes = self._plan(began, queued_rows)
        batch = self._next_batch()
        if not batch.samples:
            return StepReport(changes=changes)
        lines = np.stack([sample.line for sample in batch.samples])  # (n, 7)
        output, rows = self._denoise(batch)  # (rows, C_out, H, W)
        output = self._guide(batch, output, lines)  # (n, C, H, W)
        estimates, finite = self._advance(batch, output, lines)
        now = self.clock()
        finished, failed, previews = self._finish(batch, estimates, finite, began, now)
        predicted = self.costs.predict(rows)
        self.costs.observe(rows, now - began)
        return StepReport(
            finished, failed, previews, changes, batch.stop_reason, rows, now - began, predicted
        )

    def add(self, request: SampleRequest) -> None:
        """Let a sample join at the next step.

        Raises:
            InvalidRequest: its condition cannot be mixed.
            ValueError: its id is running already, there is no free slot, or its rung is not one.
        """
        if request.id in self._samples:
            raise ValueError(f"sample {request.id} is running already")
        if not self.free_samples:
            raise ValueError(f"no free slot for sample {request.id}")
        condition = self.conditions.get(request.condition, request.mix)
        unconditional = condition.key == self.conditions.null.key  # guiding it would change nothing
        course = plot(request.rung, 1.0 if unconditional else request.guidance_scale, self.schedule)
        sample = Sample(request, condition, course, added_at=self.clock())
        sample.slot, latent = self._pool.take()
        sample.generator.standard_normal(out=latent, dtype=np.float32)
        self._samples[request.id] = sample

    def cancel(self, sample_id: str) -> None:
        """Drop a sample: it takes no further step. One that is not running is ignored."""
        sample = self._samples.pop(sample_id, None)
        if sample is not None:
            self._pool.release(sample.slot)

    def hand_back(self) -> tuple[str, ...]:
        """Drop every sample and name them, for someone else to run: their seeds give the same images there."""
        ids = tuple(self._samples)
        for sample_id in ids:
            self.cancel(sample_id)
        return ids

    def warm_up(self, budget_s: float = 1.0) -> None:
        """Run the network at growing batch sizes for about `budget_s` seconds: the cost model then starts from facts."""
        began, rows = self.clock(), 1
        while rows <= self.scheduler.max_rows:
            rows = self.scheduler.size(rows)
            x = np.zeros((rows, *self._pool.shape), np.float32)
            state = tuple(tensor[:rows] for tensor in self._state)
            self.backend.denoise(x, state)  # the first run of a size also pays for its memory
            start = self.clock()
            self.backend.denoise(x, state)
            seconds = self.clock() - start
            self.costs.observe(rows, seconds)
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
        return self._pool.free

    @property
    def backlog_rows(self) -> int:
        """Rows until everything running is finished."""
        return sum(sample.remaining_rows for sample in self._samples.values())

    def progress(self) -> dict[str, tuple[int, int]]:
        """Steps taken and steps in all, by sample."""
        return {sample.id: (sample.taken, sample.steps) for sample in self._samples.values()}

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
            return plot(rung, scale, self.schedule)
        steps = min(steps_left(sample.remaining_steps, sample.rung, rung), sample.timestep + 1)
        return replot(
            rung, scale, self.schedule, timestep=sample.timestep, steps=steps, previous=sample.previous
        )

    def _next_batch(self) -> Batch[Sample]:
        return self.scheduler.next_batch(
            tuple(self._samples.values()), self.costs.knee(self.scheduler.max_rows)
        )

    def _denoise(self, batch: Batch[Sample]) -> tuple[Floats, int]:
        """The network's output for every row of the batch, and how many rows were run for it.

        Rows do not know each other, so out of memory is answered by running fewer at once.
        """
        x = self._pool.gather([sample.slot for sample in batch.samples], batch.guided)
        self.conditions.modulations.gather(self._wants(batch), self._upcoming(batch), self._state)
        parts: list[Floats] = []
        done = run = 0
        while done < batch.rows:
            width = min(batch.rows - done, self.scheduler.max_rows)
            size = self.scheduler.size(width)
            part = slice(done, done + size)
            try:
                output = self.backend.denoise(x[part], tuple(tensor[part] for tensor in self._state))
            except MemoryError:
                if not self.scheduler.shrink(size):
                    raise
                continue
            parts.append(output[:width])
            done, run = done + width, run + size
        return parts[0] if len(parts) == 1 else np.concatenate(parts), run

    def _wants(self, batch: Batch[Sample]) -> list[Want]:
        wants = [(sample.timestep, sample.condition) for sample in batch.samples]
        return wants + [(wants[i][0], self.conditions.null) for i in batch.guided]

    def _upcoming(self, batch: Batch[Sample]) -> Iterator[Want]:
        """What the batch's samples want from the conditioner after this step, soonest first."""
        for ahead in range(1, CHUNK + 1):
            for sample in batch.samples:
                step = sample.cursor + ahead
                if step < len(sample.course):
                    yield sample.course.timesteps[step], sample.condition
                    if sample.course.guided[step]:
                        yield sample.course.timesteps[step], self.conditions.null

    def _guide(self, batch: Batch[Sample], output: Floats, lines: Floats) -> Floats:
        """Classifier-free guidance of the rows that have it, (rows, C_out, H, W) → (n, C, H, W).

        A learned variance is dropped: the solvers use the schedule's own.
        """
        n = len(batch.samples)
        output = output[:, : self._pool.shape[0]]
        if batch.guided:
            picked = np.array(batch.guided)
            weight = lines[picked, WEIGHT].reshape(-1, 1, 1, 1)
            channels = self.backend.manifest.diffusion.guidance_channels
            with np.errstate(all="ignore"):  # what is not finite is found in `advance`
                output[picked] = guided(output[picked], output[n:], weight, channels)
        return output[:n]

    def _advance(
        self, batch: Batch[Sample], output: Floats, lines: Floats
    ) -> tuple[Floats, npt.NDArray[np.bool_]]:
        return self._pool.advance(output, lines[:, :WEIGHT], [sample.generator for sample in batch.samples])

    def _finish(
        self, batch: Batch[Sample], estimates: Floats, finite: npt.NDArray[np.bool_], began: float, now: float
    ) -> tuple[tuple[Finished, ...], tuple[Failed, ...], tuple[Preview, ...]]:
        """Count the step; part from samples that are done or broken; show what was asked to be shown."""
        finished: list[Finished] = []
        failed: list[Failed] = []
        previews: list[Preview] = []
        for sample, estimate, sound in zip(batch.samples, estimates, finite.tolist(), strict=True):
            if not sound:
                step = f"step {sample.taken + 1} of {sample.steps}"
                failed.append(
                    self._fail(sample, NumericalError(f"the model's output at {step} is not finite"))
                )
                continue
            sample.advance(began)
            if not sample.remaining_steps:
                finished.append(sample.finished(self._pool.latent(sample.slot), now))
                self.cancel(sample.id)
            elif sample.request.previews and sample.taken % sample.request.previews == 0:
                previews.append(Preview(sample.id, sample.taken, sample.steps, estimate.copy()))
        return tuple(finished), tuple(failed), tuple(previews)

    def _fail(self, sample: Sample, error: ServiceError) -> Failed:
        self.cancel(sample.id)
        return Failed(sample.id, error)

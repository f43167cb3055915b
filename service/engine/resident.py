"""Turns of samples whose rows live on the device of a backend (`service.backends.resident`).

The engine gives the device a turn of a few steps and goes on to plan the next one while that runs. It hears
of a turn when the next one has been given: then the samples that were done leave, and those whose numbers
were not finite fail. All that a step needs of the host is known beforehand, so a sample counts as stepped as
soon as its turn is given.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from ditserve.service.backends import Backend
from ditserve.service.backends.resident import MOST_STEPS, KeepsRows, ResidentRows, Ticket
from ditserve.service.engine.conditions import ConditionCaches
from ditserve.service.engine.latent_pool import Floats
from ditserve.service.engine.resident_pool import ResidentPool
from ditserve.service.engine.samples import Failed, Finished, Preview, Sample, StepReport, not_finite
from ditserve.service.engine.scheduler import Batch, Scheduler
from ditserve.service.engine.turn_layout import TurnLayout, TurnWriter

# A newcomer waits for the turn under way and for the one after it.
TURN_S: Final = 0.003
# A guided sample has two, which a turn does not take apart.
LEAST_ROWS: Final = 2


@dataclass(slots=True, eq=False)
class Flight:
    """A turn under way, with the steps that each sample of its batch had taken before it, and takes in it.

    The samples of `done` leave after it; `shown` are the previews to come, without their latents. Of the
    `forgotten` samples nobody wants to hear.
    """

    batch: Batch[Sample]
    taken: list[int]
    counts: list[int]
    rows: int
    ticket: Ticket
    done: list[Sample]
    shown: list[tuple[Sample, int, int]]
    forgotten: set[str] = field(default_factory=set)

    @property
    def steps(self) -> int:
        return max(self.counts)


@dataclass(frozen=True, slots=True, eq=False)
class Landing:
    """A turn that is over, and what became of its samples.

    One of its steps took `device_s` on the device. It was known to be over at `at`, after `waited_s` seconds
    of waiting for it.
    """

    flight: Flight
    finished: tuple[Finished, ...]
    failed: tuple[Failed, ...]
    previews: tuple[Preview, ...]
    device_s: float
    waited_s: float
    at: float

    def report(self, seconds: float, predicted_s: float) -> StepReport:
        """Return the report of this turn, of which a step took `seconds`; see `StepReport`."""
        return StepReport(
            self.finished,
            self.failed,
            self.previews,
            stop_reason=self.flight.batch.stop_reason,
            rows=self.flight.rows,
            seconds=seconds,
            predicted_s=predicted_s,
            steps=self.flight.steps,
        )


class ResidentPass:
    """The turns of an engine on a device. In its last run without samples the device took `network_s`."""

    def __init__(
        self,
        rows: ResidentRows,
        backend: Backend,
        conditions: ConditionCaches,
        scheduler: Scheduler,
        *,
        slots: int,
        clock: Callable[[], float],
    ) -> None:
        config = backend.manifest.config
        self.network_s = self.waited_s = 0.0
        self.pool = ResidentPool(rows, slots, (config.in_channels, *config.image_size))
        self.flights: deque[Flight] = deque()
        self._rows, self._modulations, self._scheduler = rows, conditions.modulations, scheduler
        self._writer = TurnWriter(
            self.pool, conditions.modulations, conditioner_rows=backend.conditioner_rows
        )
        self._clock = clock

    def steps_ahead(self, samples: Sequence[Sample], step_s: float) -> int:
        """Return the steps that a batch takes in one turn, at `step_s` seconds each.

        A sample that is done leaves its row empty, and one that is guided at some step has two rows at all of
        them. So a turn is only so long that three quarters of its samples' steps come before such a change,
        and it ends where a preview is shown.

        Example: steps take 0.9 ms, so three fit into 3 ms. Of four samples one has two steps left: 11 of 12
        are left, so three. If two of them had one step left, it would be 8 of 12: two steps, with 6 of 8.
        """
        n = len(samples)
        if any(sample.request.adapters for sample in samples):
            return 1
        room = min(self._modulations.most_states // (2 * n), self._rows.noise_blocks // n)
        steps = max(1, min(MOST_STEPS, room, int(TURN_S / max(step_s, 1e-9))))
        alike = [sample.trajectory.alike[sample.cursor] for sample in samples]
        while sum(left if left < steps else steps for left in alike) < 0.75 * n * steps:
            steps -= 1
        for sample in samples:
            if every := sample.request.previews:
                steps = min(steps, every - sample.taken % every)
        if n + sum(sample.guided_within(steps) for sample in samples) > self._scheduler.cap():
            steps = min(steps, *alike)
        return steps

    def launch(self, batch: Batch[Sample], slots: list[int], *, steps: int, began: float) -> bool:
        """Give the device a turn, which counts as taken. Without memory lower the cap and return False.

        Raises:
            MemoryError: not even the smallest batch fits.
        """
        samples = batch.samples
        guided = [index for index, sample in enumerate(samples) if sample.guided_within(steps)]
        rows = self._size(len(samples) + len(guided))
        try:
            self._rows.open(rows)
        except MemoryError:
            if rows <= LEAST_ROWS or not self._scheduler.shrink(rows):
                raise
            return False
        counts = [min(steps, sample.remaining_steps) for sample in samples]
        turn = self._writer.write(TurnLayout(samples, slots, guided, counts, rows))
        taken = [sample.taken for sample in samples]
        self.pool.newest[slots] ^= np.array(counts) & 1
        for sample, count in zip(samples, counts, strict=True):
            sample.advance(began, count)
        done = [index for index, sample in enumerate(samples) if not sample.remaining_steps]
        shown = [index for index, sample in enumerate(samples) if sample.shows_preview]
        latents = tuple(slots[index] for index in done)
        estimates = tuple(int(self.pool.newest[slots[index]]) for index in shown)
        ticket = self._rows.run(replace(turn, latents=latents, estimates=estimates))
        previews = [(sample, sample.taken, sample.steps) for sample in map(samples.__getitem__, shown)]
        ended = [samples[index] for index in done]
        self.flights.append(Flight(batch, taken, counts, rows, ticket, ended, previews))
        return True

    def land(self) -> Landing:
        """Wait for the oldest turn under way; return what became of it."""
        flight, began = self.flights[0], self._clock()
        landed = flight.ticket.wait()
        self.flights.popleft()
        now = self._clock()
        failed = tuple(self._failed(flight, landed.finite))
        silent = {sample.id for sample in failed} | flight.forgotten
        done = zip(flight.done, landed.latents, strict=True)
        shown = zip(flight.shown, landed.estimates, strict=True)
        return Landing(
            flight,
            tuple(sample.finished(latent, now) for sample, latent in done if sample.id not in silent),
            failed,
            tuple(
                Preview(sample.id, step, steps, sample.keep(estimate, clean=True))
                for (sample, step, steps), estimate in shown
                if sample.id not in silent
            ),
            landed.device_s / flight.steps,
            now - began,
            now,
        )

    def _failed(self, flight: Flight, finite: npt.NDArray[np.bool_]) -> Iterator[Failed]:
        """Yield the samples whose numbers were not finite at a step of a turn."""
        samples, counts = flight.batch.samples, np.array(flight.counts)
        past = np.arange(len(finite))[:, None] >= counts
        finite = finite[:, : len(samples)] | past
        for index in np.flatnonzero(~finite.all(axis=0)).tolist():
            sample = samples[index]
            if sample.id not in flight.forgotten:
                step = flight.taken[index] + int(finite[:, index].argmin()) + 1
                yield Failed(sample.id, not_finite(step, sample.steps))

    def forget(self, sample_id: str) -> None:
        """Let a sample that was done in a turn under way be heard of no more."""
        for flight in self.flights:
            flight.forgotten.add(sample_id)

    def leaving(self) -> tuple[str, ...]:
        """Return the samples that are done as soon as their turn is over."""
        return tuple(
            sample.id
            for flight in self.flights
            for sample in flight.done
            if sample.id not in flight.forgotten
        )

    def run_blank(self, x: Floats) -> None:
        """Run the network on as many rows as `x` has, which are no sample's, to time it."""
        rows = len(x)
        self._rows.open(rows)
        self.network_s = self._rows.run(self._writer.blank(rows)).wait().device_s

    def _size(self, rows: int) -> int:
        """Return the rows that are run for so many; a guided sample alone may exceed a cap of one."""
        return self._scheduler.size(rows) if rows <= self._scheduler.cap() else rows


def open_resident(
    backend: Backend,
    conditions: ConditionCaches,
    scheduler: Scheduler,
    *,
    slots: int,
    clock: Callable[[], float],
) -> ResidentPass | None:
    """Let rows of the bundle's own size live on the device of a backend.

    None where it keeps none or has no room for them, or where the cache of condition states is too small for
    a batch.
    """
    most = max(LEAST_ROWS, scheduler.max_rows)
    if not isinstance(backend, KeepsRows) or conditions.modulations.most_states < most:
        return None
    try:
        rows = backend.keep_rows(conditions.modulations.slabs(), slots=slots, rows=most)
        if rows is None:
            return None
        rows.open(LEAST_ROWS)
    except MemoryError:
        return None
    return ResidentPass(rows, backend, conditions, scheduler, slots=slots, clock=clock)

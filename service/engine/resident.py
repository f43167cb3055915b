"""Turns of samples whose rows live on the device of a backend (`service.backends.resident`).

The engine gives the device a turn of a few steps and goes on to plan the next one while that runs. It hears
of a turn when the next one has been given: then the samples that were done leave, and those whose numbers
were not finite fail. All that a step needs of the host is known beforehand, so a sample counts as stepped as
soon as its turn is given.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from ditserve.service.backends import Backend
from ditserve.service.backends.adapters import RowUses
from ditserve.service.backends.resident import (
    MOST_STEPS,
    NEWEST,
    NOISE,
    NUMBERS,
    ROW_OF,
    SLAB,
    SLOT,
    SUBTRACTED,
    DeviceTurn,
    KeepsRows,
    ResidentRows,
    Ticket,
)
from ditserve.service.engine.conditions import ConditionCaches, ConditionerInput
from ditserve.service.engine.embedding_cache import Condition
from ditserve.service.engine.latent_pool import Floats
from ditserve.service.engine.resident_pool import ResidentPool
from ditserve.service.engine.row_layout import upcoming_inputs
from ditserve.service.engine.samples import Failed, Finished, Preview, Sample, not_finite
from ditserve.service.engine.scheduler import Batch, Scheduler
from ditserve.service.engine.trajectory import StepCoefficients, Trajectory

# A newcomer waits for the turn under way and for the one after it.
TURN_S: Final = 0.003
# The stretches of trajectories, and their steps, of which it is remembered where the states lie.
PATHS_KEPT: Final = 1024
STRETCH: Final = 48
# A guided sample has two, which a turn does not take apart.
LEAST_ROWS: Final = 2
_COEFFICIENTS: Final = len(StepCoefficients._fields)
_DEVIATION: Final = StepCoefficients._fields.index("s")


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
        shape = (config.in_channels, *config.image_size)
        self._conditioner_rows = backend.conditioner_rows
        self.network_s = self.waited_s = 0.0
        self.pool = ResidentPool(rows, slots, shape)
        self.flights: deque[Flight] = deque()
        self._rows, self._modulations, self._scheduler = rows, conditions.modulations, scheduler
        self._clock, self._nowhere, self._shape = clock, slots, shape
        self._paths: dict[tuple[Trajectory, int, bytes], npt.NDArray[np.int64]] = {}
        self._paths_of = 0
        self._blank: dict[tuple[int, int], npt.NDArray[np.int64]] = {}

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
        places = self._places(samples, guided, rows, slots, counts)
        numbers = self._numbers(samples, rows, counts)
        noise = self._noise(samples, numbers, places)
        taken = [sample.taken for sample in samples]
        adapters = self._adapters(samples, guided, rows)
        self.pool.newest[slots] ^= np.array(counts) & 1
        for sample, count in zip(samples, counts, strict=True):
            sample.advance(began, count)
        done = [index for index, sample in enumerate(samples) if not sample.remaining_steps]
        shown = [index for index, sample in enumerate(samples) if sample.shows_preview]
        turn = DeviceTurn(
            places,
            numbers,
            noise,
            tuple(slots[index] for index in done),
            tuple(int(self.pool.newest[slots[index]]) for index in shown),
            adapters,
        )
        ticket = self._rows.run(turn)
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
        turn = DeviceTurn(self._blank_places(1, rows).copy(), np.zeros((1, NUMBERS, rows), np.float32), x[:0])
        self.network_s = self._rows.run(turn).wait().device_s

    def _size(self, rows: int) -> int:
        """Return the rows that are run for so many; a guided sample alone may exceed a cap of one."""
        return self._scheduler.size(rows) if rows <= self._scheduler.cap() else rows

    def _blank_places(self, steps: int, rows: int) -> npt.NDArray[np.int64]:
        """Return the places of rows that are no sample's."""
        if (steps, rows) not in self._blank:
            places = np.zeros((steps, SLAB + self._modulations.tables, rows), np.int64)
            places[:, SLOT], places[:, NEWEST] = self._nowhere, 2 * self._nowhere
            self._blank[steps, rows] = places
        return self._blank[steps, rows]

    def _places(
        self, samples: Sequence[Sample], guided: list[int], rows: int, slots: list[int], counts: list[int]
    ) -> npt.NDArray[np.int64]:
        n, used, steps = len(samples), len(samples) + len(guided), max(counts)
        places = self._blank_places(steps, rows).copy()
        places[:, SLOT, :n] = slots
        places[:, ROW_OF, :used] = [*range(n), *guided]
        places[:, SUBTRACTED, :n] = range(n)
        places[:, SUBTRACTED, guided] = range(n, used)
        places[0::2, NEWEST, :n] = self.pool.newest[slots]
        places[1::2, NEWEST, :n] = self.pool.newest[slots] ^ 1
        if min(counts) < steps:
            for index, count in enumerate(counts):
                places[count:, SLOT, index] = self._nowhere
                places[count:, NEWEST, index] = 2 * self._nowhere
        states = self._states(samples, guided, counts)
        if states.min() < 0:
            inputs = _inputs(samples, guided, counts)
            self._modulations.load(inputs, upcoming_inputs(samples, self._conditioner_rows, after=steps))
            states = self._states(samples, guided, counts)
        else:
            self._modulations.hits += steps * used
        places[:, SLAB:, :used] = states.swapaxes(0, 1)
        return places

    def _states(
        self, samples: Sequence[Sample], guided: list[int], counts: list[int]
    ) -> npt.NDArray[np.int64]:
        """Return where the states of a turn's rows lie, (tables, k, rows); -1 for those not cached."""
        states = np.zeros((self._modulations.tables, max(counts), len(samples) + len(guided)), np.int64)
        for row, (sample, count) in enumerate(zip(samples, counts, strict=True)):
            states[:, :count, row] = self._path(sample, sample.conditioning.conditions[0], count)
        for row, index in enumerate(guided, start=len(samples)):
            sample, count = samples[index], counts[index]
            path = self._path(sample, sample.conditioning.unconditional, count)
            acts = sample.trajectory.guided[sample.cursor : sample.cursor + count]
            states[:, :count, row] = path if all(acts) else np.where(acts, path, 0)
        return states

    def _path(self, sample: Sample, condition: Condition, count: int) -> npt.NDArray[np.int64]:
        """Return where the states of a sample's next steps lie, (tables, count); -1 if not cached."""
        if self._paths_of != self._modulations.loads or len(self._paths) > PATHS_KEPT:
            self._paths_of = self._modulations.loads
            self._paths.clear()
        # Looked up in stretches, of which a turn is in one.
        stretch, first = divmod(sample.cursor, STRETCH)
        key = sample.trajectory, stretch, condition.key
        if key not in self._paths:
            told = sample.trajectory.told[stretch * STRETCH : (stretch + 1) * STRETCH + MOST_STEPS]
            self._paths[key] = self._modulations.places([(level, condition) for level in told])
        return self._paths[key][:, first : first + count]

    def _numbers(self, samples: Sequence[Sample], rows: int, counts: list[int]) -> Floats:
        numbers = np.zeros((max(counts), NUMBERS, rows), np.float32)
        for index, (sample, count) in enumerate(zip(samples, counts, strict=True)):
            cursor = sample.cursor
            numbers[:count, :_COEFFICIENTS, index] = sample.trajectory.rows[cursor : cursor + count]
            if sample.source is not None and sample.source.source.mask is not None:
                levels = [*sample.trajectory.levels, None][cursor + 1 : cursor + 1 + count]
                shares = [sample.source.shares(level) for level in levels]
                numbers[:count, _COEFFICIENTS:, index] = shares
        return numbers

    def _noise(self, samples: Sequence[Sample], numbers: Floats, places: npt.NDArray[np.int64]) -> Floats:
        """Draw the noise of the steps that add some, each sample's by its own generator, in their order."""
        steps, columns = numbers[:, _DEVIATION, : len(samples)].nonzero()
        noise = self._rows.noise(len(steps)) if len(steps) else np.empty((0, *self._shape), np.float32)
        for block, (step, index) in enumerate(zip(steps.tolist(), columns.tolist(), strict=True)):
            samples[index].generator.standard_normal(out=noise[block], dtype=np.float32)
            places[step, NOISE, index] = 1 + block
        return noise

    def _adapters(self, samples: Sequence[Sample], guided: list[int], rows: int) -> Sequence[RowUses]:
        if not any(sample.request.adapters for sample in samples):
            return ()
        uses = [sample.request.adapters for sample in samples]
        uses += [samples[index].request.adapters for index in guided]
        return [*uses, *[()] * (rows - len(uses))]


def _inputs(samples: Sequence[Sample], guided: list[int], counts: list[int]) -> list[ConditionerInput]:
    """Return what the rows of a turn are conditioned on."""
    inputs: list[ConditionerInput] = []
    for sample, count in zip(samples, counts, strict=True):
        told = sample.trajectory.told[sample.cursor : sample.cursor + count]
        inputs += [(level, sample.conditioning.conditions[0]) for level in told]
    for index in guided:
        sample, trajectory = samples[index], samples[index].trajectory
        steps = range(sample.cursor, sample.cursor + counts[index])
        subtracted = sample.conditioning.unconditional
        inputs += [(trajectory.told[step], subtracted) for step in steps if trajectory.guided[step]]
    return inputs


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

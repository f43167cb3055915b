"""The numbers of a turn on a device: the rows of its samples, where their latents and states lie, and noise.

All is written before the turn, from where the samples stand then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

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
)
from ditserve.service.engine.embedding_cache import Condition
from ditserve.service.engine.latent_pool import Floats
from ditserve.service.engine.modulation_cache import ConditionerInput, ModulationCache
from ditserve.service.engine.resident_pool import ResidentPool
from ditserve.service.engine.row_layout import upcoming_inputs
from ditserve.service.engine.samples import Sample
from ditserve.service.engine.trajectory import StepCoefficients, Trajectory

# The stretches of trajectories, and their steps, of which it is remembered where the states lie.
PATHS_KEPT: Final = 1024
STRETCH: Final = 48
_COEFFICIENTS: Final = len(StepCoefficients._fields)
_DEVIATION: Final = StepCoefficients._fields.index("s")


@dataclass(frozen=True, slots=True, eq=False)
class TurnLayout:
    """The rows of one turn, by the samples they belong to, in this order:

        one row for each sample
        one row that guidance subtracts for each of them that is guided; `guided` has their indices
        padding up to `rows`

    The latent of a sample is in its slot, and it takes as many steps as `counts` says.

    For example, three samples of which the second is guided have rows 0 to 2 and row 3; with `rows` = 6 rows
    4 and 5 are padding.
    """

    samples: Sequence[Sample]
    slots: list[int]
    guided: list[int]
    counts: list[int]
    rows: int

    @property
    def steps(self) -> int:
        return max(self.counts)

    @property
    def used(self) -> int:
        """The rows without padding."""
        return len(self.samples) + len(self.guided)

    def inputs(self) -> list[ConditionerInput]:
        """Return what the rows are conditioned on."""
        inputs: list[ConditionerInput] = []
        for sample, count in zip(self.samples, self.counts, strict=True):
            told = sample.trajectory.told[sample.cursor : sample.cursor + count]
            inputs += [(level, sample.conditioning.conditions[0]) for level in told]
        for index in self.guided:
            sample, trajectory = self.samples[index], self.samples[index].trajectory
            steps = range(sample.cursor, sample.cursor + self.counts[index])
            subtracted = sample.conditioning.unconditional
            inputs += [(trajectory.told[step], subtracted) for step in steps if trajectory.guided[step]]
        return inputs

    def numbers(self) -> Floats:
        """Return the coefficients of the samples' steps, `DeviceTurn.numbers`."""
        numbers = np.zeros((self.steps, NUMBERS, self.rows), np.float32)
        for index, (sample, count) in enumerate(zip(self.samples, self.counts, strict=True)):
            cursor = sample.cursor
            numbers[:count, :_COEFFICIENTS, index] = sample.trajectory.rows[cursor : cursor + count]
            if sample.source is not None and sample.source.source.mask is not None:
                levels = [*sample.trajectory.levels, None][cursor + 1 : cursor + 1 + count]
                shares = [sample.source.shares(level) for level in levels]
                numbers[:count, _COEFFICIENTS:, index] = shares
        return numbers

    def adapters(self) -> Sequence[RowUses]:
        """Return the adapters of every row; none if no row has any."""
        uses = [sample.request.adapters for sample in self.samples]
        if not any(uses):
            return ()
        uses += [uses[index] for index in self.guided]
        return [*uses, *[()] * (self.rows - len(uses))]


class TurnWriter:
    """The writer of turns over the latents of `pool` and the condition states of `modulations`."""

    def __init__(self, pool: ResidentPool, modulations: ModulationCache, *, conditioner_rows: int) -> None:
        self._pool, self._modulations, self._conditioner_rows = pool, modulations, conditioner_rows
        self._paths: dict[tuple[Trajectory, int, bytes], npt.NDArray[np.int64]] = {}
        self._paths_of = 0
        self._blank: dict[tuple[int, int], npt.NDArray[np.int64]] = {}
        self._no_noise = np.empty((0, *pool.shape), np.float32)

    def write(self, layout: TurnLayout) -> DeviceTurn:
        """Return the turn of a layout, in which nothing is read after the last step.

        It loads the condition states that are not cached, and draws the noise of the steps that add some.
        """
        places, numbers = self._places(layout), layout.numbers()
        noise = self._noise(layout, numbers, places)
        return DeviceTurn(places, numbers, noise, adapters=layout.adapters())

    def blank(self, rows: int) -> DeviceTurn:
        """Return a turn of one step over rows that are no sample's."""
        places, numbers = self._blank_places(1, rows).copy(), np.zeros((1, NUMBERS, rows), np.float32)
        return DeviceTurn(places, numbers, self._no_noise)

    def _blank_places(self, steps: int, rows: int) -> npt.NDArray[np.int64]:
        """Return the places of rows that are no sample's."""
        if (steps, rows) not in self._blank:
            nowhere = self._pool.slots
            places = np.zeros((steps, SLAB + self._modulations.tables, rows), np.int64)
            places[:, SLOT], places[:, NEWEST] = nowhere, 2 * nowhere
            self._blank[steps, rows] = places
        return self._blank[steps, rows]

    def _places(self, layout: TurnLayout) -> npt.NDArray[np.int64]:
        n, used, steps = len(layout.samples), layout.used, layout.steps
        places = self._blank_places(steps, layout.rows).copy()
        places[:, SLOT, :n] = layout.slots
        places[:, ROW_OF, :used] = [*range(n), *layout.guided]
        places[:, SUBTRACTED, :n] = range(n)
        places[:, SUBTRACTED, layout.guided] = range(n, used)
        places[0::2, NEWEST, :n] = self._pool.newest[layout.slots]
        places[1::2, NEWEST, :n] = self._pool.newest[layout.slots] ^ 1
        if min(layout.counts) < steps:
            for index, count in enumerate(layout.counts):
                places[count:, SLOT, index] = self._pool.slots
                places[count:, NEWEST, index] = 2 * self._pool.slots
        states = self._states(layout)
        if states.min() < 0:
            upcoming = upcoming_inputs(layout.samples, self._conditioner_rows, after=steps)
            self._modulations.load(layout.inputs(), upcoming)
            states = self._states(layout)
        else:
            self._modulations.hits += steps * used
        places[:, SLAB:, :used] = states.swapaxes(0, 1)
        return places

    def _states(self, layout: TurnLayout) -> npt.NDArray[np.int64]:
        """Return where the states of a turn's rows lie, (tables, k, rows); -1 for those not cached."""
        samples, counts = layout.samples, layout.counts
        states = np.zeros((self._modulations.tables, layout.steps, layout.used), np.int64)
        for row, (sample, count) in enumerate(zip(samples, counts, strict=True)):
            states[:, :count, row] = self._path(sample, sample.conditioning.conditions[0], count)
        for row, index in enumerate(layout.guided, start=len(samples)):
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

    def _noise(self, layout: TurnLayout, numbers: Floats, places: npt.NDArray[np.int64]) -> Floats:
        """Draw the noise of the steps that add some, each sample's by its own generator, in their order."""
        steps, columns = numbers[:, _DEVIATION, : len(layout.samples)].nonzero()
        noise = self._pool.rows.noise(len(steps)) if len(steps) else self._no_noise
        for block, (step, index) in enumerate(zip(steps.tolist(), columns.tolist(), strict=True)):
            layout.samples[index].generator.standard_normal(out=noise[block], dtype=np.float32)
            places[step, NOISE, index] = 1 + block
        return noise

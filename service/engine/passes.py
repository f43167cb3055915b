"""One forward pass: what the rows of a batch are conditioned on, the network over them, and guidance.

Rows do not know each other, so a batch that the device has no memory for is run in parts. First come the samples that are denoised
as a whole, one row each, and for each guided one of them its unconditional row; then of every sample in windows the windows' rows,
and if it is guided as many unconditional ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ditserve.model.spec.diffusion import guided
from ditserve.service.backends import Backend
from ditserve.service.engine.conditions import Conditions, Want
from ditserve.service.engine.groups import Group
from ditserve.service.engine.samples import Sample
from ditserve.service.engine.scheduler import Scheduler
from ditserve.service.engine.slots import Floats, SlotPool

WEIGHT = -1  # the last column of a course's lines

Stepped = tuple[Sample, Floats, bool]  # a sample, its estimate (C, H, W), and whether that is finite


@dataclass(frozen=True, slots=True)
class Prediction:
    """The guided output (n, C, H, W) of the network for samples whose latents lie in one pool, and their `lines` (n, 7)."""

    pool: SlotPool
    samples: Sequence[Sample]
    lines: Floats
    output: Floats

    def advance(self) -> Iterator[Stepped]:
        """One solver step of the samples, as gathered last in their pool."""
        generators = [sample.generator for sample in self.samples]
        estimates, finite = self.pool.advance(self.output, self.lines[:, :WEIGHT], generators)
        return zip(self.samples, estimates, finite.tolist(), strict=True)


class ForwardPass:
    """Passes of at most `rows` rows, whose condition state lies in buffers of its own."""

    def __init__(self, backend: Backend, conditions: Conditions, scheduler: Scheduler, *, rows: int) -> None:
        self._backend, self._conditions, self._scheduler = backend, conditions, scheduler
        self._rows, self._state = rows, self._buffers(rows)
        self._channels = backend.manifest.config.in_channels
        self._guided_channels = backend.manifest.diffusion.guidance_channels

    def reserve(self, group: Group, rows: int) -> None:
        """Make room for a sample of so many rows, which may be more than a pass has."""
        rows += self._scheduler.max_rows  # the last pass may be padded
        if rows > self._rows:
            self._rows, self._state = rows, self._buffers(rows)
        group.pool.reserve(rows)

    def run(self, group: Group, samples: Sequence[Sample]) -> tuple[list[Prediction], int]:
        """What the network says of the samples of a batch, and how many rows were run for it.

        Raises:
            MemoryError: not even the smallest batch fits.
        """
        whole = [sample for sample in samples if sample.windows is None]
        wide = [sample for sample in samples if sample.windows is not None]
        picked = [place for place, sample in enumerate(whole) if sample.guided]
        x = group.pool.gather([sample.slot for sample in whole], picked)
        wants = [_want(sample) for sample in whole] + [self._null(whole[place]) for place in picked]
        for sample in wide:
            wants += self._cut(sample, x[len(wants) :])
        self._conditions.modulations.gather(wants, self._upcoming(samples), self._state)
        output, rows = self._denoise(x, len(wants), group.row_cost)
        output = output[:, : self._channels]  # without a learned variance: the solvers use the schedule's own
        predictions = [self._guide(group.pool, whole, output, picked)] if whole else []
        first = len(whole) + len(picked)
        for sample in wide:
            predictions.append(self._blend(sample, output[first : first + sample.rows]))
            first += sample.rows
        return predictions, rows

    def blank(self, x: Floats) -> None:
        """Run latents (B, C, H, W) without a condition, for the time it takes."""
        self._backend.denoise(x, tuple(tensor[: len(x)] for tensor in self._state))

    def _buffers(self, rows: int) -> tuple[Floats, ...]:
        return tuple(np.zeros((rows, *entry.shape), np.float32) for entry in self._backend.manifest.state)

    def _null(self, sample: Sample) -> Want:
        return sample.timestep, self._conditions.null

    def _cut(self, sample: Sample, x: Floats) -> list[Want]:
        """Write the rows of a sample in windows to the first of `x`; what each is conditioned on."""
        assert sample.windows is not None
        n = len(sample.windows)
        sample.windows.crop(sample.pool.gather([sample.slot], ())[0], x[:n])
        if not sample.guided:
            return n * [_want(sample)]
        x[n : 2 * n] = x[:n]
        return n * [_want(sample)] + n * [self._null(sample)]

    def _denoise(self, x: Floats, wanted: int, row_cost: float) -> tuple[Floats, int]:
        """The network's output for the first `wanted` rows of `x`, and how many rows were run for it."""
        parts: list[Floats] = []
        done = run = 0
        while done < wanted:
            width = min(wanted - done, self._scheduler.cap(row_cost))
            size = self._scheduler.size(width, row_cost)
            part = slice(done, done + size)
            try:
                output = self._backend.denoise(x[part], tuple(tensor[part] for tensor in self._state))
            except MemoryError:
                if not self._scheduler.shrink(size, row_cost):
                    raise
                continue
            parts.append(output[:width])
            done, run = done + width, run + size
        return parts[0] if len(parts) == 1 else np.concatenate(parts), run

    def _upcoming(self, samples: Sequence[Sample]) -> Iterator[Want]:
        """What the batch's samples want from the conditioner after this step, soonest first."""
        for ahead in range(1, self._backend.conditioner_rows + 1):
            for sample in samples:
                step = sample.cursor + ahead
                if step < len(sample.course):
                    yield sample.course.timesteps[step], sample.condition
                    if sample.course.guided[step]:
                        yield sample.course.timesteps[step], self._conditions.null

    def _guide(
        self, pool: SlotPool, samples: Sequence[Sample], output: Floats, picked: Sequence[int]
    ) -> Prediction:
        """Classifier-free guidance of the samples denoised as a whole that have it, `picked` by their places."""
        n = len(samples)
        lines = np.stack([sample.line for sample in samples])  # (n, 7)
        if picked:
            weight = lines[picked, WEIGHT].reshape(-1, 1, 1, 1)
            with np.errstate(all="ignore"):  # what is not finite is found by the solver's step
                output[picked] = guided(
                    output[picked], output[n : n + len(picked)], weight, self._guided_channels
                )
        return Prediction(pool, samples, lines, output[:n])

    def _blend(self, sample: Sample, output: Floats) -> Prediction:
        """One prediction of those of a sample's windows, guided where guidance acts."""
        assert sample.windows is not None
        n = len(sample.windows)
        with np.errstate(all="ignore"):
            if sample.guided:
                weight = sample.line[WEIGHT]
                output = guided(output[:n], output[n:], weight, self._guided_channels)
            blended = sample.windows.blend(output)
        return Prediction(sample.pool, (sample,), sample.line[None], blended[None])


def _want(sample: Sample) -> Want:
    return sample.timestep, sample.condition

"""One forward pass: what the rows of a batch are conditioned on, the network over them, and guidance.

Rows do not know each other, so a batch that the device has no memory for is run in parts.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from model.diffusion import guided
from service.backends import Backend
from service.engine.conditions import CHUNK, Conditions, Want
from service.engine.groups import Group
from service.engine.samples import Sample
from service.engine.scheduler import Batch, Scheduler
from service.engine.slots import Floats

WEIGHT = -1  # the last column of a course's lines


class ForwardPass:
    """Passes of at most `rows` rows, whose condition state lies in buffers of its own."""

    def __init__(self, backend: Backend, conditions: Conditions, scheduler: Scheduler, *, rows: int) -> None:
        self._backend, self._conditions, self._scheduler = backend, conditions, scheduler
        self._state = tuple(np.zeros((rows, *entry.shape), np.float32) for entry in backend.manifest.state)
        self._channels = backend.manifest.config.in_channels
        self._guided_channels = backend.manifest.diffusion.guidance_channels

    def run(self, group: Group, batch: Batch[Sample], lines: Floats) -> tuple[Floats, int]:
        """The guided output (n, C, H, W) of a batch whose courses' `lines` are (n, 7), and how many rows were run for it.

        Raises:
            MemoryError: not even the smallest batch fits.
        """
        x = group.pool.gather([sample.slot for sample in batch.samples], batch.guided)
        self._conditions.modulations.gather(self._wants(batch), self._upcoming(batch), self._state)
        output, rows = self._denoise(x, batch.rows, group.row_cost)
        return self._guide(batch, output, lines), rows

    def blank(self, x: Floats) -> None:
        """Run latents (B, C, H, W) without a condition, for the time it takes."""
        self._backend.denoise(x, tuple(tensor[: len(x)] for tensor in self._state))

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

    def _wants(self, batch: Batch[Sample]) -> list[Want]:
        wants = [(sample.timestep, sample.condition) for sample in batch.samples]
        return wants + [(wants[i][0], self._conditions.null) for i in batch.guided]

    def _upcoming(self, batch: Batch[Sample]) -> Iterator[Want]:
        """What the batch's samples want from the conditioner after this step, soonest first."""
        for ahead in range(1, CHUNK + 1):
            for sample in batch.samples:
                step = sample.cursor + ahead
                if step < len(sample.course):
                    yield sample.course.timesteps[step], sample.condition
                    if sample.course.guided[step]:
                        yield sample.course.timesteps[step], self._conditions.null

    def _guide(self, batch: Batch[Sample], output: Floats, lines: Floats) -> Floats:
        """Classifier-free guidance of the rows that have it, (rows, C_out, H, W) → (n, C, H, W).

        A learned variance is dropped: the solvers use the schedule's own.
        """
        n = len(batch.samples)
        output = output[:, : self._channels]
        if batch.guided:
            picked = np.array(batch.guided)
            weight = lines[picked, WEIGHT].reshape(-1, 1, 1, 1)
            with np.errstate(all="ignore"):  # what is not finite is found by the solver's step
                output[picked] = guided(output[picked], output[n:], weight, self._guided_channels)
        return output[:n]

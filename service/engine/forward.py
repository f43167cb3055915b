"""One forward pass: the rows of a batch, the network over them, and guidance.

Rows do not depend on each other, so a batch that the device has no memory for runs in parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ditserve.model.spec.guidance import guided
from ditserve.model.spec.mixing import compose_outputs
from ditserve.model.spec.solvers import learned_log_variance
from ditserve.service.backends import Backend
from ditserve.service.backends.adapters import RowUses, adapted
from ditserve.service.backends.state import StateArray
from ditserve.service.engine.conditions import ConditionCaches
from ditserve.service.engine.groups import Group
from ditserve.service.engine.latent_pool import Floats, Gathered, LatentPool
from ditserve.service.engine.row_layout import RowLayout, SampleRows, upcoming_inputs
from ditserve.service.engine.samples import Sample
from ditserve.service.engine.scheduler import Scheduler
from ditserve.service.engine.trajectory import StepCoefficients


class Stepped(NamedTuple):
    """A sample after its solver step: the estimate (C, H, W) of its image, and whether that is finite."""

    sample: Sample
    estimate: Floats
    finite: bool


@dataclass(frozen=True, slots=True)
class Prediction:
    """The guided network output (n, C, H, W) for n samples whose latents were gathered from one pool.

    `deviation` is that of the noise in their steps, (n, 1, 1, 1) or (n, C, H, W).
    """

    gathered: Gathered
    samples: Sequence[Sample]
    coefficients: StepCoefficients
    output: Floats
    deviation: Floats

    def advance(self) -> Iterator[Stepped]:
        """Take the solver step of these samples."""
        generators = [sample.generator for sample in self.samples]
        estimates, finite = self.gathered.pool.advance(
            self.gathered, self.output, self.coefficients, self.deviation, generators
        )
        return map(Stepped, self.samples, estimates, finite.tolist())


class Backbone(NamedTuple):
    """A further network of a bundle, with its caches; `row_cost` is that of a row, in rows of the own one.

    One with a block cache may have the caches of the bundle's own.
    """

    backend: Backend
    conditions: ConditionCaches
    row_cost: float


class ForwardPass:
    """The network with its condition caches and guidance, in buffers for batches of at most `rows` rows.

    In its last run the network took `network_s` seconds, for `waited_s` of which no processor was free; see
    `Engine` for `clock` and `waited`.
    """

    def __init__(
        self,
        backend: Backend,
        conditions: ConditionCaches,
        scheduler: Scheduler,
        *,
        rows: int,
        clock: Callable[[], float],
        waited: Callable[[], float],
    ) -> None:
        self.network_s = self.waited_s = 0.0
        self._clock, self._waited = clock, waited
        self._backend, self.conditions, self._scheduler = backend, conditions, scheduler
        self._rows, self._state = rows, self._buffers(rows)
        self._uses: list[RowUses] = []  # the adapters of each row; the rows beyond have none
        self._layout: RowLayout | None = None  # of the rows that are run; None: they are blank
        config = backend.manifest.config
        self._channels, self._axes = config.in_channels, 1 + len(config.image_size)
        # A learned variance is not guided.
        self._guided_channels = backend.manifest.diffusion.guidance_channels or self._channels
        self._guidance_norm = backend.manifest.diffusion.guidance_norm

    def reserve(self, group: Group, rows: int) -> None:
        """Make room for a sample of `rows` rows, which may be more than the network runs at once."""
        rows += self._scheduler.max_rows  # the last part of a batch may be padded
        if rows > self._rows:
            self._rows, self._state = rows, self._buffers(rows)
        group.pool.reserve(rows)

    def run(self, group: Group, samples: Sequence[Sample]) -> tuple[list[Prediction], int]:
        """Return the network's guided predictions for a batch, and how many rows were run for them.

        Raises:
            MemoryError: not even the smallest batch fits.
        """
        layout = self._layout = RowLayout.of(samples)
        latents, own_latents = self._gather(layout, group)
        self._condition(layout, samples)
        self._uses = layout.adapters() if any(sample.request.adapters for sample in samples) else []
        output, rows = self._denoise(latents.x, layout.rows, group.row_cost)
        return self._guide(layout, latents, own_latents, output), rows

    def run_blank(self, x: Floats) -> None:
        """Run the network on latents (B, C, H, W) with any condition state, to time it."""
        self.network_s = self.waited_s = 0.0
        self._uses, self._layout = [], None
        self._network(x, slice(0, len(x)))

    def _buffers(self, rows: int) -> tuple[StateArray, ...]:
        backend = self._backend
        return tuple(backend.state_memory.zeros(rows, entry.shape) for entry in backend.manifest.state)

    def _gather(self, layout: RowLayout, group: Group) -> tuple[Gathered, list[Gathered]]:
        """Fill the rows of the group's pool with the latents of the batch.

        Return the latents of the whole samples, whose `x` has all rows, and those of each sample of several.
        """
        latents = group.pool.gather([group.places[sample.id].slot for sample in layout.whole])
        x = latents.x
        if layout.guided:
            x[layout.unconditional] = x[layout.guided]
        own_latents = []
        for rows in layout.several:
            pool, slot = group.places[rows.sample.id]
            assert isinstance(pool, LatentPool)  # a sample of several rows lives nowhere else
            gathered = pool.gather([slot])
            # All conditions, and what guidance subtracts, see the same windows.
            geometry, start = rows.sample.geometry, rows.conditional.start
            windows = x[start : start + geometry.rows]
            if geometry.windows is None:
                windows[0] = gathered.x[0]
            else:
                geometry.windows.crop(gathered.x[0], windows)
            copies = x[start + geometry.rows : rows.unconditional.stop]
            copies.reshape(-1, *windows.shape)[:] = windows
            own_latents.append(gathered)
        return latents, own_latents

    def _condition(self, layout: RowLayout, samples: Sequence[Sample]) -> None:
        """Fill the condition state of the rows."""
        inputs = layout.conditioner_inputs()
        upcoming = upcoming_inputs(samples, self._backend.conditioner_rows)
        self.conditions.modulations.gather(inputs, upcoming, self._state)

    def _denoise(self, x: Floats, wanted: int, row_cost: float) -> tuple[Floats, int]:
        """Return the network's output for the first `wanted` rows of `x`, and how many rows were run for it.

        The rows run in parts where they exceed the cap. A part without memory is tried again at a lower cap.
        """
        parts: list[Floats] = []
        done = run = 0
        self.network_s = self.waited_s = 0.0
        while done < wanted:
            width = min(wanted - done, self._scheduler.cap(row_cost))
            size = self._scheduler.size(width, row_cost)
            part = slice(done, done + size)
            try:
                output = self._network(x[part], part)
            except MemoryError:
                if not self._scheduler.shrink(size, row_cost):
                    raise
                continue
            parts.append(output[:width])
            done, run = done + width, run + size
        return parts[0] if len(parts) == 1 else np.concatenate(parts), run

    def _network(self, x: Floats, part: slice) -> Floats:
        """Return the network's output for latents whose condition state is this part of the buffers."""
        began, waited = self._clock(), self._waited()
        uses = self._uses[part]
        with adapted(self._backend, [*uses, *[()] * (len(x) - len(uses))]):
            output = self._compute(x, tuple(tensor[part] for tensor in self._state), part.start)
        self.network_s += self._clock() - began
        self.waited_s += self._waited() - waited
        return output

    def _compute(self, x: Floats, state: tuple[StateArray, ...], first: int) -> Floats:
        """Return the network's output for rows of the batch, of which `x` begins with the row `first`."""
        return self._backend.denoise(x, state)

    def _guide(
        self, layout: RowLayout, latents: Gathered, own_latents: Sequence[Gathered], output: Floats
    ) -> list[Prediction]:
        """Return the guided predictions: one of all whole samples, and one of each sample of several rows."""
        predictions = [self._guide_whole(layout, latents, output)] if layout.whole else []
        for rows, gathered in zip(layout.several, own_latents, strict=True):
            predictions.append(self._guide_several(rows, gathered, output))
        return predictions

    def _guide_whole(self, layout: RowLayout, latents: Gathered, output: Floats) -> Prediction:
        coefficients = self._coefficients(layout.whole)
        output = self._used(output, coefficients)
        if layout.guided:
            weight = coefficients.guidance_weight[layout.guided]
            # A number that is not finite passes through here: the solver's step finds it.
            with np.errstate(all="ignore"):
                output[layout.guided] = self._guided(
                    output[layout.guided], output[layout.unconditional], weight
                )
        return self._prediction(latents, layout.whole, coefficients, output[layout.conditional])

    def _guide_several(self, rows: SampleRows, latents: Gathered, output: Floats) -> Prediction:
        """Compose the outputs of the conditions, guide those of each window, then blend them to one."""
        sample = rows.sample
        windows, conditioning = sample.geometry.windows, sample.conditioning
        coefficients = self._coefficients([sample])
        with np.errstate(all="ignore"):
            output = self._used(output, coefficients)
            conditional = output[rows.conditional]
            if sample.composed > 1:
                outputs = np.split(conditional, sample.composed)
                conditional = compose_outputs(outputs, conditioning.weights)
            if sample.guided:
                weight = coefficients.guidance_weight
                conditional = self._guided(conditional, output[rows.unconditional], weight)
            prediction = conditional[0] if windows is None else windows.blend(conditional)
        return self._prediction(latents, (sample,), coefficients, prediction[None])

    def _coefficients(self, samples: Sequence[Sample]) -> StepCoefficients:
        return StepCoefficients.of_samples([sample.coefficients for sample in samples], self._axes)

    def _guided(self, cond: Floats, uncond: Floats, weight: Floats) -> Floats:
        """Return the output (n, C, H, W) of guidance, as this model's acts."""
        return guided(cond, uncond, weight, self._guided_channels, self._guidance_norm)

    def _used(self, output: Floats, coefficients: StepCoefficients) -> Floats:
        """Return the channels of an output that the steps use: the mean, and a variance where one is used."""
        return output if coefficients.learned.any() else output[:, : self._channels]

    def _prediction(
        self, latents: Gathered, samples: Sequence[Sample], coefficients: StepCoefficients, output: Floats
    ) -> Prediction:
        """Return the prediction of these samples; channels beyond the latent's are a learned variance."""
        mean, variance = output[:, : self._channels], output[:, self._channels :]
        deviation = coefficients.s
        if variance.size:
            # Rows of other solvers have no bounds. A number that is not finite is found at the next step.
            with np.errstate(all="ignore"):
                log_variance = learned_log_variance(variance, coefficients.log_low, coefficients.log_high)
                deviation = np.where(coefficients.learned, np.exp(0.5 * log_variance), deviation)
        return Prediction(latents, samples, coefficients, mean, deviation)

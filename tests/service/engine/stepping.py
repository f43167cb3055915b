"""Helpers that run an engine to its end, and the plain loop that its results are compared with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from ditserve.model.spec.grids import noise_levels
from ditserve.model.spec.guidance import guidance_weight, guided
from ditserve.model.spec.mixing import compose_outputs
from ditserve.model.spec.solvers import learned_log_variance, step_table, variance_bounds
from ditserve.service.engine.engine import Engine
from ditserve.service.engine.samples import Failed, Finished, Preview, SampleRequest, StepReport
from ditserve.service.rung import Rung

Floats = npt.NDArray[np.float32]


def run(engine: Engine, requests: Iterable[SampleRequest] = ()) -> list[StepReport]:
    """Step until nothing runs."""
    for request in requests:
        engine.add(request)
    reports = []
    while not engine.idle:
        reports.append(engine.step())
        assert len(reports) < 1000
    return reports


def recorded_shapes(backend: Any) -> list[tuple[int, ...]]:
    """Return a list to which every pass of a backend adds the shape of its rows."""
    inner, shapes = backend.denoise, list[tuple[int, ...]]()

    def denoise(x: Any, state: Any) -> Any:
        shapes.append(x.shape)
        return inner(x, state)

    backend.denoise = denoise
    return shapes


def finished(reports: Iterable[StepReport]) -> dict[str, Finished]:
    return {sample.id: sample for report in reports for sample in report.finished}


def failed(reports: Iterable[StepReport]) -> dict[str, Failed]:
    return {sample.id: sample for report in reports for sample in report.failed}


def previews(reports: Iterable[StepReport]) -> list[Preview]:
    return [preview for report in reports for preview in report.previews]


def reference(
    backend: Any, request: SampleRequest, pieces: Iterable[tuple[Rung, tuple[float, ...]]] | None = None
) -> tuple[Floats, list[Floats]]:
    """Return the same image by a plain loop in float64 tables: the latent, and every step's estimate.

    `pieces` are (rung, noise levels) that follow one another; by default the request's rung alone.
    """
    spec, config = backend.manifest.diffusion, backend.manifest.config
    schedule = spec.noise_schedule()
    rung = request.rung
    pieces = list(pieces or [(rung, noise_levels(rung.grid, rung.steps, schedule))])
    walked = [t for _, steps in pieces for t in steps]
    generator = np.random.Generator(np.random.Philox(request.seed))
    x = generator.standard_normal((1, config.in_channels, *config.image_size), dtype=np.float32)
    classes = len(backend.manifest.factors[0].classes)
    colours = [classes if colour is None else colour for term in request.condition for colour in term.labels]
    embeddings = backend.embed(np.array([*colours, classes])[:, None])
    weights, n = [term.weight for term in request.condition], len(colours)
    estimates: list[Floats] = []
    for rung, steps in pieces:
        lead = len(estimates)
        table = step_table(rung.solver, walked[lead:], schedule, previous=walked[lead - 1] if lead else None)
        low, high = variance_bounds(walked[lead:], schedule)
        for i, t in enumerate(steps):
            state = backend.modulate(np.full(n + 1, schedule.told(t)), embeddings)
            whole = backend.denoise(np.repeat(x, n + 1, axis=0), state)
            composed = compose_outputs(list(whole[:n, None]), weights)
            output, variance = composed[:, : config.in_channels], composed[:, config.in_channels :]
            interval, decay = rung.guidance_interval, rung.guidance_decay
            scale = guidance_weight(request.guidance_scale, t, schedule, interval, decay)
            subtracted = whole[n:, : config.in_channels]
            mixed = output if scale == 1.0 else guided(output, subtracted, scale, spec.guidance_channels)
            estimate = table.x0_x[i] * x + table.x0_out[i] * mixed
            estimate = np.clip(estimate, -1.0, 1.0) if spec.clip_x0 else estimate
            x = table.a[i] * x + table.b[i] * estimate
            x += table.c[i] * estimates[-1] if table.c[i] else 0.0
            x += table.d[i] * estimates[-2] if table.d[i] else 0.0
            if table.s[i]:
                learned = np.exp(0.5 * learned_log_variance(variance, low[i], high[i]))
                deviation = learned if variance.size and rung.solver == "ddpm" else table.s[i]
                x = x + deviation * generator.standard_normal(x.shape, dtype=np.float32)
            x = x.astype(np.float32)
            estimates.append(estimate.astype(np.float32))
    return x[0], [estimate[0] for estimate in estimates]

"""The time of an engine's step beside the network, on a real backend, and the functions that it goes to."""

from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Mapping
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from ditserve.bench.engine_overhead import engine_ms, open_engine, sample_requests
from ditserve.bench.gpu.measuring import Measuring, main
from ditserve.bench.gpu.parts.correctness import random_rows, runtimes
from ditserve.model.spec.bundle import Bundle
from ditserve.service.backends import Backend, load_backend
from ditserve.service.planning.costs import CostModel

ROWS, STEPS, TOY_STEPS = 16, 300, 10
SHOWN = 12  # functions


def measure(part: Measuring) -> None:
    bundle, steps = Bundle.open(part.bundle), TOY_STEPS if part.toy else STEPS
    part.point("no network", partial(_without_network, bundle, steps))
    wanted = ("onnx fp16", "torch fp16") if not part.toy else ("torch fp32",)
    for name, backend, options in runtimes(part):
        if name in wanted:
            part.point(f"{name}, {ROWS} rows", partial(_step, bundle, backend, options, steps))


def _without_network(bundle: Bundle, steps: int) -> dict[str, Any]:
    """Return the processor time of a step whose network does nothing."""
    own = 1e3 * float(np.median(engine_ms(bundle.manifest, rows=ROWS, steps=steps)))
    return {"step_us": own, "host_us": own}


def _step(bundle: Bundle, name: str, options: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Return the time of a step, what of it is beside a pass of the network, and a profile."""
    backend = load_backend(name, bundle, **options)
    try:
        network_s = _pass_s(backend, steps)
        engine = open_engine(backend, CostModel(), rows=ROWS)
        engine.warm_up()
        source = sample_requests(len(backend.manifest.factors), time.perf_counter())

        def run(count: int) -> list[float]:
            times = []
            for _ in range(count):
                while engine.running < ROWS:
                    engine.add(next(source))
                began = time.perf_counter()
                engine.step()
                times.append(time.perf_counter() - began)
            return times

        # The first steps fill the cache of modulations.
        run(steps)
        step_s = median(run(steps))
        profile = cProfile.Profile()
        profile.runcall(run, steps)
    finally:
        backend.close()
    figures = {"step_us": 1e6 * step_s, "pass_us": 1e6 * network_s, "host_us": 1e6 * (step_s - network_s)}
    return {**figures, "profile": _longest(profile, steps)}


def _pass_s(backend: Backend, passes: int) -> float:
    x, state = random_rows(backend)
    x, state = np.concatenate([x, x]), tuple(np.concatenate([tensor, tensor]) for tensor in state)
    times = []
    for _ in range(passes + 3):
        began = time.perf_counter()
        backend.denoise(x, state)
        times.append(time.perf_counter() - began)
    return median(times[3:])


def _longest(profile: cProfile.Profile, steps: int) -> dict[str, float]:
    """Return the microseconds a step of the functions that take longest, without what they call."""
    stats = pstats.Stats(profile)
    timed = sorted(stats.stats.items(), key=lambda item: -item[1][2])[:SHOWN]  # type: ignore[attr-defined]
    names = [f"{file.rpartition('/')[2]}:{line} {function}" for (file, line, function), _ in timed]
    return {name: round(1e6 * item[1][2] / steps, 1) for name, item in zip(names, timed, strict=True)}


if __name__ == "__main__":
    main("host", measure)

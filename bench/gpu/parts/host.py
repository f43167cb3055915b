"""The host's time of an engine's step: the processor time of its thread, and the functions that it goes to.

Where rows live on the device a turn has several steps, and its thread sleeps while the device computes. With
ONNX Runtime it may also spin.
"""

from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from ditserve.bench.device_overhead import host_time
from ditserve.bench.engine_overhead import engine_ms, open_engine, sample_requests
from ditserve.bench.gpu.measuring import Measuring, main
from ditserve.bench.gpu.parts.correctness import runtimes
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.manifest import Manifest
from ditserve.service.backends import load_backend
from ditserve.service.planning.costs import CostModel

ROWS, STEPS, TOY_STEPS = 16, 300, 10
SHOWN = 12  # functions
# The time that a step is said to take on a device that does nothing.
DEVICE_STEP_MS = 0.6


def measure(part: Measuring) -> None:
    bundle, steps = Bundle.open(part.bundle), TOY_STEPS if part.toy else STEPS
    part.point("no network", partial(_without_network, bundle.manifest, steps))
    part.point("no network, rows on a device", partial(_without_device, bundle.manifest, steps))
    wanted = ("torch fp32",) if part.toy else ("torch fp16", "onnx fp16")
    for name, backend, options in runtimes(part):
        if name in wanted:
            part.point(f"{name}, {ROWS} rows", partial(_step, bundle, backend, options, steps))


def _without_network(manifest: Manifest, steps: int) -> dict[str, Any]:
    """Return the processor time of a step whose network does nothing."""
    own = 1e3 * float(np.median(engine_ms(manifest, rows=ROWS, steps=steps)))
    return {"step_us": own, "host_us": own}


def _without_device(manifest: Manifest, steps: int) -> dict[str, Any]:
    """Return the same of rows that live on a device that does nothing."""
    found = host_time(manifest, DEVICE_STEP_MS, rows=ROWS, turns=steps)
    return {"step_us": found.p50_us, "host_us": found.p50_us, "steps_a_turn": found.steps}


def _step(bundle: Bundle, name: str, options: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Return the time of a step from outside, that of the thread's processor, and a profile."""
    backend = load_backend(name, bundle, **options)
    try:
        engine = open_engine(backend, CostModel(), rows=ROWS)
        engine.warm_up()
        source = sample_requests(len(backend.manifest.factors), time.perf_counter())

        def run(count: int) -> int:
            """Take so many turns; return the steps that they had."""
            taken = 0
            for _ in range(count):
                while engine.running < ROWS:
                    engine.add(next(source))
                taken += engine.step().steps
            return taken

        # The first steps fill the cache of modulations.
        run(steps)
        began, busy = time.perf_counter(), time.thread_time()
        taken = run(steps)
        step_us, host_us = (
            1e6 * (now - then) / taken
            for now, then in ((time.perf_counter(), began), (time.thread_time(), busy))
        )
        profile = cProfile.Profile()
        profiled = profile.runcall(run, steps)
    finally:
        backend.close()
    return {
        "step_us": step_us,
        "host_us": host_us,
        "steps_a_turn": taken / steps,
        "profile": _longest(profile, profiled),
    }


def _longest(profile: cProfile.Profile, steps: int) -> dict[str, float]:
    """Return the microseconds a step of the functions that take longest, without what they call."""
    stats = pstats.Stats(profile)
    timed = sorted(stats.stats.items(), key=lambda item: -item[1][2])[:SHOWN]  # type: ignore[attr-defined]
    names = [f"{file.rpartition('/')[2]}:{line} {function}" for (file, line, function), _ in timed]
    return {name: round(1e6 * item[1][2] / steps, 1) for name, item in zip(names, timed, strict=True)}


if __name__ == "__main__":
    main("host", measure)

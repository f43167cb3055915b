"""The service over HTTP at growing rates, by one worker and by four, until fewer than 95 % are in time.

It computes in torch, and then in ONNX Runtime. Every request is for an image of 20 guided steps, and promised
three times what it takes alone. Requests come by themselves, whatever became of the others. The client is one
process, whose own load is told: near 100 % the figures are the client's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from ditserve.bench.gpu.measuring import Measuring, main
from ditserve.bench.load.cluster import running_cluster
from ditserve.bench.promises import PATIENT_S, HastyClient, Wish
from ditserve.model.spec.errors import ModelError
from ditserve.service.settings import Settings

# Backend → its settings on a GPU.
BACKENDS = {
    "torch": ("--backend=torch", "--device=cuda"),
    "onnx": ("--backend=onnx", "--providers=CUDAExecutionProvider,CPUExecutionProvider"),
}
TOY_BACKENDS = {"onnx": ("--backend=onnx", "--threads=1", "--precision=fp32")}
WORKERS = (1, 4)
STEPS, SLO, IN_TIME = 20, 3.0, 0.95
SECONDS, FIRST_RATE, GROWTH = 4.0, 25.0, 1.8
TOY_SECONDS, TOY_RATE = 1.0, 2.0
PROBES = 5
HIGHEST = 10  # rates


def measure(part: Measuring) -> None:
    for backend, flags in (TOY_BACKENDS if part.toy else BACKENDS).items():
        for workers in WORKERS[:1] if part.toy else WORKERS:
            name = f"{backend}, {workers} worker(s)"
            try:
                asyncio.run(_grow(part, name, flags, workers))
            except (ModelError, OSError, RuntimeError) as error:
                part.point(name, partial(_failed, error))


def _failed(error: Exception) -> dict[str, Any]:
    raise error


async def _grow(part: Measuring, title: str, flags: Sequence[str], workers: int) -> None:
    """Raise the rate until too few are in time. What was measured before is not offered again."""
    rates = {
        f"{title}, {rate:.0f}/s": rate
        for rate in ([TOY_RATE] if part.toy else [FIRST_RATE * GROWTH**k for k in range(HIGHEST)])
    }
    left = {name: rate for name, rate in rates.items() if part.missing(name)}
    if not left or any(part.known(name).get("in_time", 1.0) < IN_TIME for name in rates):
        return
    fixed = [f"--bundle={part.bundle}", f"--ready-workers={workers}", "--log-level=warning"]
    settings = Settings.parse([*fixed, *flags])
    with TemporaryDirectory(prefix="dit-gpu-") as folder:
        async with running_cluster(Path(folder), settings, workers=workers, durable=False) as cluster:
            with closing(HastyClient(cluster.port, STEPS)) as client:
                alone_s = await _alone(client)
                for name, rate in left.items():
                    figures = await _offered(client, rate, SLO * alone_s, toy=part.toy)
                    part.point(name, partial(dict, figures))
                    if figures["in_time"] < IN_TIME:
                        return


async def _alone(client: HastyClient) -> float:
    """Return the seconds of a request on an idle server, the median of a few."""
    times = []
    for seed in range(PROBES + 1):
        began = time.perf_counter()
        outcome, _ = await client.ask(Wish(seed, PATIENT_S))
        times.append(time.perf_counter() - began)
        if outcome.steps is None:
            raise ModelError(f"the service answered {outcome.status} to a request on an idle machine")
    return median(times[1:])


async def _offered(client: HastyClient, rate: float, promise_s: float, *, toy: bool) -> dict[str, Any]:
    seconds = TOY_SECONDS if toy else SECONDS
    began, busy = time.perf_counter(), time.process_time()
    outcomes = await client.open_loop(rate, seconds, promise_s, returning=False)
    passed = time.perf_counter() - began
    in_time = sum(outcome.in_time for outcome in outcomes)
    return {
        "rate": rate,
        "promise_s": promise_s,
        "requests": len(outcomes),
        "in_time": in_time / len(outcomes),
        "refused": sum(outcome.status in (429, 503) for outcome in outcomes) / len(outcomes),
        "images_per_s": in_time / passed,
        "client_load": (time.process_time() - busy) / passed,
    }


if __name__ == "__main__":
    main("service", measure)

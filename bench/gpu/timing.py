"""Times of work on a device of torch: from outside, on the device alone, and of the host that launches it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

WARM_UP = 3
# The seconds to time passes for, and the fewest of them.
TIMED_S, LEAST = 0.5, 3
# Launched without waiting, so that the device is the one that is waited for.
LAUNCHED = 8


@dataclass(frozen=True, slots=True)
class PassTime:
    """Milliseconds of a pass that is waited for, and of it on the device; microseconds of its launch."""

    pass_ms: float
    device_ms: float
    host_us: float


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(run: Callable[[], object], device: str, passes: int) -> PassTime:
    """Time a pass as medians of `passes`, of fewer where they take long, after a few that do not count.

    A CPU computes while it is launched, so that its three times are one.
    """

    def whole() -> None:
        run()
        synchronize(device)

    for _ in range(WARM_UP):
        whole()
    passes = min(passes, max(LEAST, int(TIMED_S / _seconds(whole))))
    waited = median(_seconds(whole) for _ in range(passes))
    if not device.startswith("cuda"):
        return PassTime(1e3 * waited, 1e3 * waited, 1e6 * waited)
    launches, on_device = [], []
    for _ in range(max(1, passes // LAUNCHED)):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        launches.append(_seconds(lambda: [run() for _ in range(LAUNCHED)]) / LAUNCHED)
        end.record()
        end.synchronize()
        on_device.append(begin.elapsed_time(end) / LAUNCHED)
    return PassTime(1e3 * waited, median(on_device), 1e6 * median(launches))


def captured(run: Callable[[], object], device: str) -> Callable[[], object]:
    """Return a function that replays the kernels of `run`, captured as one CUDA graph; its output stays put.

    On a CPU nothing can be captured, and it is `run` itself.
    """
    if not device.startswith("cuda"):
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> object:
        graph.replay()
        return output

    return replay


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began

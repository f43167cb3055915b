"""Times on a GPU, which is imitated: what is waited for, and what is launched and replayed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from ditserve.bench.gpu import timing


class Gpu:
    """A device with a clock of its own: a pass takes it 2 s, and a launch takes the host 0.01 s."""

    def __init__(self) -> None:
        self.host = self.busy_until = 0.0
        self.captures = self.replays = self.passes = 0

    def run(self) -> str:
        self.passes += 1
        self.host += 0.01
        self.busy_until = max(self.busy_until, self.host) + 2.0
        return "output"

    def synchronize(self) -> None:
        self.host = max(self.host, self.busy_until)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = max(gpu.host, gpu.busy_until)

        synchronize = staticmethod(gpu.synchronize)

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.at - self.at)

    class Stream:
        def wait_stream(self, other: Any) -> None: ...

    class CUDAGraph:
        def replay(self) -> None:
            gpu.replays += 1

    @contextmanager
    def graph(captured: CUDAGraph) -> Iterator[None]:
        gpu.captures += 1
        yield

    @contextmanager
    def stream(side: Stream) -> Iterator[None]:
        yield

    made = {"Event": Event, "Stream": Stream, "CUDAGraph": CUDAGraph, "graph": graph, "stream": stream}
    made |= {"synchronize": gpu.synchronize, "current_stream": Stream}
    for name, value in made.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr("ditserve.bench.gpu.timing.time.perf_counter", lambda: gpu.host)
    return gpu


def test_a_pass_its_part_on_the_device_and_its_launch_are_told_apart(gpu: Gpu) -> None:
    time = timing.timed(gpu.run, "cuda", passes=16)
    assert time.pass_ms == pytest.approx(2010)
    assert time.device_ms == pytest.approx(2000, rel=0.01)
    assert time.host_us == pytest.approx(10_000)
    # A pass of two seconds is timed as seldom as may be.
    assert gpu.passes == timing.WARM_UP + 1 + timing.LEAST + timing.LAUNCHED


def test_kernels_are_captured_once_and_then_replayed(gpu: Gpu) -> None:
    replay = timing.captured(gpu.run, "cuda")
    assert gpu.captures == 1
    before = gpu.passes
    assert [replay(), replay()] == ["output", "output"]
    assert (gpu.passes, gpu.replays) == (before, 2)


def test_a_cpu_computes_as_it_is_launched() -> None:
    calls: list[int] = []
    run = timing.captured(lambda: calls.append(1), "cpu")
    time = timing.timed(run, "cpu", passes=2)
    assert time.pass_ms == time.device_ms
    assert time.host_us == pytest.approx(1e3 * time.pass_ms)
    assert len(calls) == timing.WARM_UP + 1 + 2

"""Measure the host's time of a step whose rows live on a device, on an imitated one that computes nothing.

    python -m bench.device_overhead [BUNDLE] [--rows 16] [--turns 40] [--step-ms 0.25 0.6 2 20]

An engine is stepped with guided and unguided samples of mixed solvers, as in `bench.engine_overhead`: first
with such that none joins or ends, then with ones that come and go. The time that an image takes to join, the
drawing of its noise included, is told by itself. The device takes what it is sent and gives back what it is
asked for, and a launch does nothing: the time is that of this project's Python, numpy and torch. The driver's
part of a launch and of a copy, some microseconds each on a GPU, is not in it. `--step-ms` is how long a step
is said to take, which gives the steps of a turn. Times are processor time of the thread. Writes
bench/results/device_overhead.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ditserve.bench import report
from ditserve.bench.engine_overhead import FixedCostModel, NoopBackend, open_engine, sample_requests
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.manifest import Manifest
from ditserve.service.backends.resident import Slab
from ditserve.service.backends.state import Floats
from ditserve.service.backends.torch_rows import TorchRows
from ditserve.service.backends.torch_stream import TorchStream
from ditserve.service.jobs import ConditionTerm
from ditserve.service.rung import Rung

WARM_UP_TURNS = 200  # they fill the modulation cache
BLOCK = 10  # turns timed together
LONG = Rung("ddim-600", "ddim", 600, "leading", (0.0, 1.0), 0.0)


class IdleStream(TorchStream):
    """The stream of a device that does nothing with what it is sent. It counts."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.launches = self.uploads = self.downloads = self.waits = 0

    def zeros(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        memory = super().zeros(shape, dtype)
        # The flags of steps that nobody computes: all is finite.
        return memory.logical_not_() if dtype == torch.bool else memory

    def upload(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.uploads += 1
        super().upload(target, source)

    def download(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.downloads += 1
        super().download(target, source)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return lambda: None

    def launch(self, work: Callable[[], None]) -> None:
        self.launches += 1
        work()

    def wait(self, mark: Any) -> None:
        self.waits += 1


class IdleDevice(NoopBackend):
    """A backend whose rows live on such a device."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest)
        self.stream = IdleStream()

    def keep_rows(self, slabs: Sequence[Slab], *, slots: int, rows: int) -> TorchRows:
        tensors = [Slab(torch.from_numpy(slab.array), slab.line) for slab in slabs]
        return TorchRows(lambda x, _: x, self.manifest, tensors, self.stream, slots=slots, rows=rows)

    def modulate_there(self, timesteps: Floats, embeddings: Floats) -> tuple[Floats, ...]:
        return self.modulate(timesteps, embeddings)


@dataclass(frozen=True, slots=True)
class HostTime:
    """The host's microseconds of a step and of an image's joining, and a turn's steps and calls."""

    step_ms: float
    joins: bool
    steps: float
    p50_us: float
    p95_us: float
    joining_us: float
    uploads: float
    downloads: float
    waits: float


def host_time(manifest: Manifest, step_ms: float, *, rows: int, turns: int, joins: bool = True) -> HostTime:
    """Return the host's time of steps that are said to take `step_ms`, in batches of up to `rows` rows.

    Without `joins` all samples are so long that none joins or ends meanwhile.
    """
    backend = IdleDevice(manifest)
    costs = FixedCostModel(fixed_s=1e-3 * step_ms, per_row_s=1e-9)
    engine = open_engine(backend, costs, rows=rows)
    alike: dict[str, Any] = {
        "rung": LONG,
        "requested": LONG,
        "condition": (ConditionTerm((0, *(None,) * (len(manifest.factors) - 1))),),
    }
    mixed = sample_requests(len(manifest.factors), time.perf_counter())
    source = mixed if joins else (replace(one, **alike) for one in mixed)

    joining: list[float] = []

    def block(length: int) -> float:
        steps, stepping_s = 0, 0.0
        for _ in range(length):
            # Every other sample is guided: all rows fit into one batch.
            while 3 * engine.running < 2 * rows:
                began = time.thread_time()
                engine.add(next(source))
                joining.append(time.thread_time() - began)
            began = time.thread_time()
            steps += engine.step().steps
            stepping_s += time.thread_time() - began
        return 1e6 * stepping_s / steps

    # The states of conditions that repeat are cached, as in service.
    if joins:
        block(WARM_UP_TURNS)
    else:
        for _ in range(2):
            engine.add(next(source))
        while not engine.idle:
            engine.step()
        block(1)
    stream, blocks = backend.stream, max(1, turns // BLOCK)
    before = stream.launches, stream.uploads, stream.downloads, stream.waits
    times = [block(BLOCK) for _ in range(blocks)]
    after = stream.launches, stream.uploads, stream.downloads, stream.waits
    calls = [(late - early) / (blocks * BLOCK) for early, late in zip(before, after, strict=True)]
    p50, p95 = (float(value) for value in np.percentile(times, [50, 95]))
    return HostTime(step_ms, joins, calls[0], p50, p95, 1e6 * float(np.median(joining)), *calls[1:])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("device_overhead", __doc__)
    parser.add_argument("bundle", type=Path, nargs="?", default=report.DEFAULT_BUNDLE)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--step-ms", type=float, nargs="+", default=[0.25, 0.6, 2.0, 20.0])
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options, background = parse(arguments), report.BackgroundLoad()

    def work() -> None:
        manifest = Bundle.open(options.bundle).manifest
        times = [
            host_time(manifest, step_ms, rows=options.rows, turns=options.turns, joins=joins)
            for joins in (False, True)
            for step_ms in options.step_ms
        ]
        cells = [
            (
                f"{one.step_ms:g}",
                "yes" if one.joins else "no",
                f"{one.steps:.1f}",
                f"{one.p50_us:.0f}",
                f"{one.p95_us:.0f}",
                f"{one.joining_us:.0f}",
                f"{one.uploads:.1f}",
                f"{one.downloads:.1f}",
                f"{one.waits:.1f}",
            )
            for one in times
        ]
        columns = (
            "step, ms",
            "joins",
            "steps a turn",
            "p50 µs",
            "p95 µs",
            "joining, µs",
            "copies there",
            "and back",
            "waits",
        )
        title = f"the host's time of a step of {options.rows} rows, and its calls a turn"
        Console(width=110).print(report.table(title, columns, cells, text={"joins"}))
        report.save("device_overhead", options, background, {"times": [asdict(one) for one in times]})

    return report.run_command("device_overhead", work)


if __name__ == "__main__":
    sys.exit(main())

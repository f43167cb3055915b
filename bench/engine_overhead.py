"""Measure what a step costs beside the network, and what `strict` costs.

    python -m bench.engine_overhead [BUNDLE] [--rows 8] [--steps 1000] [--threads 1]
    python -m bench.engine_overhead [BUNDLE] --strict 8 [--images 24]

The first compares the steps of an engine whose network does nothing with the network's own time for as many
rows; the goal is 2 %. Rows are guided and unguided samples of mixed solvers and lengths with deadlines,
joining included. Conditions repeat, so the modulation cache is warm as it is in service. Both are processor
time of this process, so that other tenants of the machine do not count.

The second makes the same images, joining one by one, with passes of just the rows there are and with passes
of exactly that many rows. It checks that the latter are equal to the last bit in another order of arrival.
Writes bench/results/engine_overhead.json, or engine_strict.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ditserve.bench import report
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.manifest import Manifest
from ditserve.service.backends import CONDITIONER_ROWS, Backend, SentenceEncoder, load_backend
from ditserve.service.backends.adapters import BackendAdapters
from ditserve.service.backends.state import HostMemory, StateMemory
from ditserve.service.engine.conditions import ConditionCaches
from ditserve.service.engine.engine import Engine
from ditserve.service.engine.samples import SampleRequest
from ditserve.service.engine.scheduler import Scheduler
from ditserve.service.images import from_pixels
from ditserve.service.jobs import ConditionTerm
from ditserve.service.planning.costs import NO_WAITS, CostModel, Waits
from ditserve.service.planning.ladder import Ladder
from ditserve.service.planning.planner import Planner
from ditserve.service.rung import Consent, Rung

Floats = npt.NDArray[np.float32]
Milliseconds = npt.NDArray[np.float64]

RUNGS = (
    Rung("ddim-50", "ddim", 50, "trailing", (0.0, 1.0), 0.0),
    Rung("ddim-30", "ddim", 30, "leading", (0.0, 1.0), 0.1),
    Rung("dpmpp-20", "dpmpp-2m", 20, "uniform-t", (0.1, 0.8), 0.2),
    Rung("dpmpp-12", "dpmpp-2m", 12, "uniform-t", (0.1, 0.8), 0.4),
)
BLOCK = 20  # steps timed together: reading the clock costs as much as a part of a step
WARM_UP_STEPS = 200  # they fill the modulation cache
CLASSES = 5  # used in turn


class NoopBackend:
    """A backend that computes nothing: it answers with a slice of a constant, and with zeros.

    A forward pass waits for `pass_s` seconds, and for `row_s` a row, without a processor.
    """

    pass_s = 0.0
    row_s = 0.0
    name = "none"
    precision = "fp32"
    kernels = ""
    buckets: tuple[int, ...] | None = None
    conditioner_rows = CONDITIONER_ROWS
    size_multiples: tuple[int, ...] | None = None
    text_encoder: SentenceEncoder | None = None
    state_memory: StateMemory = HostMemory()
    adapters: BackendAdapters | None = None

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._output = np.zeros((256, manifest.config.in_channels, *manifest.config.image_size), np.float32)

    def embed(self, labels: npt.NDArray[np.int64], text: Floats | None = None) -> Floats:
        return np.zeros((len(labels), self.manifest.embedding_size), np.float32)

    def modulate(self, timesteps: Floats, embeddings: Floats) -> tuple[Floats, ...]:
        return tuple(np.zeros((len(timesteps), *tensor.shape), np.float32) for tensor in self.manifest.state)

    def denoise(self, x: Floats, state: tuple[Floats, ...]) -> Floats:
        if wait_s := self.pass_s + self.row_s * len(x):
            time.sleep(wait_s)
        return self._output[: len(x)]

    def encode(self, pixels: npt.NDArray[np.uint8]) -> Floats:
        return from_pixels(pixels, self.manifest.config.in_channels)

    def decode(self, latents: Floats) -> npt.NDArray[np.uint8]:
        n, _, height, width = latents.shape
        return np.zeros((n, height, width, 3), np.uint8)

    def close(self) -> None:
        pass


class FixedCostModel(CostModel):
    """A cost model that learns nothing from a network that takes no time, so that batches stay at the cap."""

    def observe(
        self,
        rows: int,
        seconds: float,
        host_s: float = 0.0,
        *,
        waits: Waits = NO_WAITS,
        device_s: float | None = None,
    ) -> None:
        super().observe(rows, self.fixed_s + self.per_row_s * rows)


@dataclass(frozen=True, slots=True)
class StrictCost:
    """The cost of strict passes.

    Processor seconds an image with free and with strict passes, rows of a free pass, and whether the strict
    images are equal in two orders of arrival.
    """

    free_s: float
    strict_s: float
    free_rows: float
    equal: bool

    @property
    def ratio(self) -> float:
        return self.strict_s / self.free_s


def sample_requests(factors: int, now: float) -> Iterator[SampleRequest]:
    """Yield an endless mix: every other sample guided, solvers and classes in turn, far deadlines."""
    for k in count():
        rung = RUNGS[k % len(RUNGS)]
        yield SampleRequest(
            id=f"job-{k}/0",
            condition=(ConditionTerm((k % CLASSES, *(None,) * (factors - 1))),),
            mix="linear",
            seed=k,
            rung=rung,
            requested=rung,
            guidance_scale=2.0 if k % 2 else 1.0,
            previews=0,
            deadline_at=now + 1e6,
            allow_degraded=True,
            consent=Consent(),
        )


def open_engine(backend: Backend, costs: CostModel, *, rows: int, strict: bool = False) -> Engine:
    ladder = Ladder(RUNGS)
    return Engine(
        backend=backend,
        conditions=ConditionCaches(backend),
        scheduler=Scheduler(max_rows=rows, strict=strict),
        planner=Planner(ladder),
        ladder=ladder,
        costs=costs,
        schedule=backend.manifest.diffusion.noise_schedule(),
        clock=time.perf_counter,
    )


def engine_ms(manifest: Manifest, *, rows: int, steps: int) -> Milliseconds:
    """Return the processor milliseconds of a step beside the network, as means of blocks of steps."""
    engine = open_engine(NoopBackend(manifest), FixedCostModel(fixed_s=1.0, per_row_s=0.01), rows=rows)
    source = sample_requests(len(manifest.factors), time.perf_counter())

    def block(length: int) -> float:
        start = time.thread_time()
        for _ in range(length):
            while engine.running < rows:
                engine.add(next(source))
            engine.step()
        return 1e3 * (time.thread_time() - start) / length

    block(WARM_UP_STEPS)
    return np.array([block(BLOCK) for _ in range(max(1, steps // BLOCK))])


def network_ms(backend: Backend, *, rows: int, passes: int = 30) -> Milliseconds:
    """Return the processor milliseconds of passes of `rows` rows, after two uncounted ones."""
    manifest = backend.manifest
    random = np.random.default_rng(0)
    x = random.standard_normal((rows, manifest.config.in_channels, *manifest.config.image_size), np.float32)
    labels = np.zeros((rows, len(manifest.factors)), np.int64)
    state = backend.modulate(np.linspace(0, 999, rows, dtype=np.float32), backend.embed(labels))
    times = []
    for _ in range(passes + 2):
        start = time.process_time()
        backend.denoise(x, state)
        times.append(1e3 * (time.process_time() - start))
    return np.array(times[2:])


def strict_cost(backend: Backend, *, rows: int, images: int) -> StrictCost:
    """Make the same images with free passes and with passes of exactly `rows` rows.

    One image joins every third step.
    """
    source = sample_requests(len(backend.manifest.factors), time.perf_counter())
    requests = list(islice(source, images))

    def make(order: Sequence[SampleRequest], strict: bool) -> tuple[float, float, dict[str, Floats]]:
        engine = open_engine(backend, CostModel(), rows=rows, strict=strict)
        engine.warm_up()
        waiting, latents, sizes = list(order)[::-1], dict[str, Floats](), list[int]()
        start = time.process_time()
        for step in count():
            if waiting and (step % 3 == 0 or engine.idle):
                engine.add(waiting.pop())
            step_report = engine.step()
            sizes.append(step_report.rows)
            latents |= {sample.id: sample.latent for sample in step_report.finished}
            if not waiting and engine.idle:
                return (time.process_time() - start) / images, float(np.mean(sizes)), latents
        raise AssertionError

    free_s, free_rows, _ = make(requests, strict=False)
    strict_s, _, latents = make(requests, strict=True)
    _, _, reversed_latents = make(requests[::-1], strict=True)
    equal = all(np.array_equal(latents[name], reversed_latents[name]) for name in latents)
    return StrictCost(free_s, strict_s, free_rows, equal)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("engine_overhead", __doc__)
    parser.add_argument("bundle", type=Path, nargs="?", default=report.DEFAULT_BUNDLE)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--strict", type=int, help="instead: the price of passes of exactly so many rows")
    parser.add_argument("--images", type=int, default=24, help="images to find that price with")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options, background = parse(arguments), report.BackgroundLoad()

    def work() -> None:
        bundle = Bundle.open(options.bundle)
        backend = load_backend("onnx", bundle, threads=options.threads, precision="fp32")
        if options.strict:
            cost = strict_cost(backend, rows=options.strict, images=options.images)
            print(
                f"{cost.free_s:.3f} s an image at {cost.free_rows:.1f} rows a pass, {cost.strict_s:.3f} s "
                f"at exactly {options.strict}: {cost.ratio:.2f} times; "
                f"equal to the last bit in another order: {cost.equal}"
            )
            report.save("engine_strict", options, background, asdict(cost))
            return
        own = engine_ms(bundle.manifest, rows=options.rows, steps=options.steps)
        p50, p95 = (float(value) for value in np.percentile(own, [50, 95]))
        step = float(np.median(network_ms(backend, rows=options.rows)))
        print(
            f"{options.rows} rows of {bundle.manifest.name}: p50 {p50:.3f} ms, p95 {p95:.3f} ms "
            f"beside a network of {step:.1f} ms: {100 * p50 / step:.2f} %"
        )
        figures = {"p50_ms": p50, "p95_ms": p95, "network_ms": step, "share": p50 / step}
        report.save("engine_overhead", options, background, figures)

    return report.run_command("engine_overhead", work)


if __name__ == "__main__":
    sys.exit(main())

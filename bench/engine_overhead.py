"""What a step costs beside the network: plan, schedule, gather, guide, solve, count; and what `strict` costs.

    python -m bench.engine_overhead [BUNDLE] [--rows 8] [--steps 1000] [--threads 1]
    python -m bench.engine_overhead [BUNDLE] --strict 8 [--images 24]

The first compares steps of an engine whose network does nothing with the network's own time for as many rows; the bar is 2 %. Rows are
guided and unguided samples of mixed solvers and lengths with deadlines, joining included; conditions repeat, so the modulation cache
is warm as it is in service. Both are processor time of this process, so that other tenants of the machine do not count.
The second makes the same images, joining one by one, with passes of just the rows there are and with passes of exactly so many rows,
and checks that the latter are equal to the last bit in another order of arrival. Writes bench/results/engine_overhead.json, or
engine_strict.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ditserve.bench.record import Neighbours, save
from ditserve.model.spec.bundle import Bundle, Manifest
from ditserve.service.backends import CONDITIONER_ROWS, Backend, load_backend
from ditserve.service.engine.conditions import ConditionCaches
from ditserve.service.engine.engine import Engine
from ditserve.service.engine.samples import SampleRequest
from ditserve.service.engine.scheduler import Scheduler
from ditserve.service.jobs import ConditionTerm
from ditserve.service.planning.costs import CostModel
from ditserve.service.planning.ladder import Ladder
from ditserve.service.planning.planner import Planner
from ditserve.service.rung import Rung

Floats = npt.NDArray[np.float32]

RUNGS = (
    Rung("ddim-50", "ddim", 50, "trailing", (0.0, 1.0), 0.0),
    Rung("ddim-30", "ddim", 30, "leading", (0.0, 1.0), 0.1),
    Rung("dpmpp-20", "dpmpp-2m", 20, "uniform-t", (0.1, 0.8), 0.2),
    Rung("dpmpp-12", "dpmpp-2m", 12, "uniform-t", (0.1, 0.8), 0.4),
)
BLOCK = 20  # steps timed together: reading the clock costs as much as a part of a step
WARM = 200  # steps that fill the modulation cache
CLASSES = 5  # in turn


class NoBackend:
    """Answers at once: a slice of its input, and zeros."""

    name = "none"
    precision = "fp32"
    buckets: tuple[int, ...] | None = None
    conditioner_rows = CONDITIONER_ROWS
    size_multiple: int | None = None

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._output = np.zeros((256, manifest.config.in_channels, *manifest.config.image_size), np.float32)

    def embed(self, labels: npt.NDArray[np.int64], text: Floats | None = None) -> Floats:
        return np.zeros((len(labels), self.manifest.embedding_size), np.float32)

    def modulate(self, timesteps: Floats, embeddings: Floats) -> tuple[Floats, ...]:
        return tuple(np.zeros((len(timesteps), *entry.shape), np.float32) for entry in self.manifest.state)

    def denoise(self, x: Floats, state: tuple[Floats, ...]) -> Floats:
        return self._output[: len(x)]

    def decode(self, latents: Floats) -> npt.NDArray[np.uint8]:
        n, _, height, width = latents.shape
        return np.zeros((n, height, width, 3), np.uint8)

    def close(self) -> None:
        pass


class FlatCosts(CostModel):
    """Learns nothing of a network that takes no time; its best batch stays at the cap."""

    def observe(self, rows: int, seconds: float) -> None:
        super().observe(rows, self.fixed_s + self.per_row_s * rows)


@dataclass(frozen=True, slots=True)
class Price:
    """Processor seconds an image and rows a pass, with as many rows as there are and with a fixed number."""

    free_s: float
    strict_s: float
    free_rows: float
    equal: bool  # strict images in two orders of arrival

    @property
    def ratio(self) -> float:
        return self.strict_s / self.free_s


def requests(factors: int, now: float) -> Iterator[SampleRequest]:
    """An endless mix: every other sample guided, solvers and classes in turn, far deadlines."""
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
            min_steps=1,
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


def overhead(manifest: Manifest, *, rows: int, steps: int) -> npt.NDArray[np.float64]:
    """Processor milliseconds of a step of `rows` rows beside the network: means of blocks of steps, `steps` in all."""
    engine = open_engine(NoBackend(manifest), FlatCosts(fixed_s=1.0, per_row_s=0.01), rows=rows)
    source = requests(len(manifest.factors), time.perf_counter())

    def block(length: int) -> float:
        start = time.thread_time()
        for _ in range(length):
            while engine.running < rows:
                engine.add(next(source))
            engine.step()
        return 1e3 * (time.thread_time() - start) / length

    block(WARM)
    return np.array([block(BLOCK) for _ in range(max(1, steps // BLOCK))])


def network(backend: Backend, *, rows: int, passes: int = 30) -> npt.NDArray[np.float64]:
    """Processor milliseconds of passes of `rows` rows."""
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


def price(backend: Backend, *, rows: int, images: int) -> Price:
    """Make `images` images, a new one every third step, freely and at exactly `rows` rows a pass."""
    wanted = list(islice(requests(len(backend.manifest.factors), time.perf_counter()), images))

    def make(order: Sequence[SampleRequest], strict: bool) -> tuple[float, float, dict[str, Floats]]:
        engine = open_engine(backend, CostModel(), rows=rows, strict=strict)
        engine.warm_up()
        waiting, made, sizes = list(order)[::-1], dict[str, Floats](), list[int]()
        start = time.process_time()
        for step in count():
            if waiting and (step % 3 == 0 or engine.idle):
                engine.add(waiting.pop())
            report = engine.step()
            sizes.append(report.rows)
            made |= {each.id: each.latent for each in report.finished}
            if not waiting and engine.idle:
                return (time.process_time() - start) / images, float(np.mean(sizes)), made
        raise AssertionError

    free_s, free_rows, _ = make(wanted, strict=False)
    strict_s, _, one = make(wanted, strict=True)
    _, _, other = make(wanted[::-1], strict=True)
    return Price(free_s, strict_s, free_rows, all(np.array_equal(one[name], other[name]) for name in one))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engine_overhead", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("bundle", type=Path, nargs="?", default=Path("model/zoo/emoji"))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--strict", type=int, help="instead: the price of passes of exactly so many rows")
    parser.add_argument("--images", type=int, default=24, help="images to find that price with")
    options, neighbours = parser.parse_args(arguments), Neighbours()
    bundle = Bundle.open(options.bundle)
    backend = load_backend("onnx", bundle, threads=options.threads, precision="fp32")
    if options.strict:
        found = price(backend, rows=options.strict, images=options.images)
        print(
            f"{found.free_s:.3f} s an image at {found.free_rows:.1f} rows a pass, {found.strict_s:.3f} s at exactly "
            f"{options.strict}: {found.ratio:.2f} times; equal to the last bit in another order: {found.equal}"
        )
        save("engine_strict", vars(options), neighbours, asdict(found))
        return
    p50, p95 = np.percentile(overhead(bundle.manifest, rows=options.rows, steps=options.steps), [50, 95])
    step = float(np.median(network(backend, rows=options.rows)))
    print(
        f"{options.rows} rows of {bundle.manifest.name}: p50 {p50:.3f} ms, p95 {p95:.3f} ms beside a network of {step:.1f} ms: "
        f"{100 * p50 / step:.2f} %"
    )
    figures = {"p50_ms": float(p50), "p95_ms": float(p95), "network_ms": step, "share": float(p50 / step)}
    save("engine_overhead", vars(options), neighbours, figures)


if __name__ == "__main__":
    main()

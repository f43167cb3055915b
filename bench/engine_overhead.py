"""What a step costs beside the network: plan, schedule, gather, guide, solve, count — with a backend that does nothing.

    python -m bench.engine_overhead [--rows 8] [--size 64] [--channels 3] [--depth 8] [--hidden 256] [--steps 2000]

The bar: at most 1 ms a step at 8 rows. Rows are guided and unguided samples of mixed solvers and lengths with deadlines, and the
condition state has the size of a real model's; conditions repeat, so the modulation cache is warm as it is in service.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import count

import numpy as np
import numpy.typing as npt

from model.bundle import Defaults, DiffusionSpec, Factor, Manifest, StateTensor
from model.config import DiTConfig
from model.diffusion import make_schedule
from service.engine.conditions import Conditions
from service.engine.engine import Engine
from service.engine.samples import SampleRequest
from service.engine.scheduler import Scheduler
from service.jobs import ConditionTerm
from service.planning.costs import CostModel
from service.planning.planner import Planner
from service.planning.rungs import Ladder, Rung

Floats = npt.NDArray[np.float32]

RUNGS = (
    Rung("ddim-50", "ddim", 50, "trailing", (0.0, 1.0), 0.0),
    Rung("ddim-30", "ddim", 30, "leading", (0.0, 1.0), 0.1),
    Rung("dpmpp-20", "dpmpp-2m", 20, "uniform-t", (0.1, 0.8), 0.2),
    Rung("dpmpp-12", "dpmpp-2m", 12, "uniform-t", (0.1, 0.8), 0.4),
)


class NoBackend:
    """Answers at once: a slice of its input, and zeros."""

    name = "none"
    buckets: tuple[int, ...] | None = None

    def __init__(self, config: DiTConfig) -> None:
        state = tuple(StateTensor(name=name, shape=shape) for name, shape in config.state())
        self.manifest = Manifest(
            name="none",
            version="0",
            description="does nothing",
            config=config,
            diffusion=DiffusionSpec(schedule="cosine", prediction="x0"),
            factors=(Factor(name="label", classes=tuple(f"class-{k}" for k in range(config.classes[0]))),),
            embedding_size=config.hidden_size,
            state=state,
            defaults=Defaults(
                steps=50, solver="ddim", grid="trailing", guidance_scale=2.0, guidance_interval=(0.0, 1.0)
            ),
            licence="Apache-2.0",
        )
        self._output = np.zeros((256, config.in_channels, *config.image_size), np.float32)

    def embed(self, labels: npt.NDArray[np.int64]) -> Floats:
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
    """Learns nothing of a network that takes no time; its knee stays at the cap."""

    def observe(self, rows: int, seconds: float) -> None:
        super().observe(rows, self.fixed_s + self.per_row_s * rows)


def requests(now: float) -> Iterator[SampleRequest]:
    """An endless mix: every other sample guided, solvers and classes in turn, far deadlines."""
    for k in count():
        rung = RUNGS[k % len(RUNGS)]
        yield SampleRequest(
            id=f"job-{k}/0",
            condition=(ConditionTerm((k % 5,)),),
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


def measure(config: DiTConfig, *, rows: int, steps: int) -> npt.NDArray[np.float64]:
    """Processor milliseconds of each of `steps` full steps of `rows` rows."""
    backend = NoBackend(config)
    ladder = Ladder(RUNGS)
    engine = Engine(
        backend=backend,
        conditions=Conditions(backend),
        scheduler=Scheduler(max_rows=rows),
        planner=Planner(ladder),
        ladder=ladder,
        costs=FlatCosts(fixed_s=1.0, per_row_s=0.01),
        schedule=make_schedule("cosine"),
        clock=time.perf_counter,
    )
    source = requests(time.perf_counter())
    times: list[float] = []
    for step in range(steps + 400):  # the first fill the modulation cache
        while engine.running < rows:
            engine.add(next(source))
        start = time.thread_time()  # other tenants of the machine do not count
        report = engine.step()
        if step >= 400 and report.rows == rows:
            times.append(time.thread_time() - start)
    return 1e3 * np.array(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engine_overhead", description=__doc__.splitlines()[0]
    )
    for name, value in {
        "rows": 8,
        "size": 64,
        "channels": 3,
        "patch": 8,
        "depth": 8,
        "hidden": 256,
        "steps": 2000,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    chosen = parser.parse_args()
    config = DiTConfig(
        image_size=(chosen.size, chosen.size),
        patch_size=chosen.patch,
        in_channels=chosen.channels,
        hidden_size=chosen.hidden,
        depth=chosen.depth,
        num_heads=4,
        classes=(5,),
        learn_sigma=False,
    )
    times = measure(config, rows=chosen.rows, steps=chosen.steps)
    p50, p95 = np.percentile(times, [50, 95])
    print(
        f"{chosen.rows} rows of {chosen.channels}x{chosen.size}x{chosen.size}: p50 {p50:.3f} ms, p95 {p95:.3f} ms a step"
    )


if __name__ == "__main__":
    main()

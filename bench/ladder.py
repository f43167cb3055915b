"""Measure a bundle's quality ladder: what fewer steps, another solver or a narrower guidance interval cost and save.

    python -m bench.ladder BUNDLE [--write] [--samples 16] [--threads 0] [--rows 8] [--narrow .1 .8]

Every candidate makes the same images (same noise, same labels) as DDIM in 250 steps on the bundle itself; its quality is the RMS
distance to those, its cost the forward rows of one image. The candidates that nothing cheaper matches are the ladder: printed, drawn
to bench/results/ladder-<name>.png and, with --write, put into the manifest. A narrower guidance interval is tried on demand only: it
aims at other images than the reference's, and this measure counts that as loss. DPM-Solver++ is the only multistep candidate: it may
follow any other solver in the middle of a run, which a rung must.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from bench.plots import RESULTS, draw_ladder
from model.bundle import Bundle, Manifest, RungSpec, write_manifest
from model.diffusion import grid, guidance_weight, guided
from model.solvers import step_table, trajectory
from service.backends import Backend, load_backend
from service.planning.rungs import Interval, Ladder, Rung

Floats = npt.NDArray[np.float32]

REFERENCE_STEPS = 250
# solver → grids and counts of steps to try
CANDIDATES: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "ddim": (("trailing", "uniform-t"), (100, 50, 40, 30, 25, 20, 16, 12, 10, 8, 6)),
    "dpmpp-2m": (("trailing", "uniform-t"), (50, 40, 30, 25, 20, 16, 14, 12, 10, 9, 8, 7, 6, 5, 4)),
}
WORTHWHILE = 0.9  # a rung costs at most this share of the one above it


@dataclass(frozen=True, slots=True)
class Task:
    """The images every candidate makes: noise (N, C, H, W), their embeddings (N, E) and the null condition's (N, E)."""

    noise: Floats
    embeddings: Floats
    null: Floats
    guidance_scale: float


def candidates(intervals: Iterable[Interval], ddim_grid: str, timesteps: int) -> Iterator[Rung]:
    """Every combination of solver, grid, steps and interval; `ddim_grid` is tried besides DDIM's usual ones."""
    for interval in intervals:
        for solver, (grids, counts) in CANDIDATES.items():
            for kind in dict.fromkeys((*grids, ddim_grid) if solver == "ddim" else grids):
                for steps in counts:
                    if steps <= timesteps:
                        yield Rung(f"{solver}-{steps}", solver, steps, kind, interval, 0.0)


def front(measured: Sequence[RungSpec], *, worthwhile: float = WORTHWHILE) -> tuple[RungSpec, ...]:
    """The candidates that nothing of at most their cost matches, best first, thinned to worthwhile savings."""
    kept: list[RungSpec] = []
    best = float("inf")
    for each in sorted(measured, key=lambda spec: (spec.rows, spec.quality)):
        if each.quality < best:
            best = each.quality
            kept.append(each)
    ladder: list[RungSpec] = []
    for each in reversed(kept):
        if not ladder or each.rows <= worthwhile * ladder[-1].rows:
            ladder.append(each)
    return tuple(ladder)


def make_task(backend: Backend, samples: int, seed: int) -> Task:
    """`samples` images of labels drawn evenly from all classes of every factor."""
    manifest = backend.manifest
    random = np.random.Generator(np.random.Philox(seed))
    sizes = [len(factor.classes) for factor in manifest.factors]
    labels = np.stack([random.integers(0, size, samples) for size in sizes], axis=1)
    null = np.broadcast_to(np.array(sizes), labels.shape).copy()
    shape = (samples, manifest.config.in_channels, *manifest.config.image_size)
    return Task(
        noise=random.standard_normal(shape, dtype=np.float32),
        embeddings=backend.embed(labels),
        null=backend.embed(null),
        guidance_scale=manifest.defaults.guidance_scale,
    )


def generate(backend: Backend, task: Task, rung: Rung, *, rows: int) -> Floats:
    """The task's images (N, C, H, W) at a rung, `rows` at a time."""
    manifest = backend.manifest
    spec = manifest.diffusion
    schedule = spec.noise_schedule()
    table = step_table(rung.solver, grid(rung.grid, rung.steps, spec.timesteps), schedule)
    channels = manifest.config.in_channels
    images = []
    for start in range(0, len(task.noise), rows):
        part = slice(start, start + rows)

        def network(x: Floats, t: int, part: slice = part) -> Floats:
            def ask(embeddings: Floats) -> Floats:
                state = backend.modulate(np.full(len(x), t, np.float32), embeddings)
                return backend.denoise(np.ascontiguousarray(x, np.float32), state)[:, :channels]

            output = ask(task.embeddings[part])
            weight = guidance_weight(task.guidance_scale, t, spec.timesteps, rung.guidance_interval)
            if weight == 1.0:
                return output
            return guided(output, ask(task.null[part]), weight, spec.guidance_channels)

        *_, (x, _) = trajectory(table, task.noise[part], network, clip_x0=spec.clip_x0)
        images.append(x)
    return np.concatenate(images)


def measure(backend: Backend, task: Task, rungs: Iterable[Rung], *, rows: int) -> Iterator[RungSpec]:
    """Each rung with its rows an image and its RMS distance to the reference."""
    manifest = backend.manifest
    ladder = Ladder((), timesteps=manifest.diffusion.timesteps)
    usual = manifest.defaults.guidance_interval
    steps = min(REFERENCE_STEPS, manifest.diffusion.timesteps)
    reference = generate(backend, task, Rung("reference", "ddim", steps, "trailing", usual, 0.0), rows=rows)
    for rung in rungs:
        images = generate(backend, task, rung, rows=rows)
        low, high = rung.guidance_interval
        yield RungSpec(
            name=rung.name if rung.guidance_interval == usual else f"{rung.name}-g{low:g}-{high:g}",
            solver=rung.solver,
            steps=rung.steps,
            grid=rung.grid,
            guidance_interval=rung.guidance_interval,
            rows=ladder.row_steps(rung, task.guidance_scale),
            quality=float(np.sqrt(np.mean((images - reference) ** 2))),
        )


def intervals(manifest: Manifest, narrow: Interval | None) -> tuple[Interval, ...]:
    """The bundle's own guidance interval, and the part of it inside `narrow` if it is guided at all."""
    low, high = usual = manifest.defaults.guidance_interval
    if narrow is None:
        return (usual,)
    inside = max(low, narrow[0]), min(high, narrow[1])
    guides = manifest.defaults.guidance_scale != 1.0 and inside[0] < inside[1]
    return (usual, inside) if guides and inside != usual else (usual,)


def _table(measured: Sequence[RungSpec], ladder: Sequence[RungSpec]) -> Table:
    table = Table(title="rungs, dearest first; the ladder is marked")
    for column in ("", "rung", "grid", "guidance", "rows", "quality"):
        table.add_column(column, justify="right" if column in ("rows", "quality") else "left")
    for each in sorted(measured, key=lambda spec: (-spec.rows, spec.quality)):
        low, high = each.guidance_interval
        mark = "●" if each in ladder else ""
        table.add_row(
            mark, each.name, each.grid, f"{low:g}–{high:g}", f"{each.rows:g}", f"{each.quality:.4f}"
        )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ladder", description="Measure a bundle's quality ladder."
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--write", action="store_true", help="put the ladder into the bundle's manifest")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=8, help="images at a time")
    parser.add_argument("--threads", type=int, default=0, help="0: one per core")
    parser.add_argument("--narrow", type=float, nargs=2, help="a guidance interval to try as well")
    options = parser.parse_args(arguments)

    console = Console()
    bundle = Bundle.open(options.bundle)
    manifest = bundle.manifest
    backend = load_backend("onnx", bundle, threads=options.threads)
    narrow = tuple(options.narrow) if options.narrow else None
    rungs = candidates(intervals(manifest, narrow), manifest.defaults.grid, manifest.diffusion.timesteps)
    task = make_task(backend, options.samples, options.seed)
    with console.status("measuring"):
        measured = list(measure(backend, task, rungs, rows=options.rows))
    backend.close()
    ladder = front(measured)
    console.print(_table(measured, ladder))
    RESULTS.mkdir(exist_ok=True)
    draw_ladder(measured, ladder, RESULTS / f"ladder-{manifest.name}.png")
    if options.write:
        write_manifest(bundle.path, manifest.model_copy(update={"ladder": ladder}))


if __name__ == "__main__":
    main()

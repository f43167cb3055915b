"""Measure a bundle's quality ladder: what fewer steps, another solver or a narrower guidance interval cost and save.

    python -m bench.ladder BUNDLE [--write] [--data data/emoji64.npz] [--samples 12] [--threads 1] [--rows 8] [--narrow .1 .8]

Every candidate makes the same images (same noise, same labels) as DDIM in 250 steps on the bundle itself; its quality is the RMS
distance to those, its cost the forward rows of one image. The candidates that nothing cheaper matches are the ladder: printed, saved
and drawn to bench/results/ladder-<name>.{json,png} and, with --write, put into the manifest. With --data, the rungs of the ladder are
also judged by the Fréchet distance of --pictures images to the training pictures, which says whether a distance can be seen.
A narrower guidance interval is tried on demand only: it aims at other images than the reference's, and the first measure counts
that as loss.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ditserve.bench.plots import RESULTS, draw_ladder
from ditserve.bench.reference import Reference
from ditserve.model.data.examples import DataError
from ditserve.model.evaluation.classifier_network import ClassifierError
from ditserve.model.spec.bundle import Bundle, BundleError, Manifest, RungSpec, write_atomic, write_manifest
from ditserve.model.spec.diffusion import grid, guidance_weight, guided
from ditserve.model.spec.solvers import step_table, trajectory
from ditserve.model.train.loaded_model import LoadError
from ditserve.service.backends import Backend, BackendUnavailable, load_backend
from ditserve.service.planning.ladder import Ladder
from ditserve.service.rung import Interval, Rung

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

REFERENCE_STEPS = 250
# solver → grids and counts of steps to try
CANDIDATES: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "ddim": (("trailing",), (100, 50, 30, 20, 16, 12, 8)),
    "dpmpp-2m": (("trailing", "uniform-t"), (50, 40, 30, 25, 20, 16, 14, 12, 10, 8, 6, 5, 4)),
    "unipc-1": (("trailing", "uniform-t"), (30, 25, 20, 16, 14, 12, 10, 8, 6, 5, 4)),
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


def make_task(backend: Backend, samples: int, seed: int, labels: Labels | None = None) -> Task:
    """Images of `labels` (N, F), or `samples` images of labels drawn evenly from all classes of every factor."""
    manifest = backend.manifest
    random = np.random.Generator(np.random.Philox(seed))
    sizes = [len(factor.classes) for factor in manifest.factors]
    if labels is None:
        labels = random.integers(0, np.array(sizes, np.int64), (samples, len(sizes)))
    null = np.broadcast_to(np.array(sizes), labels.shape).copy()
    shape = (len(labels), manifest.config.in_channels, *manifest.config.image_size)
    return Task(
        noise=random.standard_normal(shape, dtype=np.float32),
        embeddings=backend.embed(labels),
        null=backend.embed(null),
        guidance_scale=manifest.defaults.guidance_scale,
    )


def generate(
    backend: Backend, task: Task, rung: Rung, *, rows: int, ran: Callable[[int], object] = lambda rows: None
) -> Floats:
    """The task's images (N, C, H, W) at a rung, `rows` at a time; `ran` is told of every pass's rows."""
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
                ran(len(x))
                return backend.denoise(np.ascontiguousarray(x, np.float32), state)[:, :channels]

            output = ask(task.embeddings[part])
            weight = guidance_weight(task.guidance_scale, t, spec.timesteps, rung.guidance_interval)
            if weight == 1.0:
                return output
            return guided(output, ask(task.null[part]), weight, spec.guidance_channels)

        *_, (x, _) = trajectory(table, task.noise[part], network, clip_x0=spec.clip_x0)
        images.append(x)
    return np.concatenate(images)


def reference_rung(manifest: Manifest) -> Rung:
    steps = min(REFERENCE_STEPS, manifest.diffusion.timesteps)
    return Rung("reference", "ddim", steps, "trailing", manifest.defaults.guidance_interval, 0.0)


def measure(
    backend: Backend,
    task: Task,
    rungs: Iterable[Rung],
    *,
    rows: int,
    ran: Callable[[int], object] = lambda rows: None,
) -> Iterator[RungSpec]:
    """Each rung with its rows an image and its RMS distance to the reference."""
    manifest = backend.manifest
    ladder = Ladder((), timesteps=manifest.diffusion.timesteps)
    usual = manifest.defaults.guidance_interval
    reference = generate(backend, task, reference_rung(manifest), rows=rows, ran=ran)
    for rung in rungs:
        images = generate(backend, task, rung, rows=rows, ran=ran)
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


def judge(
    backend: Backend,
    ladder: Sequence[RungSpec],
    reference: Reference,
    *,
    rows: int,
    ran: Callable[[int], object],
) -> dict[str, float]:
    """Fréchet distance to the real pictures by rung, each for the same labels and noise."""
    task = make_task(backend, 0, 0, reference.labels)
    found = {}
    for each in ladder:
        rung = Rung(each.name, each.solver, each.steps, each.grid, each.guidance_interval, each.quality)
        found[each.name] = reference.distance(
            backend.decode(generate(backend, task, rung, rows=rows, ran=ran))
        )
    return found


def _table(measured: Sequence[RungSpec], ladder: Sequence[RungSpec], frechet: Mapping[str, float]) -> Table:
    table = Table(title="rungs, dearest first; the ladder is marked")
    for column in ("", "rung", "grid", "guidance", "rows", "quality", "Fréchet"):
        table.add_column(column, justify="right" if column in ("rows", "quality", "Fréchet") else "left")
    for each in sorted(measured, key=lambda spec: (-spec.rows, spec.quality)):
        low, high = each.guidance_interval
        kept = each in ladder
        distance = f"{frechet[each.name]:.3f}" if kept and frechet else ""
        table.add_row(
            "●" if kept else "",
            each.name,
            each.grid,
            f"{low:g}–{high:g}",
            f"{each.rows:g}",
            f"{each.quality:.4f}",
            distance,
        )
    return table


def climb(
    bundle: Bundle, backend: Backend, options: argparse.Namespace, console: Console
) -> tuple[list[RungSpec], tuple[RungSpec, ...], dict[str, float]]:
    """Everything measured, the ladder, and its rungs' Fréchet distances where there are real pictures."""
    manifest = bundle.manifest
    narrow = tuple(options.narrow) if options.narrow else None
    timesteps = manifest.diffusion.timesteps
    rungs = list(candidates(intervals(manifest, narrow), manifest.defaults.grid, timesteps))
    reference = None
    if options.data:
        reference = Reference(bundle.path, options.data, options.classifier, pictures=options.pictures)
    scale, costs = manifest.defaults.guidance_scale, Ladder((), timesteps=timesteps)
    rows = sum(costs.row_steps(rung, scale) for rung in (reference_rung(manifest), *rungs))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        first = progress.add_task("rows, candidates", total=rows * options.samples)
        task = make_task(backend, options.samples, options.seed)
        measured = list(
            measure(backend, task, rungs, rows=options.rows, ran=lambda n: progress.advance(first, n))
        )
        ladder = front(measured)
        if reference is None:
            return measured, ladder, {}
        second = progress.add_task(
            "rows, Fréchet distance", total=int(sum(each.rows for each in ladder)) * len(reference.labels)
        )
        frechet = judge(
            backend, ladder, reference, rows=options.rows, ran=lambda n: progress.advance(second, n)
        )
    return measured, ladder, frechet


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ladder", description="Measure a bundle's quality ladder."
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--write", action="store_true", help="put the ladder into the bundle's manifest")
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=8, help="images at a time")
    parser.add_argument("--threads", type=int, default=1, help="0: one per core")
    parser.add_argument("--narrow", type=float, nargs=2, help="a guidance interval to try as well")
    parser.add_argument(
        "--data", type=Path, help="the pictures the model was trained on, for Fréchet distances"
    )
    parser.add_argument("--classifier", type=Path, default=Path("model/zoo/emoji-classifier"))
    parser.add_argument("--pictures", type=int, default=64, help="images of each rung to compare with them")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 done, 2 refused with one sentence on stderr."""
    options, console = _parse(arguments), Console()
    try:
        bundle = Bundle.open(options.bundle)
        backend = load_backend("onnx", bundle, threads=options.threads, precision="fp32")
        measured, ladder, frechet = climb(bundle, backend, options, console)
    except (BackendUnavailable, BundleError, ClassifierError, DataError, LoadError) as error:
        print(f"bench.ladder: {error}", file=sys.stderr)
        return 2
    backend.close()
    console.print(_table(measured, ladder, frechet))
    RESULTS.mkdir(exist_ok=True)
    name = f"ladder-{bundle.manifest.name}"
    draw_ladder(measured, ladder, frechet, RESULTS / f"{name}.png")
    record = {
        "bundle": f"{bundle.manifest.name} {bundle.manifest.version}",
        "samples": options.samples,
        "pictures": options.pictures if frechet else 0,
        "ladder": [each.name for each in ladder],
        "frechet": frechet,
        "measured": [each.model_dump(mode="json") for each in measured],
    }
    write_atomic(RESULTS / f"{name}.json", (json.dumps(record, indent=1) + "\n").encode())
    if options.write:
        write_manifest(bundle.path, bundle.manifest.model_copy(update={"ladder": ladder}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

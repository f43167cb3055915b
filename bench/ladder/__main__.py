"""Measure a bundle's quality ladder: what fewer steps or another solver cost and save.

    python -m bench.ladder BUNDLE [--write] [--data data/emoji64.npz] [--samples 12] [--threads 1] [--rows 8]
        [--narrow .1 .8]

Every candidate makes the same images (same noise, same labels) as DDIM in 250 steps on the bundle itself. Its
quality is the RMS distance to those, its cost the forward rows of one image. The candidates that nothing
cheaper matches are the ladder: it is printed, saved and drawn to bench/results/ladder-<name>.{json,png} and,
with --write, put into the manifest. With --data, the rungs of the ladder also get the Fréchet distance of
--pictures images to the training pictures, which says whether a distance can be seen. A narrower guidance
interval is tried on demand only: it aims at other images than the reference's, and the RMS distance counts
that as loss.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ditserve.bench import report
from ditserve.bench.ladder import measure as ladders
from ditserve.bench.ladder.training_pictures import TrainingPictures
from ditserve.bench.plots import draw_ladder
from ditserve.model.spec.bundle import Bundle, RungSpec, write_manifest
from ditserve.model.spec.output_folder import BUNDLE, claim
from ditserve.service.backends import Backend, load_backend
from ditserve.service.planning.ladder import Ladder

COLUMNS = ("", "rung", "grid", "guidance", "rows", "quality", "Fréchet")


@dataclass(frozen=True, slots=True)
class MeasuredLadder:
    """The measured candidates, the ladder, and its Fréchet distances if there are training pictures."""

    candidates: Sequence[RungSpec]
    ladder: Sequence[RungSpec]
    frechet: Mapping[str, float] = field(default_factory=dict)


def measure_ladder(
    bundle: Bundle, backend: Backend, options: argparse.Namespace, console: Console
) -> MeasuredLadder:
    """Measure all candidates with a progress bar that counts rows."""
    manifest = bundle.manifest
    narrow = tuple(options.narrow) if options.narrow else None
    schedule = manifest.diffusion.noise_schedule()
    intervals = ladders.intervals(manifest, narrow)
    rungs = list(ladders.candidates(intervals, manifest.defaults.grid, schedule))
    pictures = None
    if options.data:
        pictures = TrainingPictures(bundle.path, options.data, options.classifier, pictures=options.pictures)
    scale, costs = manifest.defaults.guidance_scale, Ladder((), schedule)
    rows = sum(costs.row_steps(rung, scale) for rung in (ladders.reference_rung(manifest), *rungs))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("rows, candidates", total=rows * options.samples)
        inputs = ladders.image_inputs(backend, options.samples, options.seed)
        candidates = list(
            ladders.measure(
                backend, inputs, rungs, rows=options.rows, on_pass=lambda n: progress.advance(task, n)
            )
        )
        ladder = ladders.best_rungs(candidates)
        if pictures is None:
            return MeasuredLadder(candidates, ladder)
        total = int(sum(rung.rows for rung in ladder)) * len(pictures.labels)
        second = progress.add_task("rows, Fréchet distance", total=total)
        frechet = ladders.frechet_distances(
            backend, ladder, pictures, rows=options.rows, on_pass=lambda n: progress.advance(second, n)
        )
    return MeasuredLadder(candidates, ladder, frechet)


def ladder_table(measured: MeasuredLadder) -> Table:
    rows = []
    for rung in sorted(measured.candidates, key=lambda spec: (-spec.rows, spec.quality)):
        low, high = rung.guidance_interval
        kept = rung in measured.ladder
        distance = f"{measured.frechet[rung.name]:.3f}" if kept and measured.frechet else ""
        interval, quality = f"{low:g}–{high:g}", f"{rung.quality:.4f}"
        rows.append(
            ("●" if kept else "", rung.name, rung.grid, interval, f"{rung.rows:g}", quality, distance)
        )
    text = {"", "rung", "grid", "guidance"}
    return report.table("rungs, dearest first; the ladder is marked", COLUMNS, rows, text=text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("ladder", __doc__)
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
    options, console = parse(arguments), Console()

    def work() -> None:
        with claim(options.bundle, BUNDLE) if options.write else nullcontext():
            measure_and_report()

    def measure_and_report() -> None:
        bundle = Bundle.open(options.bundle)
        backend = load_backend("onnx", bundle, threads=options.threads, precision="fp32")
        measured = measure_ladder(bundle, backend, options, console)
        backend.close()
        console.print(ladder_table(measured))
        name = f"ladder-{bundle.manifest.name}"
        figure = report.result_path(f"{name}.png")
        draw_ladder(measured.candidates, measured.ladder, measured.frechet, figure)
        record = {
            "bundle": f"{bundle.manifest.name} {bundle.manifest.version}",
            "samples": options.samples,
            "pictures": options.pictures if measured.frechet else 0,
            "ladder": [rung.name for rung in measured.ladder],
            "frechet": measured.frechet,
            "measured": [rung.model_dump(mode="json") for rung in measured.candidates],
        }
        report.write_json(report.result_path(f"{name}.json"), record)
        if options.write:
            write_manifest(bundle.path, bundle.manifest.model_copy(update={"ladder": measured.ladder}))

    return report.run_command("ladder", work)


if __name__ == "__main__":
    sys.exit(main())

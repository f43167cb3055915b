"""Measure a bundle's quality ladder: what fewer steps or another solver cost and save.

    python -m bench.ladder BUNDLE [--write] [--data data/emoji64.npz] [--samples 32] [--threads 1]

Every candidate makes the same images (same noise, same labels) as DDIM in 250 steps. Its cost are the forward
rows of one image. Its distance to the long run is the RMS of the differences; with --data, the training
pictures, its distance to real pictures is their energy score. The candidates that no other beats in cost and
in both distances are the ladder. It is printed, saved and drawn to bench/results/ladder-<name>.{json,png}
and, with --write, put into the manifest; the bundle's defaults stay. With --classifier, the rungs also get
the Fréchet distance of --pictures images to the training pictures. The quick measurement is a part of
`python -m export.onnx`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ditserve.bench import report
from ditserve.bench.ladder.training_pictures import TrainingPictures
from ditserve.bench.plots import draw_ladder
from ditserve.export.calibrate import with_backbone
from ditserve.export.parity import graph_backbone
from ditserve.model.evaluation.ladder import THOROUGH, LadderMeasurement, MeasuredLadder, draw_inputs
from ditserve.model.evaluation.picture_sets import open_data
from ditserve.model.spec.bundle import BACKBONE, Bundle, write_manifest
from ditserve.model.spec.command_line import named_path, positive, thread_count
from ditserve.model.spec.errors import ModelError
from ditserve.model.spec.output_folder import BUNDLE, claim
from ditserve.model.train.loaded_model import LoadedModel, load_bundle

COLUMNS = ("", "rung", "grid", "rows", "to its long run", "to real pictures", "Fréchet")


def measure_ladder(
    model: LoadedModel, options: argparse.Namespace, console: Console
) -> tuple[MeasuredLadder, dict[str, float]]:
    """Measure all candidates, and the Fréchet distances of the ladder, with progress bars that count rows."""
    dataset = None if options.data is None else open_data(model, options.data)
    training = None
    if dataset is not None and options.classifier is not None:
        training = TrainingPictures(model, dataset, options.classifier, pictures=options.pictures)
    inputs = draw_inputs(model, options.samples, dataset)
    data = "" if options.data is None else options.data.name
    measurement = LadderMeasurement(model.manifest, THOROUGH, inputs, settled=True, data=data)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        first = progress.add_task("rows, candidates", total=measurement.rows)
        measured = measurement.run(model.network, lambda rows: progress.advance(first, rows))
        if training is None:
            return measured, {}
        total = int(sum(rung.rows for rung in measured.ladder)) * len(training.inputs)
        second = progress.add_task("rows, Fréchet distance", total=total)
        frechet = training.distances(measured.ladder, lambda rows: progress.advance(second, rows))
    return measured, frechet


def ladder_table(measured: MeasuredLadder, frechet: Mapping[str, float]) -> Table:
    rows = []
    for rung in sorted(measured.measured, key=lambda spec: (-spec.rows, spec.quality)):
        kept = rung in measured.ladder
        distances = [f"{value:.4f}" if value is not None else "" for value in (rung.own, rung.real)]
        fidelity = f"{frechet[rung.name]:.3f}" if kept and frechet else ""
        rows.append(("●" if kept else "", rung.name, rung.grid, f"{rung.rows:g}", *distances, fidelity))
    return report.table(
        "rungs, dearest first; the ladder is marked", COLUMNS, rows, text={"", "rung", "grid"}
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("ladder", __doc__)
    parser.add_argument("bundle", type=named_path)
    parser.add_argument("--write", action="store_true", help="put the ladder into the bundle's manifest")
    parser.add_argument(
        "--samples", type=positive, default=THOROUGH.conditions, help="conditions, each drawn twice"
    )
    parser.add_argument("--threads", type=thread_count, default=1)
    parser.add_argument(
        "--data", type=named_path, help="the pictures the model was trained on, to compare with"
    )
    parser.add_argument("--classifier", type=named_path, help="a classifier of them, for Fréchet distances")
    parser.add_argument(
        "--pictures", type=positive, default=64, help="images of each rung for Fréchet distances"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options, console = parse(arguments), Console()

    def work() -> None:
        if options.classifier is not None and options.data is None:
            raise ModelError("--classifier compares with the training pictures: name them with --data")
        with claim(options.bundle, BUNDLE) if options.write else nullcontext():
            measure_and_report(Bundle.open(options.bundle))

    def measure_and_report(bundle: Bundle) -> None:
        torch.set_num_threads(options.threads)
        loaded = load_bundle(bundle)
        # The graph is what is served, and computes faster.
        model = with_backbone(loaded, graph_backbone(loaded.network, bundle.file(BACKBONE)))
        measured, frechet = measure_ladder(model, options, console)
        console.print(ladder_table(measured, frechet))
        name = f"ladder-{bundle.manifest.name}"
        draw_ladder(measured.measured, measured.ladder, report.result_path(f"{name}.png"))
        record = {
            "bundle": f"{bundle.manifest.name} {bundle.manifest.version}",
            **measured.record,
            "order": measured.order,
            "ladder": [rung.name for rung in measured.ladder],
            "frechet": frechet,
            "measured": [rung.model_dump(mode="json") for rung in measured.measured],
        }
        report.write_json(report.result_path(f"{name}.json"), record)
        if options.write:
            write_manifest(bundle.path, measured.added_to(bundle.manifest))

    return report.run_command("ladder", work)


if __name__ == "__main__":
    sys.exit(main())

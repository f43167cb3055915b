"""Measure a bundle's quality ladder: what fewer steps or another solver cost and save.

    python -m bench.ladder BUNDLE [--write] [--data data/emoji64.npz] [--samples 32] [--threads 1]

Every candidate makes the same images (same noise, same labels) as DDIM in 250 steps. Its cost are the forward
rows of one image. Its distance to the long run is the RMS of the differences; with --data, the training
pictures, its distance to real pictures is their energy score. The candidates that no other beats in cost and
in both distances are the ladder. It is printed, saved and drawn to bench/results/ladder-<name>.{json,png}
and, with --write, put into the manifest; the bundle's defaults stay. With --classifier, the rungs also get
the Fréchet distance of --pictures images to the training pictures. The quick measurement is a part of
`python -m export.onnx`.

    python -m bench.ladder BUNDLE [--write] [--prompts prompts.txt] [--device cuda]

An imported pipeline draws each prompt twice, with its own guidance: in 100 steps, and by its own solver,
DPM-Solver++ and UniPC in fewer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ditserve.bench import report
from ditserve.bench.ladder.prompts import prompt_inputs, read_prompts
from ditserve.bench.ladder.training_pictures import TrainingPictures
from ditserve.bench.plots import draw_ladder
from ditserve.export.calibrate import with_backbone
from ditserve.export.parity import graph_backbone
from ditserve.model.evaluation.ladder import (
    THOROUGH,
    LadderMeasurement,
    MeasuredLadder,
    draw_inputs,
    pipeline_plan,
)
from ditserve.model.evaluation.picture_sets import open_data
from ditserve.model.spec.bundle import BACKBONE, Bundle, write_manifest
from ditserve.model.spec.command_line import named_path, positive, thread_count
from ditserve.model.spec.errors import ModelError
from ditserve.model.spec.output_folder import BUNDLE, claim
from ditserve.model.spec.pipeline_config import PipelineConfig
from ditserve.model.train.imported_pipeline import open_pipeline
from ditserve.model.train.loaded_model import LoadedModel, load_bundle

COLUMNS = ("", "rung", "grid", "rows", "to its long run", "to real pictures", "Fréchet")

Opened = tuple[LoadedModel, LadderMeasurement, TrainingPictures | None]


def _served(bundle: Bundle) -> LoadedModel:
    """Return a network as its graph computes it, which is faster; one just imported has none."""
    loaded = load_bundle(bundle)
    if BACKBONE not in bundle.manifest.files:
        return loaded
    return with_backbone(loaded, graph_backbone(loaded.network, bundle.file(BACKBONE)))


def open_own(bundle: Bundle, options: argparse.Namespace) -> Opened:
    """Open a model of ours, as it is served."""
    for name in ("prompts", "device"):
        if getattr(options, name) is not None:
            raise ModelError(f"--{name} is for imported pipelines: leave it out")
    others = {name: _served(bundle.backbone(name)).network for name in bundle.manifest.backbones}
    model = replace(_served(bundle), backbones=others)
    dataset = None if options.data is None else open_data(model, options.data)
    training = None
    if dataset is not None and options.classifier is not None:
        training = TrainingPictures(model, dataset, options.classifier, pictures=options.pictures)
    inputs = draw_inputs(model, options.samples or THOROUGH.conditions, dataset)
    data = "" if options.data is None else options.data.name
    return model, LadderMeasurement(model.manifest, THOROUGH, inputs, settled=True, data=data), training


def open_prompted(bundle: Bundle, options: argparse.Namespace) -> Opened:
    """Open an imported pipeline, whose pictures are those of prompts."""
    for name in ("data", "samples"):
        if getattr(options, name) is not None:
            raise ModelError(f"--{name} is not for imported pipelines: name prompts with --prompts")
    prompts, device = read_prompts(options.prompts), options.device or "cpu"
    if device != "cpu" and not torch.cuda.is_available():
        raise ModelError(f"--device {device} is not there, torch sees no CUDA device: leave it out")
    inputs = prompt_inputs(bundle, prompts, device)
    measurement = LadderMeasurement(bundle.manifest, pipeline_plan(bundle.manifest), inputs, settled=True)
    return open_pipeline(bundle, device), measurement, None


def measure_ladder(opened: Opened, console: Console) -> tuple[MeasuredLadder, dict[str, float]]:
    """Measure all candidates, and the Fréchet distances of the ladder, with progress bars that count rows."""
    model, measurement, training = opened
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        first = progress.add_task("rows, candidates", total=measurement.rows)
        measured = measurement.run(model.network, lambda rows: progress.advance(first, rows), model.backbones)
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
        "--samples", type=positive, help=f"conditions, each drawn twice ({THOROUGH.conditions})"
    )
    parser.add_argument("--threads", type=thread_count, default=1)
    parser.add_argument(
        "--data", type=named_path, help="the pictures the model was trained on, to compare with"
    )
    parser.add_argument("--prompts", type=named_path, help="of an imported pipeline: a file with one a line")
    parser.add_argument("--device", help="of an imported pipeline: cpu, cuda, cuda:1 (cpu)")
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
        prompted = isinstance(bundle.manifest.config, PipelineConfig)
        opened = (open_prompted if prompted else open_own)(bundle, options)
        measured, frechet = measure_ladder(opened, console)
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

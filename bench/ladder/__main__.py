"""Measure a bundle's quality ladder: what fewer steps or another solver cost and save.

    python -m bench.ladder BUNDLE [--write] [--data data/emoji64.npz] [--samples 32] [--threads 1]

Every candidate makes the same images (same noise, same labels) as DDIM in 250 steps. Its cost are the forward
rows of one image. Its distance to the long run is the RMS of the differences; with --data, the training
pictures, its distance to real pictures is their energy score. The candidates that no other beats in cost and
in both distances are the ladder. It is printed, saved and drawn to bench/results/ladder-<name>.{json,png}
and, with --write, put into the manifest. Compared with real pictures, so are the sampling defaults: the
cheapest point that lies as near to them as any, unless the model was distilled to its steps. With
--classifier, the rungs and a few others also get the Fréchet distance of --pictures images to the training
pictures, and their grain. The further backbones of a bundle are candidates too, and a table tells what each
stretch costs and saves. The quick measurement is a part of `python -m export.onnx`.

    python -m bench.ladder BUNDLE [--write] [--prompts prompts.txt] [--device cuda]

An imported pipeline draws each prompt twice, with its own guidance: in 100 steps, and by its own solver,
DPM-Solver++ and UniPC in fewer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ditserve.bench import report
from ditserve.bench.ladder.prompts import PROMPTS, prompt_inputs
from ditserve.bench.ladder.tables import ladder_table, stretch_table
from ditserve.bench.ladder.training_pictures import PictureFigures, TrainingPictures
from ditserve.bench.plots import draw_ladder
from ditserve.export.calibrate import with_backbone
from ditserve.export.parity import graph_backbone
from ditserve.model.evaluation.ladder import LadderMeasurement, MeasuredLadder, draw_inputs
from ditserve.model.evaluation.ladder_plan import THOROUGH, is_distilled, pipeline_plan
from ditserve.model.evaluation.picture_sets import open_data
from ditserve.model.sampling.prompt import read_prompts
from ditserve.model.spec.bundle import BACKBONE, Bundle, write_manifest
from ditserve.model.spec.command_line import named_path, positive, thread_count
from ditserve.model.spec.errors import ModelError
from ditserve.model.spec.manifest import Manifest, RungSpec
from ditserve.model.spec.output_folder import BUNDLE, claim
from ditserve.model.spec.pipeline_config import PipelineConfig
from ditserve.model.train.imported_pipeline import open_pipeline
from ditserve.model.train.loaded_model import LoadedModel, load_bundle

USUAL_STEPS = (50, 20, 8)

Opened = tuple[LoadedModel, LadderMeasurement, TrainingPictures | None]


def _served(bundle: Bundle) -> LoadedModel:
    """Return a network as its graph computes it, which is faster.

    One just imported has none, and one with a block cache is computed in parts.
    """
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
        training = TrainingPictures(bundle, model, dataset, options.classifier, pictures=options.pictures)
    inputs = draw_inputs(model, options.samples or THOROUGH.conditions, dataset)
    data = "" if options.data is None else options.data.name
    # A distilled model draws in the steps that it was distilled to.
    settled = is_distilled(model.manifest)
    return model, LadderMeasurement(model.manifest, THOROUGH, inputs, settled=settled, data=data), training


def open_prompted(bundle: Bundle, options: argparse.Namespace) -> Opened:
    """Open an imported pipeline, whose pictures are those of prompts."""
    for name in ("data", "samples"):
        if getattr(options, name) is not None:
            raise ModelError(f"--{name} is not for imported pipelines: name prompts with --prompts")
    prompts = PROMPTS if options.prompts is None else read_prompts(options.prompts)
    device = options.device or "cpu"
    if device != "cpu" and not torch.cuda.is_available():
        raise ModelError(f"--device {device} is not there, torch sees no CUDA device: leave it out")
    inputs = prompt_inputs(bundle, prompts, device)
    measurement = LadderMeasurement(bundle.manifest, pipeline_plan(bundle.manifest), inputs, settled=True)
    return open_pipeline(bundle, device), measurement, None


def measure_ladder(opened: Opened, console: Console) -> tuple[MeasuredLadder, dict[str, PictureFigures]]:
    """Measure all candidates, and the figures of pictures of the ladder, with progress bars of rows."""
    model, measurement, training = opened
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        first = progress.add_task("rows, candidates", total=measurement.rows)
        measured = measurement.run(model.network, lambda rows: progress.advance(first, rows), model.backbones)
        if training is None:
            return measured, {}
        rungs = rungs_to_compare(measured, model.manifest)
        total = int(sum(rung.rows for rung in rungs)) * len(training.inputs)
        second = progress.add_task("rows, Fréchet distance", total=total)
        return measured, training.figures(rungs, lambda rows: progress.advance(second, rows))


def rungs_to_compare(measured: MeasuredLadder, manifest: Manifest) -> tuple[RungSpec, ...]:
    """Return the ladder, and what its rungs are judged by: the own network in usual counts of steps."""
    others = [
        rung
        for rung in measured.measured
        if not rung.stretches
        and rung.steps in USUAL_STEPS
        and (rung.solver, rung.grid) in {("ddim", manifest.defaults.grid), _solver_and_grid(manifest)}
    ]
    return tuple({rung.name: rung for rung in (*others, *measured.ladder)}.values())


def _solver_and_grid(manifest: Manifest) -> tuple[str, str]:
    return manifest.defaults.solver, manifest.defaults.grid


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("ladder", __doc__)
    parser.add_argument("bundle", type=named_path)
    parser.add_argument(
        "--write", action="store_true", help="put the ladder and the defaults into the manifest"
    )
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
        "--pictures", type=positive, default=64, help="images of each rung for Fréchet distances and grain"
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
        measured, figures = measure_ladder(opened, console)
        console.print(ladder_table(measured, figures))
        if bundle.manifest.backbones:
            console.print(stretch_table(measured))
        defaults = measured.defaults
        console.print(
            f"defaults that follow: {defaults.solver}, {defaults.steps} steps, {defaults.grid}, "
            f"guidance in {defaults.guidance_interval}; the bundle has {bundle.manifest.defaults.steps} steps"
        )
        name = f"ladder-{bundle.manifest.name}"
        draw_ladder(measured.measured, measured.ladder, report.result_path(f"{name}.png"))
        record = {
            "bundle": f"{bundle.manifest.name} {bundle.manifest.version}",
            **measured.record,
            "order": measured.order,
            "ladder": [rung.name for rung in measured.ladder],
            "defaults": defaults.model_dump(mode="json"),
            "frechet": {name: seen.frechet for name, seen in figures.items()},
            "grain": {name: seen.grain for name, seen in figures.items()},
            "measured": [rung.model_dump(mode="json") for rung in measured.measured],
        }
        report.write_json(report.result_path(f"{name}.json"), record)
        if options.write:
            manifest = measured.added_to(bundle.manifest).model_copy(update={"defaults": defaults})
            write_manifest(bundle.path, manifest)

    return report.run_command("ladder", work)


if __name__ == "__main__":
    sys.exit(main())

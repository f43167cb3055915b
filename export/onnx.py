"""`python -m export.onnx SOURCE --out BUNDLE`: make a complete, verified bundle of a run or another bundle.

The bundle is assembled beside the target, and takes its place only if every graph agrees with torch.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import ValidationError

from ditserve.commands import command_line
from ditserve.export.calibrate import (
    DEFAULT_TRAJECTORIES,
    CalibrationRows,
    TrajectorySettings,
    calibration_rows,
)
from ditserve.export.decoder import check_decoder, copy_golden, decoder_of, write_decoder
from ditserve.export.errors import ExportError
from ditserve.export.golden import write_golden
from ditserve.export.graph_files import export_record, write_graphs
from ditserve.export.half import half_file, save_half, verify_half
from ditserve.export.ladder import MEASURE_IF_MISSING, LadderOptions, PlanName, measured_manifest, plan_ladder
from ditserve.export.parity import compare_outputs, expected_outputs, forward, verify_graphs
from ditserve.export.plan import ExportPlan, forward_rows, peak_bytes
from ditserve.export.source import (
    ModelCard,
    free_weights,
    open_source,
    parameters,
    restore_weights,
    round_weights,
    training_pictures,
)
from ditserve.export.storage import save_weights
from ditserve.export.verify import PARITY, Band, ParityLimits, check, report, worst
from ditserve.model.evaluation.ladder import seconds_per_row
from ditserve.model.nets.autoencoder import autoencoder_folder, autoencoder_kind
from ditserve.model.spec.bundle import BACKBONE, CALIBRATION, MANIFEST, WEIGHTS, write_manifest
from ditserve.model.spec.command_line import guarded, named_path, positive, thread_count
from ditserve.model.spec.errors import wrong_field
from ditserve.model.spec.heap import release_memory
from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.output_folder import BUNDLE, replacement
from ditserve.model.train.imported_pipeline import imported_pipeline
from ditserve.model.train.loaded_model import LoadedModel

PIPELINES = "ditserve.export.pipeline"  # loads diffusers and transformers
PIPELINE_TRAJECTORIES = TrajectorySettings(samples=2, steps=5)
# The error that storing weights in half precision may cause.
ROUNDING = ParityLimits(relative_l2=3e-3, cosine=0.99999)
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """The options of an export.

    Args:
        weights: precision on disk: "fp16", "fp32", or "auto" (fp16 if the output stays within `ROUNDING`).
        half: precision of the extra backbone: "fp16", "bf16", "none", or "auto" (see `export.half`).
        trajectories: the rows to verify and calibrate on.
        vae: folder of the autoencoder of a model on latents.
        decoder: in place of `vae`, a graph of the decoder from another export.
        golden: draw the golden image.
        ladder: the measurement of the ladder.
    """

    weights: str = "auto"
    half: str = "auto"
    trajectories: TrajectorySettings = DEFAULT_TRAJECTORIES
    vae: Path | None = None
    decoder: Path | None = None
    golden: bool = True
    ladder: LadderOptions = MEASURE_IF_MISSING


def export_bundle(source: LoadedModel, out: Path, options: ExportOptions = ExportOptions()) -> dict[str, Any]:
    """Write `source` as a bundle into `out`; return the parity report, which is also written there.

    `source` cannot be used afterwards: its weights are rounded in place, and freed before graphs are opened.

    Raises:
        ExportError: a graph is beyond its limit, or there is no decoder; `out` is then unchanged.
        OutputError: `out` must not be written.
        AutoencoderError: the autoencoder cannot be opened.
    """
    with replacement(out, BUNDLE) as scratch:
        return _assemble(source, scratch, options)


def _assemble(source: LoadedModel, folder: Path, options: ExportOptions) -> dict[str, Any]:
    """Write the bundle of one network into `folder`, which is empty; return the parity report."""
    source = replace(source, manifest=source.manifest.with_backbones({}))
    check_decoder(source.manifest, vae=options.vae, graph=options.decoder)
    plan = _plan(source, options)
    print(plan, file=sys.stderr)
    rows = calibration_rows(source, options.trajectories)
    rows.save(folder / CALIBRATION)
    rows = rows.with_null(source.network.config)
    stored_as, rounding = _store_weights(source, rows, folder / WEIGHTS, options.weights)
    write_graphs(source.network, source.manifest, folder)
    graphs = write_decoder(source.manifest, folder, vae=options.vae, graph=options.decoder)
    expected = expected_outputs(source.network, rows)
    manifest = _draw(source, folder, plan, options)
    half = None
    if options.half != "none":
        half = save_half(source.network, folder, rows, expected, options.half)
    # Graphs are opened when the weights in torch are freed.
    free_weights(source.network)
    release_memory()
    graphs = verify_graphs(manifest, folder, rows, expected) | graphs
    if half is not None:
        graphs[half_file(half.precision)] = verify_half(half, manifest, folder, rows, expected)
    summary = {
        "rows": len(rows),
        "rows_sha256": rows.digest(),
        "weights": {"stored": stored_as, "error": report(rounding)},
        "graphs": {name: report(bands) for name, bands in graphs.items()},
    }
    (folder / PARITY).write_text(json.dumps(summary, indent=1) + "\n")
    write_manifest(folder, _manifest(manifest, stored_as, rounding, graphs))
    return summary


def _draw(model: LoadedModel, folder: Path, plan: ExportPlan, options: ExportOptions) -> Manifest:
    """Measure the ladder and draw the golden image, as planned; return the manifest with both."""
    manifest = model.manifest
    if plan.ladder is not None:
        manifest = measured_manifest(plan.ladder, model.network, manifest)
    golden = None
    if options.golden:
        golden = write_golden(LoadedModel(model.network, manifest), folder, options.vae)
        golden = golden or copy_golden(manifest, folder, options.decoder)
    return manifest.model_copy(update={"golden": golden})


def _plan(model: LoadedModel, options: ExportOptions) -> ExportPlan:
    half = options.half != "none"
    rows, speed = forward_rows(model, options.trajectories, half=half), seconds_per_row(model)
    ladder = plan_ladder(model, options.ladder, seconds_per_row=speed, other_rows=rows)
    return ExportPlan(rows, speed, peak_bytes(model, options.trajectories), ladder)


def _store_weights(
    model: LoadedModel, rows: CalibrationRows, file: Path, wanted: str
) -> tuple[str, tuple[Band, ...]]:
    """Write the weights to `file`, and round those of `model` to what is stored.

    Return the precision, and the errors that it causes. They are rounded in place: a second copy would double
    the memory. The file holds the exact ones until the rounded ones have proved good enough.
    """
    network, exact = model.network, forward(model.network, rows)
    save_weights(file, parameters(network), DTYPES["fp32"])
    if wanted == "fp32":
        return wanted, compare_outputs(model.manifest, rows, exact, exact)
    round_weights(network, DTYPES["fp16"])
    bands = compare_outputs(model.manifest, rows, exact, forward(network, rows))
    try:
        check("the model with fp16 weights", bands, ROUNDING)
    except ExportError:
        if wanted == "fp16":
            raise
        restore_weights(network, file)
        return "fp32", compare_outputs(model.manifest, rows, exact, exact)
    save_weights(file, parameters(network), DTYPES["fp16"])
    return "fp16", bands


def _manifest(
    manifest: Manifest, stored_as: str, rounding: tuple[Band, ...], graphs: Mapping[str, tuple[Band, ...]]
) -> Manifest:
    record = {**export_record(manifest.config), "weights": stored_as}
    provenance = {**manifest.provenance, "export": record}
    kept = {name: value for name, value in manifest.metrics.items() if not name.startswith("int8")}
    metrics = {
        "weights_relative_l2": float(f"{worst(rounding).relative_l2:.4g}"),
        "onnx_relative_l2": float(f"{worst(graphs[BACKBONE]).relative_l2:.4g}"),
    }
    return manifest.model_copy(update={"provenance": provenance, "metrics": {**kept, **metrics}, "files": {}})


def main(arguments: list[str]) -> int:
    """Run the command line; return 0 if done, 2 if refused with one sentence on stderr."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    return guarded("export.onnx", lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    started = time.monotonic()
    pipeline = imported_pipeline(options.source)
    if pipeline is not None:
        import_module(PIPELINES).refuse_options(vars(options))
    card, pictures = _card_fields(options), training_pictures(options.source)
    inputs = [path for path in (options.data or pictures, options.vae) if path]
    # A bundle may be exported again in its own place.
    if not ((options.source / MANIFEST).is_file() and options.out.resolve() == options.source.resolve()):
        inputs.append(options.source)
    with replacement(options.out, BUNDLE, apart=tuple(inputs)) as scratch:
        if pipeline is not None:
            if "default_classes" in card:
                raise ExportError(f"default_classes: {options.source} has no classes")
            settings = _trajectories(options, PIPELINE_TRAJECTORIES)
            summary = import_module(PIPELINES).export_pipeline(pipeline, scratch, card, settings)
        else:
            # No name here holds the model, so that its weights are freed when they are rounded.
            export = _export_options(options, card, pictures)
            summary = _assemble(_open_with_card(options, card), scratch, export)
    size = sum(file.stat().st_size for file in options.out.rglob("*") if file.is_file())
    bands = summary["graphs"][BACKBONE]
    print(
        f"{options.out}: {size / 1e6:.1f} MB, weights {summary['weights']['stored']}, "
        f"backbone within {max(band['relative_l2'] for band in bands):.1e} of torch "
        f"(relative L2, worst of {len(bands)} noise bands), {time.monotonic() - started:.0f} s"
    )


def _export_options(
    options: argparse.Namespace, card: Mapping[str, Any], pictures: Path | None
) -> ExportOptions:
    """Return the options of an export; `pictures` are those of a training run."""
    return ExportOptions(
        weights=options.weights,
        half=options.half,
        trajectories=_trajectories(options, DEFAULT_TRAJECTORIES),
        vae=autoencoder_folder(options.source, options.vae),
        decoder=decoder_of(options.source),
        golden=options.golden == "auto",
        # Defaults that a card or a bundle states stay.
        ladder=LadderOptions(
            options.ladder, options.data or pictures, settled=pictures is None or "defaults" in card
        ),
    )


def _trajectories(options: argparse.Namespace, default: TrajectorySettings) -> TrajectorySettings:
    return TrajectorySettings(options.samples or default.samples, options.steps or default.steps)


def _open_with_card(options: argparse.Namespace, card: Mapping[str, Any]) -> LoadedModel:
    """Open the source, with the fields of `card` in its manifest, and tell what its import has assumed.

    Raises:
        ExportError: it cannot be opened, or the card has a class that it does not know.
    """
    model = open_source(options.source, data=options.data)
    for note in model.manifest.provenance.get("import", {}).get("notes", ()):
        print(f"{options.source}: {note}", file=sys.stderr)
    fields = {**model.manifest.model_dump(), **card}
    defaults = dict(fields.pop("default_classes", {}))
    for factor in fields["factors"]:
        factor["default"] = defaults.pop(factor["name"], factor["default"])
    if defaults:
        raise ExportError(f"default_classes: the model has no factor {next(iter(defaults))!r}")
    try:
        return LoadedModel(model.network, Manifest.model_validate(fields))
    except ValidationError as error:
        raise ExportError(": ".join(filter(None, wrong_field(error)))) from None


def _card_fields(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of `--card`, and over them those given as flags.

    Raises:
        ExportError: the card or a field is not valid.
    """
    flags = ("name", "version", "description", "licence", "attribution")
    fields: dict[str, Any] = {} if options.vae is None else {"decoder": autoencoder_kind(options.vae)}
    try:
        if options.card:
            fields |= ModelCard.model_validate_json(options.card.read_bytes()).given()
        return fields | ModelCard(**{flag: getattr(options, flag) for flag in flags}).given()
    except ValidationError as error:
        field, message = wrong_field(error)
        raise ExportError(f"{field or options.card}: {message}") from None


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_line("export.onnx"), description="Write a bundle from a training run or a bundle."
    )
    parser.add_argument(
        "source", type=named_path, help="training run, a bundle, or a folder of a diffusers pipeline"
    )
    parser.add_argument("--out", type=named_path, required=True, help="bundle folder to write")
    parser.add_argument(
        "--card",
        type=named_path,
        help="JSON file with name, version, description, licence, attribution, defaults",
    )
    for field in ("name", "version", "description", "licence"):
        parser.add_argument(f"--{field}")
    parser.add_argument("--attribution", action="append", help="one credit line; repeat for more")
    parser.add_argument(
        "--data", type=named_path, help="the training pictures, of a bundle or if not where the run says"
    )
    parser.add_argument(
        "--ladder",
        choices=get_args(PlanName),
        default="auto",
        help="measurement of the quality ladder; auto: quick if the model has none",
    )
    parser.add_argument("--vae", type=named_path, help="folder of the autoencoder, for models on latents")
    parser.add_argument("--weights", choices=("auto", *DTYPES), default="auto", help="precision on disk")
    parser.add_argument(
        "--half",
        choices=("auto", "fp16", "bf16", "none"),
        default="auto",
        help="half-precision backbone, for GPUs",
    )
    parser.add_argument(
        "--samples", type=positive, help="trajectories to verify and calibrate on: 6, and 2 of a pipeline"
    )
    parser.add_argument("--steps", type=positive, help="steps of each trajectory: 20, and 5 of a pipeline")
    parser.add_argument(
        "--golden",
        choices=("auto", "none"),
        default="auto",
        help="an image for the service to compare its own with; auto: in fewer steps if they are costly",
    )
    parser.add_argument("--threads", type=thread_count, default=1)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python -m export.int8 BUNDLE`: smooth a bundle, quantise its backbone, keep it if good and fast enough.

Smoothing rewrites the bundle's weights without changing its function, so all its graphs are written again.
The INT8 backbone then shares their conditioner. Its errors are measured by band of noise on rows that
calibration has not used, and on finished pictures; with `--data` also by the Fréchet distance to the pictures
the model was trained on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnxruntime as ort
import torch

from ditserve.commands import command_line
from ditserve.export.calibrate import (
    DEFAULT_TRAJECTORIES,
    CalibrationRows,
    TrajectorySettings,
    calibration_rows,
)
from ditserve.export.decoder import decoder_of
from ditserve.export.errors import ExportError
from ditserve.export.half import DTYPES, half_file
from ditserve.export.onnx import ExportOptions, export_bundle
from ditserve.export.parity import compare_rows, graph_backbone
from ditserve.export.quality import (
    FrechetSettings,
    add_frechet_options,
    frechet_report,
    frechet_settings,
    open_references,
    picture_psnr,
    quality_metrics,
    tell_quality,
)
from ditserve.export.quantize import FILES, Target, backbone_inputs, local_processor, write_int8
from ditserve.export.smooth import input_peaks, search_alpha, smooth
from ditserve.export.source import open_source
from ditserve.export.verify import LIMITS, PARITY, check, open_session, report
from ditserve.model.spec.bundle import BACKBONE, CALIBRATION, write_atomic, write_manifest
from ditserve.model.spec.command_line import guarded, named_path, thread_count
from ditserve.model.spec.output_folder import revision
from ditserve.model.train.loaded_model import LoadedModel

# The provenance entry of a bundle with smoothed weights.
SMOOTHING = "smoothing"
# The seed of the rows that errors are measured on.
HELD_OUT_SEED = 2_000
# Session options under which ONNX Runtime computes Q/DQ nodes as written, like TensorRT, without 8-bit
# kernels.
EXACT = {"session.disable_quant_qdq": "1"}
TIMED = 15  # runs a time is the median of
# INT8 is not worth its error if it is less than this many times as fast as fp32.
FASTER = 1.1


@dataclass(frozen=True, slots=True)
class QuantizationSettings:
    """The settings of a quantisation.

    Args:
        weights: precision of the weights on disk if the bundle is written again, as `ExportOptions.weights`.
        range: "reduced" (7-bit weights), "full" (8-bit), or "auto" by this machine's CPU.
        keep: keep a graph that is not faster than fp32.
        frechet: settings to measure Fréchet distances with, or None to measure none.
        trajectories: the rows to calibrate on, and with another seed those to measure errors on.
    """

    weights: str = "auto"
    range: str = "auto"
    keep: bool = False
    frechet: FrechetSettings | None = None
    trajectories: TrajectorySettings = DEFAULT_TRAJECTORIES


def add_int8(
    path: Path, target: Target, settings: QuantizationSettings = QuantizationSettings()
) -> dict[str, Any]:
    """Add an INT8 backbone for `target` to the bundle at `path`; return the report.

    A bundle that is not smoothed yet is smoothed first. After an error, the bundle is as before.

    Raises:
        ExportError: the graph is beyond the INT8 limit in some band, or (for "cpu") not faster than fp32.
        LoadError: the model is not a DiT.
        OutputError: the bundle must not be written.
    """
    with revision(path) as scratch:
        source = open_source(path)
        # Refused now, rather than after the work: no DiT, no rows, or nothing to compare pictures with.
        _ = source.dit, CalibrationRows.load(path / CALIBRATION)
        if settings.frechet:
            open_references(source, settings.frechet)
        return _quantize(source, scratch, target, settings)


def _quantize(
    source: LoadedModel, path: Path, target: Target, settings: QuantizationSettings
) -> dict[str, Any]:
    """Smooth and quantise the copy of the bundle of `source` at `path`, which is dropped after an error."""
    held_out = _held_out_rows(source, settings)
    if SMOOTHING not in source.manifest.provenance:
        _smooth_bundle(source, path, settings, held_out)
        source = open_source(path)
    fit = CalibrationRows.load(path / CALIBRATION).with_null(source.dit.config)
    reduced = _reduced_range(target, settings)
    file = write_int8(source.dit, path, fit, target, reduce_range=reduced)
    backbone = graph_backbone(source.dit, file, EXACT if target == "tensorrt" else None)
    bands = compare_rows(source, held_out, backbone)
    check(file.name, bands, LIMITS["int8"])
    speedup = {} if target == "tensorrt" else _speedup(source, path, held_out)
    if speedup and speedup["batch_1"] < FASTER and not settings.keep:
        raise ExportError(
            f"INT8 is {speedup['batch_1']:.2f} times as fast as fp32 here, {FASTER} is asked for: "
            "--keep keeps it; the bundle is unchanged"
        )
    summary = {
        "file": file.name,
        "calibration": {"rows": len(fit), "sha256": fit.digest()},
        SMOOTHING: source.manifest.provenance[SMOOTHING],
        "weight_bits": 7 if reduced else 8,
        "error": report(bands),
        "pictures_psnr_db": round(picture_psnr(source, backbone), 2),
        "quality": frechet_report(source, backbone, settings.frechet) if settings.frechet else {},
        "speedup": speedup,
    }
    _record(path, source, summary, target)
    return summary


def _held_out_rows(source: LoadedModel, settings: QuantizationSettings) -> CalibrationRows:
    trajectories = replace(settings.trajectories, seed=HELD_OUT_SEED)
    return calibration_rows(source, trajectories).with_null(source.dit.config)


def _reduced_range(target: Target, settings: QuantizationSettings) -> bool:
    """Return True if weights get 7 bits. For TensorRT they always get 8: its sums do not saturate."""
    if target != "cpu" or settings.range == "full":
        return False
    return settings.range == "reduced" or not local_processor().vnni


def _smooth_bundle(
    source: LoadedModel, path: Path, settings: QuantizationSettings, held_out: CalibrationRows
) -> None:
    """Write the bundle again with smoothed weights, and record the search for α in its provenance.

    If no α helps, the weights stay as they are.
    """
    fit = CalibrationRows.load(path / CALIBRATION).with_null(source.dit.config)
    alpha, errors = search_alpha(source.dit, fit, held_out)
    record = {"alpha": alpha, "searched": {str(a): float(f"{error:.4g}") for a, error in errors.items()}}
    manifest = source.manifest
    smoothed = LoadedModel(
        smooth(source.dit, input_peaks(source.dit, fit), alpha),
        manifest.model_copy(update={"provenance": {**manifest.provenance, SMOOTHING: record}}),
    )
    half = next((name for name in DTYPES if half_file(name) in manifest.files), "none")
    options = ExportOptions(settings.weights, half, settings.trajectories, decoder=decoder_of(path))
    export_bundle(smoothed, path, options)


def _speedup(source: LoadedModel, path: Path, rows: CalibrationRows) -> dict[str, float]:
    """Return the time of fp32 over that of INT8 by batch size: medians of interleaved runs on one thread."""
    sessions = [open_session(path / name) for name in (BACKBONE, FILES["cpu"])]
    result = {}
    for batch in (1, 4):
        inputs = next(backbone_inputs(source.dit, rows, batch))
        runs = [[_seconds(session, inputs) for session in sessions] for _ in range(TIMED + 2)][2:]
        exact, int8 = (statistics.median(run[k] for run in runs) for k in (0, 1))
        result[f"batch_{batch}"] = round(exact / int8, 3)
    return result


def _seconds(session: ort.InferenceSession, inputs: dict[str, npt.NDArray[Any]]) -> float:
    started = time.perf_counter()
    session.run(None, inputs)
    return time.perf_counter() - started


def _record(path: Path, source: LoadedModel, summary: dict[str, Any], target: Target) -> None:
    """Write the summary into the parity report, and its main numbers into the manifest.

    They take the place of those of the earlier graph for `target`.
    """
    parity = json.loads((path / PARITY).read_text())
    parity["int8"] = {**parity.get("int8", {}), target: summary}
    write_atomic(path / PARITY, (json.dumps(parity, indent=1) + "\n").encode())
    name = "int8" if target == "cpu" else "int8_tensorrt"
    metrics = {
        **quality_metrics(name, summary),
        f"{name}_weight_bits": summary["weight_bits"],
        **{f"{name}_speedup_{key}": value for key, value in summary["speedup"].items()},
    }
    others = {key: value for key, value in source.manifest.metrics.items() if _target_of(key) != target}
    write_manifest(path, source.manifest.model_copy(update={"metrics": {**others, **metrics}}))


def _target_of(metric: str) -> Target | None:
    """Return the target of the INT8 graph that a metric of the manifest is about, or None."""
    if metric.startswith("int8_tensorrt_"):
        return "tensorrt"
    return "cpu" if metric.startswith("int8_") else None


def main(arguments: list[str]) -> int:
    """Run the command line; return 0 if done, 2 if refused with one sentence on stderr."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    return guarded("export.int8", lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    settings = QuantizationSettings(options.weights, options.range, options.keep, frechet_settings(options))
    summary = add_int8(options.bundle, options.target, settings)
    results = [
        *tell_quality(summary),
        f"smoothing {summary[SMOOTHING]['alpha']}",
        *(f"{value}x fp32 at batch {key[6:]}" for key, value in summary["speedup"].items()),
    ]
    print(f"{options.bundle / summary['file']}: {', '.join(results)}")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_line("export.int8"), description="Add a verified INT8 backbone to a bundle."
    )
    parser.add_argument("bundle", type=named_path)
    parser.add_argument("--target", choices=tuple(FILES), default="cpu")
    parser.add_argument(
        "--weights", choices=("auto", "fp16", "fp32"), default="auto", help="precision of the weights on disk"
    )
    parser.add_argument(
        "--range",
        choices=("auto", "reduced", "full"),
        default="auto",
        help="7- or 8-bit weights; auto: by this CPU",
    )
    parser.add_argument("--keep", action="store_true", help="keep the graph though it is not faster")
    add_frechet_options(parser)
    parser.add_argument("--threads", type=thread_count, default=1)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python -m export.int8 BUNDLE`: smooth a bundle, quantise its backbone, and keep the result only if it is good and fast enough.

Smoothing rewrites the bundle's weights without changing its function, so all its graphs are written again; the INT8 backbone
then shares their conditioner. Errors are measured per noise band on rows that calibration has not seen, on finished pictures, and
with `--data` on the Fréchet distance to the pictures the model was trained on.
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

from ditserve.export.calibrate import WALK, Rows, Walk, trajectories
from ditserve.export.command import guarded
from ditserve.export.errors import ExportError
from ditserve.export.half import DTYPES, filename
from ditserve.export.onnx import PARITY, Options, decoder_of, export_bundle
from ditserve.export.parity import compare_rows, graph_backbone
from ditserve.export.quality import Judge, frechet_report, picture_psnr
from ditserve.export.quantize import FILES, Target, backbone_inputs, this_processor, write_int8
from ditserve.export.session import open_session
from ditserve.export.smooth import amax, search, smoothed
from ditserve.export.source import open_source
from ditserve.export.storage import remove_graph
from ditserve.export.verify import CALIBRATION, LIMITS, check, report
from ditserve.model.evaluation.classifier_network import CLASSIFIER
from ditserve.model.spec.bundle import BACKBONE, write_atomic, write_manifest
from ditserve.model.train.loaded_model import LoadedModel

SMOOTHING = "smoothing"  # the provenance entry of a bundle whose weights are smoothed
UNSEEN = 2_000  # seed of the rows to judge by
EXACT = {"session.disable_quant_qdq": "1"}  # compute what Q/DQ says, as TensorRT does, not with 8-bit kernels
TIMED = 15  # runs a time is the median of
FASTER = 1.1  # times fp32, below which INT8 is not worth its error


@dataclass(frozen=True, slots=True)
class Settings:
    """`keep` keeps a graph that is not faster; `judge` measures Fréchet distances; `walk`: the trajectories to calibrate on, and
    with another seed to judge by."""

    weights: str = "auto"
    range: str = "auto"
    keep: bool = False
    judge: Judge | None = None
    walk: Walk = WALK


def add_int8(path: Path, target: Target, settings: Settings = Settings()) -> dict[str, Any]:
    """Smooth the bundle at `path` in place, unless it is, and add the INT8 backbone for `target`; returns the report.

    Raises:
        ExportError: beyond the INT8 limit in some band, or (for "cpu") not faster; the bundle then has no INT8 graph.
        LoadError: the model is not a DiT.
    """
    source = open_source(path)
    judge = trajectories(source, replace(settings.walk, seed=UNSEEN)).with_null(source.dit.config)
    if SMOOTHING not in source.manifest.provenance:
        _smooth(source, path, settings, judge)
        source = open_source(path)
    fit = Rows.load(path / CALIBRATION).with_null(source.dit.config)
    reduced = (
        target == "cpu"
        and settings.range != "full"
        and not (settings.range == "auto" and this_processor().vnni)
    )
    file = write_int8(source.dit, path, fit, target, reduce_range=reduced)
    served = graph_backbone(source.dit, file, EXACT if target == "tensorrt" else None)
    try:
        bands = compare_rows(source, judge, served)
        check(file.name, bands, LIMITS["int8"])
        speed = {} if target == "tensorrt" else _speed(source, path, judge)
        if speed and speed["batch_1"] < FASTER and not settings.keep:
            raise ExportError(
                f"INT8 is {speed['batch_1']:.2f} times as fast as fp32 here, {FASTER} is asked for: --keep keeps it"
            )
        quality = frechet_report(source, served, settings.judge) if settings.judge else {}
    except ExportError:
        remove_graph(file)
        _record_metrics(path, source, {}, target)
        raise
    summary = {
        "file": file.name,
        "calibration": {"rows": len(fit), "sha256": fit.digest()},
        SMOOTHING: source.manifest.provenance[SMOOTHING],
        "weight_bits": 7 if reduced else 8,
        "error": report(bands),
        "pictures_psnr_db": round(picture_psnr(source, served), 2),
        "quality": quality,
        "speedup": speed,
    }
    _record(path, source, summary, target)
    return summary


def _smooth(source: LoadedModel, path: Path, settings: Settings, judge: Rows) -> None:
    """Write the bundle again with smoothed weights, if some α helps; what was searched becomes part of its provenance."""
    fit = Rows.load(path / CALIBRATION).with_null(source.dit.config)
    alpha, errors = search(source.dit, fit, judge)
    record = {"alpha": alpha, "searched": {str(a): float(f"{error:.4g}") for a, error in errors.items()}}
    manifest = source.manifest
    smooth = LoadedModel(
        smoothed(source.dit, amax(source.dit, fit), alpha),
        manifest.model_copy(update={"provenance": {**manifest.provenance, SMOOTHING: record}}),
    )
    half = next((name for name in DTYPES if filename(name) in manifest.files), "none")
    options = Options(settings.weights, half, settings.walk, decoder=decoder_of(path))
    export_bundle(smooth, path, options)


def _speed(source: LoadedModel, path: Path, rows: Rows) -> dict[str, float]:
    """Time of fp32 over time of INT8, medians of interleaved single-threaded runs, by batch size."""
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
    """Put the summary into the parity report and its main numbers into the manifest."""
    parity = json.loads((path / PARITY).read_text())
    parity["int8"] = {**parity.get("int8", {}), target: summary}
    write_atomic(path / PARITY, (json.dumps(parity, indent=1) + "\n").encode())
    name = "int8" if target == "cpu" else "int8_tensorrt"
    metrics = {
        f"{name}_relative_l2": max(band["relative_l2"] for band in summary["error"]),
        f"{name}_pictures_psnr_db": summary["pictures_psnr_db"],
        **{f"{name}_{key}": value for key, value in summary["quality"].items() if key == "quality_loss"},
        f"{name}_weight_bits": summary["weight_bits"],
        **{f"{name}_speedup_{key}": value for key, value in summary["speedup"].items()},
    }
    _record_metrics(path, source, metrics, target)


def _record_metrics(path: Path, source: LoadedModel, metrics: dict[str, float], target: Target) -> None:
    """Write the manifest with `metrics` for those of `target`'s earlier graph."""
    others = {key: value for key, value in source.manifest.metrics.items() if _target(key) != target}
    write_manifest(path, source.manifest.model_copy(update={"metrics": {**others, **metrics}}))


def _target(metric: str) -> Target | None:
    """Whose INT8 graph a metric of the manifest is about."""
    if metric.startswith("int8_tensorrt_"):
        return "tensorrt"
    return "cpu" if metric.startswith("int8_") else None


def main(arguments: list[str]) -> int:
    """Command line; 0 done, 2 refused with one sentence on stderr."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    return guarded("export.int8", lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    judge = None
    if options.data:
        decoder = decoder_of(options.bundle)
        judge = Judge(options.data, options.classifier, options.pictures, decoder=decoder)
    settings = Settings(options.weights, options.range, options.keep, judge)
    summary = add_int8(options.bundle, options.target, settings)
    error_of = max(band["relative_l2"] for band in summary["error"])
    told = [
        f"relative L2 at most {error_of:.1e}",
        f"pictures {summary['pictures_psnr_db']} dB",
        f"smoothing {summary[SMOOTHING]['alpha']}",
        *(f"{value}x fp32 at batch {key[6:]}" for key, value in summary["speedup"].items()),
    ]
    if summary["quality"]:
        told.append("Fréchet distance {frechet} (fp32 {frechet_fp32})".format(**summary["quality"]))
    print(f"{options.bundle / summary['file']}: {', '.join(told)}")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m export.int8", description="Add a verified INT8 backbone to a bundle."
    )
    parser.add_argument("bundle", type=Path)
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
    parser.add_argument("--data", type=Path, help="the training pictures, to measure Fréchet distances with")
    parser.add_argument("--pictures", type=int, default=300, help="pictures to measure them on")
    parser.add_argument(
        "--classifier", type=Path, default=CLASSIFIER, help="folder of python -m model.evaluation.classifier"
    )
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

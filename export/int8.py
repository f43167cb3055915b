"""`python -m export.int8 BUNDLE`: smooth a bundle, quantise its backbone, and keep the result only if it is good and fast enough.

Smoothing rewrites the bundle's weights without changing its function, so all its graphs are written again; the INT8 backbone
then shares their conditioner. Errors are measured per noise band on rows that calibration has not seen, and on finished pictures.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from torch import Tensor

from export.calibrate import Rows, Walk, pictures, trajectories
from export.errors import ExportError
from export.half import DTYPES, filename
from export.onnx import PARITY, Options, export_bundle, forward
from export.quantize import FILES, Target, backbone_inputs, this_processor, write_int8
from export.session import open_session, run
from export.smooth import amax, search, smoothed
from export.source import open_source
from export.verify import LIMITS, Band, check, compare, report
from model.bundle import BACKBONE, BundleError, write_atomic, write_manifest
from model.opening import Opened

SMOOTHING = "smoothing"  # the provenance entry of a bundle whose weights are smoothed
SEEDS = (1_000, 2_000)  # of the rows to calibrate on, and of those to judge by
EXACT = {"session.disable_quant_qdq": "1"}  # compute what Q/DQ says, as TensorRT does, not with 8-bit kernels
TIMED = 15  # runs a time is the median of
FASTER = 1.1  # times fp32, below which INT8 is not worth its error


@dataclass(frozen=True, slots=True)
class Settings:
    """How much to calibrate on; `keep` keeps a graph that is not faster."""

    samples: int = 6
    steps: int = 20
    weights: str = "auto"
    range: str = "auto"
    keep: bool = False


def add_int8(path: Path, target: Target, settings: Settings = Settings()) -> dict[str, Any]:
    """Smooth the bundle at `path` in place, unless it is, and add the INT8 backbone for `target`; returns the report.

    Raises:
        ExportError: beyond the INT8 limit in some band, or (for "cpu") not faster; the bundle then has no INT8 graph.
    """
    source = open_source(path)
    if SMOOTHING not in source.manifest.provenance:
        _smooth(source, path, settings)
        source = open_source(path)
    fit, judge = (_rows(source, settings, seed) for seed in SEEDS)
    reduced = (
        target == "cpu"
        and settings.range != "full"
        and not (settings.range == "auto" and this_processor().vnni)
    )
    file = write_int8(source.dit, path, fit, target, reduce_range=reduced)
    try:
        bands = _verified(source, file, judge, target)
        speed = {} if target == "tensorrt" else _speed(source, path, judge)
        if speed and speed["batch_1"] < FASTER and not settings.keep:
            raise ExportError(
                f"INT8 is {speed['batch_1']:.2f} times as fast as fp32 here, {FASTER} is asked for: --keep keeps it"
            )
    except ExportError:
        file.unlink()
        write_manifest(path, source.manifest)
        raise
    summary = {
        "file": file.name,
        "calibration": {"rows": len(fit), "sha256": fit.digest()},
        SMOOTHING: source.manifest.provenance[SMOOTHING],
        "weight_bits": 7 if reduced else 8,
        "error": report(bands),
        "pictures_psnr_db": round(_picture_psnr(source, file, target), 2),
        "speedup": speed,
    }
    _record(path, source, summary, target)
    return summary


def _smooth(source: Opened, path: Path, settings: Settings) -> None:
    """Write the bundle again with the best smoothing, keeping the half precision it has a backbone in."""
    fit, judge = (_rows(source, settings, seed) for seed in SEEDS)
    alpha, errors = search(source.dit, fit, judge)
    facts = {"alpha": alpha, "simulated_relative_l2": {str(a): float(f"{e:.4g}") for a, e in errors.items()}}
    provenance = {**source.manifest.provenance, SMOOTHING: facts}
    half = next((kind for kind in DTYPES if filename(kind) in source.manifest.files), "none")
    dit = smoothed(source.dit, amax(source.dit, fit), alpha)
    smooth = Opened(dit, source.manifest.model_copy(update={"provenance": provenance}))
    export_bundle(smooth, path, Options(weights=settings.weights, half=half, samples=2))


def _rows(source: Opened, settings: Settings, seed: int) -> Rows:
    return trajectories(
        source.dit, source.manifest, source.schedule, Walk(settings.samples, settings.steps, seed)
    )


def _verified(source: Opened, file: Path, rows: Rows, target: Target) -> tuple[Band, ...]:
    """Errors as served: with 8-bit kernels on the CPU, exactly for TensorRT."""
    session = open_session(file, options=EXACT if target == "tensorrt" else {})
    dtype = np.float16 if target == "tensorrt" else np.float32
    output = np.concatenate(
        [run(session, inputs)["output"] for inputs in backbone_inputs(source.dit, rows, dtype)]
    )
    exact = forward(source.dit, rows).numpy()
    bands = compare(exact, output, rows.timestep.numpy(), source.manifest.diffusion.timesteps)
    check(file.name, bands, LIMITS["int8"])
    return bands


def _speed(source: Opened, path: Path, rows: Rows) -> dict[str, float]:
    """Time of fp32 over time of INT8, medians of interleaved single-threaded runs, by batch size."""
    sessions = [open_session(path / name) for name in (BACKBONE, FILES["cpu"])]
    result = {}
    for batch in (1, 4):
        inputs = next(backbone_inputs(source.dit, rows, np.float32, batch))
        runs = [[_seconds(session, inputs) for session in sessions] for _ in range(TIMED + 2)][2:]
        exact, int8 = (statistics.median(run[k] for run in runs) for k in (0, 1))
        result[f"batch_{batch}"] = round(exact / int8, 3)
    return result


def _seconds(session: ort.InferenceSession, inputs: dict[str, npt.NDArray[Any]]) -> float:
    started = time.perf_counter()
    session.run(None, inputs)
    return time.perf_counter() - started


def _picture_psnr(source: Opened, file: Path, target: Target) -> float:
    """PSNR in dB of pictures finished by the INT8 backbone against fp32, from the same noise, over all of them."""
    session = open_session(file, options=EXACT if target == "tensorrt" else {})
    dtype = np.float16 if target == "tensorrt" else np.float32
    names = ("x", *(name for name, _ in source.dit.config.state()))

    def backbone(x: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        inputs = {name: tensor.numpy().astype(dtype) for name, tensor in zip(names, (x, *state), strict=True)}
        return torch.from_numpy(run(session, inputs)["output"].astype(np.float32))

    walk = Walk(samples=4, steps=20, seed=3_000)
    common = (source.dit, source.manifest, source.schedule, walk)
    error = (pictures(*common, backbone) - pictures(*common, source.dit.backbone)).square().mean()
    return 10 * math.log10(4 / max(float(error), 1e-12))  # the range of pixels is 2


def _record(path: Path, source: Opened, summary: dict[str, Any], target: Target) -> None:
    """Put the summary into the parity report and its main numbers into the manifest."""
    parity = json.loads((path / PARITY).read_text())
    parity["int8"] = {**parity.get("int8", {}), target: summary}
    write_atomic(path / PARITY, (json.dumps(parity, indent=1) + "\n").encode())
    name = "int8" if target == "cpu" else "int8_tensorrt"
    metrics = {
        f"{name}_relative_l2": max(band["relative_l2"] for band in summary["error"]),
        f"{name}_pictures_psnr_db": summary["pictures_psnr_db"],
        **{f"{name}_speedup_{key}": value for key, value in summary["speedup"].items()},
    }
    write_manifest(
        path, source.manifest.model_copy(update={"metrics": {**source.manifest.metrics, **metrics}})
    )


def main(arguments: list[str]) -> int:
    """Command line; 0 done, 2 refused with one sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m export.int8", description="Add a verified INT8 backbone to a bundle."
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--target", choices=tuple(FILES), default="cpu")
    parser.add_argument("--samples", type=int, default=6, help="trajectories to calibrate on")
    parser.add_argument("--steps", type=int, default=20, help="steps of each trajectory")
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
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    settings = Settings(options.samples, options.steps, options.weights, options.range, options.keep)
    try:
        summary = add_int8(options.bundle, options.target, settings)
    except (ExportError, BundleError, OSError) as error:
        print(f"export.int8: {error}", file=sys.stderr)
        return 2
    error_of = max(band["relative_l2"] for band in summary["error"])
    speed = ", ".join(
        f"{value}x fp32 at batch {key.removeprefix('batch_')}" for key, value in summary["speedup"].items()
    )
    print(
        f"{options.bundle / summary['file']}: relative L2 at most {error_of:.1e}, pictures {summary['pictures_psnr_db']} dB, "
        f"smoothing {summary['smoothing']['alpha']}{', ' + speed if speed else ''}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

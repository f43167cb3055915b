"""`python -m export.fp8 BUNDLE`: measure what FP8 costs a bundle, and record it where a worker looks.

Nothing but the record is written: the torch backend rounds the weights itself when it starts. The error is
measured by band of noise on rows that calibration has not used, and on finished pictures; with `--data` also
by the Fréchet distance to the pictures the model was trained on, which lets a worker choose FP8 by itself.
The products run on this machine's CPU, whose FP8 gives the numbers of a GPU's but for the order of sums.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ditserve.commands import command_line
from ditserve.export.calibrate import DEFAULT_TRAJECTORIES, Backbone, calibration_rows
from ditserve.export.decoder import decoder_of
from ditserve.export.int8 import HELD_OUT_SEED
from ditserve.export.parity import compare_rows
from ditserve.export.quality import FrechetSettings, frechet_report, open_references, picture_psnr
from ditserve.export.source import open_source
from ditserve.export.verify import LIMITS, PARITY, check, report
from ditserve.model.evaluation.classifier_network import CLASSIFIER
from ditserve.model.nets.low_precision import lower_precision
from ditserve.model.spec.bundle import write_atomic, write_manifest
from ditserve.model.spec.command_line import guarded, named_path, positive, thread_count
from ditserve.model.spec.output_folder import revision


def record_fp8(path: Path, frechet: FrechetSettings | None = None) -> dict[str, Any]:
    """Measure FP8 on the bundle at `path`, record it there, and return the report.

    After an error, the bundle is as before.

    Raises:
        ExportError: the error is beyond the limit of FP8 in some band, or the data cannot be opened.
        LoadError: the model is not a DiT.
        OutputError: the bundle must not be written.
    """
    with revision(path) as scratch:
        source = open_source(path)
        backbone: Backbone = lower_precision(copy.deepcopy(source.dit), "fp8")
        if frechet:
            # Refused now, rather than after the work.
            open_references(source, frechet)
        trajectories = replace(DEFAULT_TRAJECTORIES, seed=HELD_OUT_SEED)
        rows = calibration_rows(source, trajectories).with_null(source.dit.config)
        bands = compare_rows(source, rows, backbone)
        check("fp8", bands, LIMITS["fp8"])
        quality = frechet_report(source, backbone, frechet) if frechet else {}
        errors = report(bands)
        summary = {
            "error": errors,
            "pictures_psnr_db": round(picture_psnr(source, backbone), 2),
            "quality": quality,
        }
        metrics = {
            "fp8_relative_l2": max(band["relative_l2"] for band in errors),
            "fp8_pictures_psnr_db": summary["pictures_psnr_db"],
            **{f"fp8_{key}": value for key, value in quality.items() if key == "quality_loss"},
        }
        parity = json.loads((scratch / PARITY).read_text())
        write_atomic(scratch / PARITY, (json.dumps({**parity, "fp8": summary}, indent=1) + "\n").encode())
        kept = {name: value for name, value in source.manifest.metrics.items() if name[:4] != "fp8_"}
        write_manifest(scratch, source.manifest.model_copy(update={"metrics": {**kept, **metrics}}))
        return summary


def main(arguments: list[str]) -> int:
    """Run the command line; return 0 if done, 2 if refused with one sentence on stderr."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    return guarded("export.fp8", lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    frechet = None
    if options.data:
        decoder = decoder_of(options.bundle)
        frechet = FrechetSettings(options.data, options.classifier, options.pictures, decoder=decoder)
    summary = record_fp8(options.bundle, frechet)
    error = max(band["relative_l2"] for band in summary["error"])
    results = [f"relative L2 at most {error:.1e}", f"pictures {summary['pictures_psnr_db']} dB"]
    if summary["quality"]:
        results.append("Fréchet distance {frechet} (fp32 {frechet_fp32})".format(**summary["quality"]))
    print(f"{options.bundle}: {', '.join(results)}")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_line("export.fp8"), description="Record what FP8 costs a bundle in quality."
    )
    parser.add_argument("bundle", type=named_path)
    parser.add_argument(
        "--data", type=named_path, help="the training pictures, to measure Fréchet distances with"
    )
    parser.add_argument("--pictures", type=positive, default=300, help="pictures to measure them on")
    parser.add_argument(
        "--classifier",
        type=named_path,
        default=CLASSIFIER,
        help=f"folder of {command_line('model.evaluation.classifier')}",
    )
    parser.add_argument("--threads", type=thread_count, default=1)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

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
from ditserve.export.int8 import HELD_OUT_SEED
from ditserve.export.parity import compare_rows
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
from ditserve.export.source import open_source
from ditserve.export.verify import LIMITS, PARITY, check, report
from ditserve.model.nets.low_precision import lower_precision
from ditserve.model.spec.bundle import write_atomic, write_manifest
from ditserve.model.spec.command_line import guarded, named_path, thread_count
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
        summary = {
            "error": report(bands),
            "pictures_psnr_db": round(picture_psnr(source, backbone), 2),
            "quality": frechet_report(source, backbone, frechet) if frechet else {},
        }
        parity = json.loads((scratch / PARITY).read_text())
        write_atomic(scratch / PARITY, (json.dumps({**parity, "fp8": summary}, indent=1) + "\n").encode())
        kept = {name: value for name, value in source.manifest.metrics.items() if name[:4] != "fp8_"}
        write_manifest(
            scratch,
            source.manifest.model_copy(update={"metrics": {**kept, **quality_metrics("fp8", summary)}}),
        )
        return summary


def main(arguments: list[str]) -> int:
    """Run the command line; return 0 if done, 2 if refused with one sentence on stderr."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    return guarded("export.fp8", lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    summary = record_fp8(options.bundle, frechet_settings(options))
    print(f"{options.bundle}: {', '.join(tell_quality(summary))}")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_line("export.fp8"), description="Record what FP8 costs a bundle in quality."
    )
    parser.add_argument("bundle", type=named_path)
    add_frechet_options(parser)
    parser.add_argument("--threads", type=thread_count, default=1)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

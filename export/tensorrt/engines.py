"""Engines as `export.trt` makes them: for which GPU, and how one is put into its place. The keys are `model.engine_keys`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ditserve.export.errors import ExportError
from ditserve.export.tensorrt.build import BuildOptions, Built
from ditserve.export.tensorrt.module import TensorRt
from ditserve.model.spec.bundle import write_atomic
from ditserve.model.spec.engine_cache import CachedEngine, Device, EngineOrigin, NoGpuError, first_gpu

TIMING_CACHE, REPORT = "timing.cache", "report.json"


def find_device(trt: TensorRt, options: BuildOptions) -> Device:
    """The first GPU of this machine, or the targets of an ahead-of-time build.

    Raises:
        ExportError: no GPU, and none named as target.
    """
    if options.targets:
        return Device("aot", "-".join(sorted(target.lower() for target in options.targets)))
    try:
        return first_gpu()
    except NoGpuError as error:
        remedy = "name one with --target sm89" if trt.ahead_of_time else "run this on the machine that serves"
        raise ExportError(f"{error}: {remedy}") from None


def recorded(options: BuildOptions) -> dict[str, Any]:
    """The options of a build as its record has them."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(options)))
    return plain


def timing_cache(slot: CachedEngine) -> bytes:
    """The timing cache of earlier builds in a slot's folder; empty if there is none."""
    file = slot.folder / TIMING_CACHE
    return file.read_bytes() if file.is_file() else b""


def store(
    slot: CachedEngine, origin: EngineOrigin, options: BuildOptions, built: Built, facts: Mapping[str, Any]
) -> None:
    """Write engine, timing cache, record and report; the record last but one, so that a torn write shows as a problem."""
    slot.folder.mkdir(parents=True, exist_ok=True)
    if built.timing_cache:
        write_atomic(slot.folder / TIMING_CACHE, built.timing_cache)
    write_atomic(slot.engine, built.plan)
    record = {
        "key": origin.key(recorded(options)),
        "sha256": hashlib.sha256(built.plan).hexdigest(),
        "bytes": len(built.plan),
        "seconds": round(built.seconds, 2),
        "origin": asdict(origin),
        "options": recorded(options),
        **facts,
    }
    write_atomic(slot.record, _json(record))
    _report(slot.folder)


def amend(slot: CachedEngine, facts: Mapping[str, Any]) -> None:
    """Add what was measured of an engine to its record and the report."""
    write_atomic(slot.record, _json({**json.loads(slot.record.read_text()), **facts}))
    _report(slot.folder)


def drop(slot: CachedEngine) -> None:
    """Remove an engine that must not be served; the report goes on without it."""
    slot.record.unlink(missing_ok=True)
    slot.engine.unlink(missing_ok=True)
    _report(slot.folder)


def _report(folder: Path) -> None:
    records = [json.loads(file.read_text()) for file in sorted(folder.glob("backbone.*.json"))]
    write_atomic(folder / REPORT, _json({"engines": records}))


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()

"""Engines of `export.trt` on disk: for which GPU each is, what its plan contains, and how it is stored.

The keys of an engine are those of `model.spec.engine_cache`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ditserve.export.errors import ExportError
from ditserve.export.tensorrt.build import BuildOptions, Built
from ditserve.export.tensorrt.module import TensorRt
from ditserve.model.spec.bundle import write_atomic
from ditserve.model.spec.engine_cache import CachedEngine, Device, EngineOrigin, NoGpuError, first_gpu

TIMING_CACHE, REPORT = "timing.cache", "report.json"

_KERNEL = re.compile(rb'extern "C" __global__ void (_?[A-Za-z0-9_]+)')
_FOLDED = re.compile(rb"__mye[0-9]+_folded_matmul")


@dataclass(frozen=True, slots=True)
class Fusion:
    """Counts of what the compiler made of a graph.

    Args:
        kernels: distinct CUDA kernels.
        attention: fused attention kernels among them.
        quantising: kernels that end in quantisation.
        int8_matmuls: INT8 products with their Q/DQ nodes folded into them.
    """

    kernels: int
    attention: int
    quantising: int
    int8_matmuls: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def fusion_of(plan: bytes) -> Fusion:
    """Read a serialised plan, which carries the sources and names of its CUDA kernels. No GPU is needed.

    All counts are zero if the plan does not carry sources.
    """
    names = set(_KERNEL.findall(plan))
    return Fusion(
        kernels=len(names),
        attention=sum(b"gemm_mha" in name for name in names),
        quantising=sum(b"RounCast" in name for name in names),
        int8_matmuls=len(set(_FOLDED.findall(plan))),
    )


def find_device(trt: TensorRt, options: BuildOptions) -> Device:
    """Return the first GPU of this machine, or the targets of an ahead-of-time build as a device.

    Raises:
        ExportError: there is no GPU, and no target is named.
    """
    if options.targets:
        return Device("aot", "-".join(sorted(target.lower() for target in options.targets)))
    try:
        return first_gpu()
    except NoGpuError as error:
        remedy = "name one with --target sm89" if trt.ahead_of_time else "run this on the machine that serves"
        raise ExportError(f"{error}: {remedy}") from None


def recorded_options(options: BuildOptions) -> dict[str, Any]:
    """Return the options of a build as plain data for its record."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(options)))
    return plain


def timing_cache(cached: CachedEngine) -> bytes:
    """Return the timing cache of earlier builds in the folder of `cached`; empty if there is none."""
    file = cached.folder / TIMING_CACHE
    return file.read_bytes() if file.is_file() else b""


def store(
    cached: CachedEngine, origin: EngineOrigin, options: BuildOptions, built: Built, facts: Mapping[str, Any]
) -> None:
    """Write timing cache, engine, record and report, in this order.

    The record comes after the engine, so that a write that was cut short shows as a problem of the engine.
    """
    cached.folder.mkdir(parents=True, exist_ok=True)
    if built.timing_cache:
        write_atomic(cached.folder / TIMING_CACHE, built.timing_cache)
    write_atomic(cached.engine, built.plan)
    record = {
        "key": origin.key(recorded_options(options)),
        "sha256": hashlib.sha256(built.plan).hexdigest(),
        "bytes": len(built.plan),
        "seconds": round(built.seconds, 2),
        "origin": asdict(origin),
        "options": recorded_options(options),
        **facts,
    }
    write_atomic(cached.record, _json(record))
    _report(cached.folder)


def amend(cached: CachedEngine, facts: Mapping[str, Any]) -> None:
    """Add measurements of an engine to its record and to the report."""
    write_atomic(cached.record, _json({**json.loads(cached.record.read_text()), **facts}))
    _report(cached.folder)


def drop(cached: CachedEngine) -> None:
    """Remove an engine that must not be served, also from the report."""
    cached.record.unlink(missing_ok=True)
    cached.engine.unlink(missing_ok=True)
    _report(cached.folder)


def _report(folder: Path) -> None:
    records = [json.loads(file.read_text()) for file in sorted(folder.glob("backbone.*.json"))]
    write_atomic(folder / REPORT, _json({"engines": records}))


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()

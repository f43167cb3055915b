"""Engines in a bundle: where they lie, what they were built from, and whether they still may be loaded.

    <bundle>/engines/<gpu>-<flavour>-<version>/backbone.<precision>.engine  backbone.<precision>.json  timing.cache  report.json

An engine is good for exactly what its record says: graph, weights, precision, profiles, options, TensorRT version, GPU. All of it
is compared before an engine is deserialised, because loading a foreign engine fails late and says little.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from export.errors import ExportError
from export.trt_build import BuildOptions, Built
from export.trt_module import TensorRt
from model.bundle import BACKBONE, WEIGHTS, Bundle, digest, write_atomic

FOLDER, TIMING_CACHE, REPORT = "engines", "timing.cache", "report.json"
GRAPHS = {  # precision → graph file, and the command that writes it
    "fp32": (BACKBONE, "python -m export.onnx"),
    "fp16": ("backbone.fp16.onnx", "python -m export.half --precision fp16"),
    "bf16": ("backbone.bf16.onnx", "python -m export.half --precision bf16"),
    "int8": ("backbone.int8.fp16.onnx", "python -m export.int8 --target tensorrt"),
}


@dataclass(frozen=True, slots=True)
class Device:
    """The GPU an engine is for: its name and compute capability such as "sm90"; ahead of time, the targets stand for both."""

    name: str
    capability: str

    @property
    def slug(self) -> str:
        """As part of a folder name."""
        words = re.sub(r"[^a-z0-9]+", "-", f"{self.name} {self.capability}".lower()).strip("-")
        return words.removeprefix("nvidia-")


def find_device(trt: TensorRt, options: BuildOptions) -> Device:
    """The first GPU of this machine, or the targets of an ahead-of-time build.

    Raises:
        ExportError: no GPU, and none named as target.
    """
    if options.targets:
        return Device("aot", "-".join(sorted(target.lower() for target in options.targets)))
    command = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        name, capability = (part.strip() for part in answer.splitlines()[0].rsplit(",", 1))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        remedy = "name one with --target sm89" if trt.ahead_of_time else "run this on the machine that serves"
        raise ExportError(f"no NVIDIA GPU answers nvidia-smi: {remedy}") from None
    return Device(name, "sm" + capability.replace(".", ""))


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything an engine depends on."""

    precision: str
    graph: str
    graph_sha256: str
    weights_sha256: str
    options: Mapping[str, Any]
    flavour: str
    version: str
    device: str
    capability: str

    @property
    def key(self) -> str:
        """sha256 over all fields."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def recipe(bundle: Bundle, precision: str, options: BuildOptions, trt: TensorRt, device: Device) -> Recipe:
    """What an engine of this bundle must have been built from.

    Raises:
        ExportError: the bundle has no graph of this precision.
    """
    graph, command = GRAPHS[precision]
    files = bundle.manifest.files
    if graph not in files:
        raise ExportError(f"{bundle.path} has no {graph}: make it with {command} {bundle.path}")
    return Recipe(
        precision=precision,
        graph=graph,
        graph_sha256=files[graph].sha256,
        weights_sha256=files[WEIGHTS].sha256,
        options=json.loads(json.dumps(asdict(options))),
        flavour=trt.flavour,
        version=trt.version,
        device=device.name,
        capability=device.capability,
    )


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one engine."""

    folder: Path
    precision: str

    @classmethod
    def of(cls, bundle: Path, made: Recipe) -> Slot:
        device = Device(made.device, made.capability)
        return cls(bundle / FOLDER / f"{device.slug}-{made.flavour}-{made.version}", made.precision)

    @property
    def engine(self) -> Path:
        return self.folder / f"backbone.{self.precision}.engine"

    @property
    def record(self) -> Path:
        return self.folder / f"backbone.{self.precision}.json"

    def problem(self, wanted: Recipe) -> str | None:
        """Why the engine here must not be loaded, or None."""
        if not self.engine.is_file() or not self.record.is_file():
            return "not built"
        try:
            record = json.loads(self.record.read_text())
            made, sha256 = record["recipe"], record["sha256"]
        except (ValueError, KeyError, TypeError):
            return f"{self.record.name} is damaged"
        ours = json.loads(json.dumps(asdict(wanted)))
        different = [name for name in ours if made.get(name) != ours[name]]
        if different:
            return f"built with another {', '.join(name.replace('_', ' ') for name in different)}"
        return None if digest(self.engine) == sha256 else f"{self.engine.name} is damaged"

    def timing_cache(self) -> bytes:
        """The timing cache of earlier builds here; empty if there is none."""
        file = self.folder / TIMING_CACHE
        return file.read_bytes() if file.is_file() else b""

    def store(self, made: Recipe, built: Built, facts: Mapping[str, Any]) -> None:
        """Write engine, timing cache, record and report; the record last but one, so that a torn write shows as a problem."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if built.timing_cache:
            write_atomic(self.folder / TIMING_CACHE, built.timing_cache)
        write_atomic(self.engine, built.plan)
        record = {
            "key": made.key,
            "sha256": hashlib.sha256(built.plan).hexdigest(),
            "bytes": len(built.plan),
            "seconds": round(built.seconds, 2),
            "recipe": asdict(made),
            **facts,
        }
        write_atomic(self.record, _json(record))
        records = [json.loads(file.read_text()) for file in sorted(self.folder.glob("backbone.*.json"))]
        write_atomic(self.folder / REPORT, _json({"engines": records}))


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()

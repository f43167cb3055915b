"""The cache of compiled TensorRT engines: the path of each, and the record of what it was built from.

    <engines>/<gpu>-<flavour>-<version>/backbone.<precision>.engine
                                        backbone.<precision>.json    the record
                                        timing.cache
                                        report.json

`export` builds engines and `service` loads them, both through this module. <engines> is the folder `engines`
of the bundle unless another is given. An engine works only with exactly the graph, GPU and version of its
record. All of them are compared before the engine is deserialised, because loading a wrong engine fails late
and says little. Nothing here imports torch, TensorRT or ONNX Runtime.
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

from ditserve.commands import command_line
from ditserve.model.spec.bundle import BACKBONE, WEIGHTS, Bundle, digest
from ditserve.model.spec.errors import BundleError, ModelError

FOLDER = "engines"
# Precision → graph file, and the command that writes it.
GRAPHS = {
    "fp32": (BACKBONE, command_line("export.onnx")),
    "fp16": ("backbone.fp16.onnx", command_line("export.half --precision fp16")),
    "bf16": ("backbone.bf16.onnx", command_line("export.half --precision bf16")),
    "int8": ("backbone.int8.fp16.onnx", command_line("export.int8 --target tensorrt")),
}


class NoGpuError(ModelError):
    """No NVIDIA GPU answers; the message is one sentence."""


@dataclass(frozen=True, slots=True)
class Device:
    """The GPU that an engine is for: its name, and its compute capability such as "sm90".

    For an engine that is built ahead of time, the build targets stand for both.
    """

    name: str
    capability: str

    @property
    def slug(self) -> str:
        """The device as part of a folder name: letters and digits joined by "-", without "nvidia-"."""
        words = re.sub(r"[^a-z0-9]+", "-", f"{self.name} {self.capability}".lower()).strip("-")
        return words.removeprefix("nvidia-")


def first_gpu() -> Device:
    """Return the first GPU of this machine, as nvidia-smi reports it.

    Raises:
        NoGpuError: there is no GPU, or no driver.
    """
    command = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        name, capability = (part.strip() for part in answer.splitlines()[0].rsplit(",", 1))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        raise NoGpuError("no NVIDIA GPU answers nvidia-smi") from None
    return Device(name, "sm" + capability.replace(".", ""))


@dataclass(frozen=True, slots=True)
class EngineOrigin:
    """The graph, weights, TensorRT and GPU of an engine: with the build options, all that it depends on."""

    precision: str
    graph: str
    graph_sha256: str
    weights_sha256: str
    flavour: str
    version: str
    device: str
    capability: str

    @property
    def folder(self) -> str:
        """The name of the folder for engines of this GPU and this TensorRT."""
        return f"{Device(self.device, self.capability).slug}-{self.flavour}-{self.version}"

    def key(self, options: Mapping[str, Any]) -> str:
        """Return the sha256 over all fields and the options of the build."""
        return hashlib.sha256(json.dumps([asdict(self), options], sort_keys=True).encode()).hexdigest()


def engine_origin(
    bundle: Bundle, precision: str, graph: str, *, flavour: str, version: str, device: Device
) -> EngineOrigin:
    """Return the origin that an engine of `graph` in this bundle must have.

    Raises:
        BundleError: the bundle has no such graph.
    """
    files = bundle.manifest.files
    if graph not in files:
        command = GRAPHS[precision][1]
        raise BundleError(f"{bundle.path} has no {graph}: make it with {command} {bundle.path}")
    return EngineOrigin(
        precision=precision,
        graph=graph,
        graph_sha256=files[graph].sha256,
        weights_sha256=files[WEIGHTS].sha256,
        flavour=flavour,
        version=version,
        device=device.name,
        capability=device.capability,
    )


@dataclass(frozen=True, slots=True)
class CachedEngine:
    """The files of one engine in the cache: the engine itself, and its record."""

    folder: Path
    precision: str

    @classmethod
    def of(cls, engines: Path, origin: EngineOrigin) -> CachedEngine:
        return cls(engines / origin.folder, origin.precision)

    @property
    def engine(self) -> Path:
        return self.folder / f"backbone.{self.precision}.engine"

    @property
    def record(self) -> Path:
        return self.folder / f"backbone.{self.precision}.json"

    def problem(self, origin: EngineOrigin, options: Mapping[str, Any] | None = None) -> str | None:
        """Return why the engine must not be loaded, or None. Build options are compared only if given."""
        if not self.engine.is_file() or not self.record.is_file():
            return "not built"
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            built, sha256 = {**record["origin"], "options": record["options"]}, record["sha256"]
        except (ValueError, KeyError, TypeError):
            return f"{self.record.name} is damaged"
        needed: dict[str, Any] = asdict(origin) | ({} if options is None else {"options": dict(options)})
        different = [name for name in needed if built.get(name) != needed[name]]
        if different:
            return f"built with another {', '.join(name.replace('_', ' ') for name in different)}"
        return None if digest(self.engine) == sha256 else f"{self.engine.name} is damaged"

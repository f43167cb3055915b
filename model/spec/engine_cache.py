"""Which compiled engine belongs to which bundle: what it depends on, where it lies, and whether it still may
be loaded.

    <engines>/<gpu>-<flavour>-<version>/backbone.<precision>.engine  backbone.<precision>.json  timing.cache  report.json

`export` builds engines and `service` loads them, both by this module; <engines> is a bundle's folder
`engines` unless another is named. An engine is good for exactly what its record says, and all of that is
compared before one is deserialised, because loading a foreign engine fails late and says little. Nothing here
imports torch, TensorRT or ONNX Runtime.
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

from ditserve.model.spec.bundle import BACKBONE, WEIGHTS, Bundle, BundleError, digest
from ditserve.model.spec.errors import ModelError

FOLDER = "engines"
GRAPHS = {  # precision → graph file, and the command that writes it
    "fp32": (BACKBONE, "python -m export.onnx"),
    "fp16": ("backbone.fp16.onnx", "python -m export.half --precision fp16"),
    "bf16": ("backbone.bf16.onnx", "python -m export.half --precision bf16"),
    "int8": ("backbone.int8.fp16.onnx", "python -m export.int8 --target tensorrt"),
}


class NoGpu(ModelError):
    """No NVIDIA GPU answers; the message is one sentence."""


@dataclass(frozen=True, slots=True)
class Device:
    """The GPU an engine is for: its name and compute capability such as "sm90"; ahead of time, the targets
    stand for both.
    """

    name: str
    capability: str

    @property
    def slug(self) -> str:
        """As part of a folder name."""
        words = re.sub(r"[^a-z0-9]+", "-", f"{self.name} {self.capability}".lower()).strip("-")
        return words.removeprefix("nvidia-")


def first_gpu() -> Device:
    """The first GPU of this machine, as nvidia-smi tells it.

    Raises:
        NoGpu: there is none, or no driver.
    """
    command = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        name, capability = (part.strip() for part in answer.splitlines()[0].rsplit(",", 1))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        raise NoGpu("no NVIDIA GPU answers nvidia-smi") from None
    return Device(name, "sm" + capability.replace(".", ""))


@dataclass(frozen=True, slots=True)
class Origin:
    """What an engine was made from and runs on; with the options of its build, all it depends on."""

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
        """The name of the folder for engines of this GPU and version."""
        return f"{Device(self.device, self.capability).slug}-{self.flavour}-{self.version}"

    def key(self, options: Mapping[str, Any]) -> str:
        """sha256 over all fields and the options of the build."""
        return hashlib.sha256(json.dumps([asdict(self), options], sort_keys=True).encode()).hexdigest()


def origin_of(
    bundle: Bundle, precision: str, graph: str, *, flavour: str, version: str, device: Device
) -> Origin:
    """What an engine of `graph` in this bundle must have been built from.

    Raises:
        BundleError: the bundle has no such graph.
    """
    files = bundle.manifest.files
    if graph not in files:
        command = GRAPHS[precision][1]
        raise BundleError(f"{bundle.path} has no {graph}: make it with {command} {bundle.path}")
    return Origin(
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
class Slot:
    """The place of one engine."""

    folder: Path
    precision: str

    @classmethod
    def of(cls, engines: Path, origin: Origin) -> Slot:
        return cls(engines / origin.folder, origin.precision)

    @property
    def engine(self) -> Path:
        return self.folder / f"backbone.{self.precision}.engine"

    @property
    def record(self) -> Path:
        return self.folder / f"backbone.{self.precision}.json"

    def problem(self, origin: Origin, options: Mapping[str, Any] | None = None) -> str | None:
        """Why the engine here must not be loaded, or None; options that are not given are not compared."""
        if not self.engine.is_file() or not self.record.is_file():
            return "not built"
        try:
            record = json.loads(self.record.read_text())
            made, sha256 = {**record["origin"], "options": record["options"]}, record["sha256"]
        except (ValueError, KeyError, TypeError):
            return f"{self.record.name} is damaged"
        ours: dict[str, Any] = asdict(origin) | ({} if options is None else {"options": dict(options)})
        different = [name for name in ours if made.get(name) != ours[name]]
        if different:
            return f"built with another {', '.join(name.replace('_', ' ') for name in different)}"
        return None if digest(self.engine) == sha256 else f"{self.engine.name} is damaged"

"""The TensorRT module that builds engines: `tensorrt` (10.12 or later) or `tensorrt_rtx`.

TensorRT-RTX also compiles ahead of time on a machine without a GPU, with two wheels from any package index:
`pip install --no-deps onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0 tensorrt-rtx-cu13-bindings==1.7.1.116`
(proprietary licence of NVIDIA). Its bindings expect the libraries to be loaded already. The wheel that
carries the libraries is found but not imported, because importing it would change the environment.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ditserve.export.errors import ExportError

FLAVOURS = ("tensorrt", "tensorrt_rtx")
OLDEST = {"tensorrt": (10, 12), "tensorrt_rtx": (1, 2)}
LIBRARIES = ("libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so")


@dataclass(frozen=True, slots=True)
class TensorRt:
    """A TensorRT module, the name of its package, and its version."""

    module: Any
    flavour: str
    version: str

    @property
    def ahead_of_time(self) -> bool:
        """True if it builds for named compute capabilities without a GPU."""
        return self.flavour == "tensorrt_rtx"


def load_trt(flavour: str = "auto") -> TensorRt:
    """Import TensorRT; "auto" prefers `tensorrt` to `tensorrt_rtx`.

    Raises:
        ExportError: it is not installed, or older than 10.12 (TensorRT-RTX: 1.2).
    """
    wanted = FLAVOURS if flavour == "auto" else (flavour,)
    for name in wanted:
        module = _tensorrt_rtx() if name == "tensorrt_rtx" else _import(name)
        if module is not None and hasattr(module, "Builder"):
            version = str(module.__version__)
            if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST[name]:
                oldest = ".".join(map(str, OLDEST[name]))
                raise ExportError(f"{name} {version} is too old: install {oldest} or later")
            return TensorRt(module, name, version)
    raise ExportError(
        f"{' and '.join(wanted)} cannot be imported: pip install tensorrt-cu13 on a GPU host; "
        "to only compile, "
        "onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0 and tensorrt-rtx-cu13-bindings==1.7.1.116 with --no-deps"
    )


def import_cuda() -> Any:
    """Import the bindings of the CUDA runtime.

    Raises:
        ExportError: the package cuda-bindings is not installed.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError:
        raise ExportError(
            "running an engine needs the package cuda-bindings: pip install cuda-bindings"
        ) from None


def _import(name: str) -> Any:
    """Import a module; return None if it cannot be imported."""
    try:
        return importlib.import_module(name)
    # NVIDIA's meta packages pass on whatever their loader of libraries raised.
    except (ImportError, OSError, RuntimeError):
        return None


def _tensorrt_rtx() -> Any:
    module = _import("tensorrt_rtx")
    if module is not None:
        return module
    carrier = importlib.util.find_spec("onnxruntime_ep_nv_tensorrt_rtx")
    for folder in (carrier.submodule_search_locations or []) if carrier else []:
        for name in LIBRARIES:
            for library in sorted(Path(folder).glob(f"{name}.*.*"))[-1:]:
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return _import("tensorrt_rtx_bindings")


@dataclass(slots=True)
class Log:
    """The messages of TensorRT as (severity, text).

    TensorRT keeps the first logger of a process for good, so each process has one log, which builds use in
    turn.
    """

    lines: list[tuple[str, str]] = field(default_factory=list)

    def errors(self) -> list[str]:
        """Return the error lines in order, without TensorRT's own file and line numbers."""
        return [
            re.sub(r"\s*\[?[\w./]+\.(cpp|h)[:\w]*\]?\s*", " ", text).strip()
            for kind, text in self.lines
            if "ERROR" in kind
        ]


# Logger and log by id of the module.
_loggers: dict[int, tuple[Any, Log]] = {}


@contextmanager
def listening(trt: TensorRt) -> Iterator[tuple[Any, Log]]:
    """Yield this process's logger for the module, and the log that it fills meanwhile, empty at first."""
    if id(trt.module) not in _loggers:
        _loggers[id(trt.module)] = _new_logger(trt.module)
    logger, log = _loggers[id(trt.module)]
    log.lines.clear()
    yield logger, log


def _new_logger(module: Any) -> tuple[Any, Log]:
    log = Log()

    class Listener(module.ILogger):  # type: ignore[misc]  # the module is chosen at run time
        def log(self, severity: Any, message: str) -> None:
            if severity.name not in ("VERBOSE", "INFO"):
                log.lines.append((severity.name, message))

    return Listener(), log

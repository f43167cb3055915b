"""Running a graph in ONNX Runtime on the CPU, to compare it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

Arrays = Mapping[str, npt.NDArray[Any]]


def open_session(
    path: Path, *, threads: int = 1, options: Mapping[str, str] | None = None
) -> ort.InferenceSession:
    """A CPU session for the graph in `path`; `options` are session configuration entries."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    settings.log_severity_level = 3
    for key, value in (options or {}).items():
        settings.add_session_config_entry(key, value)
    return ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, inputs: Arrays, *, batch: int = 16) -> dict[str, npt.NDArray[Any]]:
    """All outputs by name for inputs (N, …) by name, `batch` rows at a time."""
    names = [output.name for output in session.get_outputs()]
    count = len(next(iter(inputs.values())))
    parts = [
        session.run(
            names, {key: np.ascontiguousarray(value[start : start + batch]) for key, value in inputs.items()}
        )
        for start in range(0, count, batch)
    ]
    return {name: np.concatenate([part[k] for part in parts]) for k, name in enumerate(names)}

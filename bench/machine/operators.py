"""The share of each operator in a step, from ONNX Runtime's own profile."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

PASSES = 10
MATRIX_PRODUCTS = {
    "MatMul",
    "FusedMatMul",
    "Gemm",
    "FusedGemm",
    "Conv",
    "FusedConv",
    "ConvTranspose",
    "MultiHeadAttention",
}


def operator_shares(
    graph: Path, inputs: Mapping[str, npt.NDArray[Any]], *, threads: int, folder: Path
) -> dict[str, float]:
    """Run a graph and return each operator's share of the time in kernels, the largest first.

    The profile is written to `folder`.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    for _ in range(PASSES):
        session.run(None, dict(inputs))
    events = json.loads(Path(session.end_profiling()).read_text())
    return shares(events)


def shares(events: list[dict[str, Any]]) -> dict[str, float]:
    """Return the shares from the events of a profile, without the first pass, which allocates memory."""
    spent: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for event in events:
        operator = event.get("args", {}).get("op_name")
        if event.get("cat") != "Node" or operator is None or not event["name"].endswith("_kernel_time"):
            continue
        seen[event["name"]] += 1
        if seen[event["name"]] > 1:
            spent[operator] += event["dur"]
    total = max(1, spent.total())
    return {operator: float(np.round(duration / total, 4)) for operator, duration in spent.most_common()}


def product_share(operators: Mapping[str, float]) -> float:
    """Return the sum of the shares of matrix products."""
    return sum(share for operator, share in operators.items() if operator in MATRIX_PRODUCTS)

"""The parts of a bundle in ONNX Runtime."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditserve.model.spec.bundle import Bundle, write_manifest
from ditserve.service.backends import load_backend
from tests.service.tiny_bundle import CONFIG


@pytest.mark.parametrize(
    ("shape", "multiples"),
    [
        (["batch", 3, 8, 8], None),
        (["batch", 3, "4*rows", "4*columns"], (4, 4)),
        (["batch", 3, "rows", "columns"], (1, 1)),
        (["batch", 3, "frames", "8*rows", "8*columns"], (1, 8, 8)),
        (["batch", 3, "4*rows", 8], None),
    ],
)
def test_sizes_are_free_where_the_graph_says_so(shape: list[Any], multiples: tuple[int, ...] | None) -> None:
    backend = pytest.importorskip("ditserve.service.backends.onnx", reason="onnxruntime is not installed")
    assert backend.graph_size_multiples(shape) == multiples


def test_a_model_without_conditions_has_the_embedding_zero(bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    for name in bundle.manifest.files:
        if name != "embedder.onnx":
            (tmp_path / name).write_bytes(bundle.file(name).read_bytes())
    alone = {"factors": (), "config": replace(CONFIG, classes=())}
    write_manifest(tmp_path, bundle.manifest.model_copy(update=alone))
    backend = load_backend("onnx", Bundle.open(tmp_path), threads=1)
    embeddings = backend.embed(np.zeros((3, 0), np.int64))
    np.testing.assert_array_equal(embeddings, np.zeros((3, bundle.manifest.embedding_size), np.float32))


def test_the_onnx_backend_leaves_torch_unimported() -> None:
    modules = "ditserve.service.backends.onnx, ditserve.service.engine.engine"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

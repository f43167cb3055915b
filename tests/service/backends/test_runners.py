"""Rows runner out to threads, or computed by captured kernels, give the results of one session."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.manifest import FileEntry
from ditserve.service.backends import Floats, load_backend
from tests.service.backends.random_rows import random_rows
from tests.service.tiny_bundle import MANIFEST


def test_threads_share_out_rows_and_share_operators_for_fewer_rows_than_threads(
    bundle: Bundle, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip("ditserve.service.backends.runners", reason="onnxruntime is not installed")
    threads: list[int] = []
    real = module.run_session

    def run(session: Any, outputs: Any, inputs: Any) -> Any:
        threads.append(session.get_session_options().intra_op_num_threads)
        return real(session, outputs, inputs)

    backend = load_backend("onnx", bundle, threads=2)
    inputs = {count: random_rows(backend, rng, count) for count in (1, 5)}
    monkeypatch.setattr(module, "run_session", run)
    backend.denoise(*inputs[1])
    backend.denoise(*inputs[5])
    assert threads == [2, 1, 1]
    backend.close()
    # A large model has one session, which all rows share.
    threads.clear()
    monkeypatch.setattr("ditserve.service.backends.onnx.LARGE_BYTES", 0)
    backend = load_backend("onnx", bundle, threads=2)
    backend.denoise(*inputs[5])
    assert threads == [2]
    backend.close()


def test_after_a_part_failed_no_thread_computes_any_more() -> None:
    module = pytest.importorskip("ditserve.service.backends.runners", reason="onnxruntime is not installed")
    ended = threading.Event()

    class Session:
        def run(self, outputs: list[str], inputs: dict[str, Floats]) -> list[Floats]:
            if inputs["x"][0] == 0:
                raise RuntimeError("bad_alloc")
            time.sleep(0.05)
            ended.set()
            return [inputs["x"]]

    runner = module.DataParallelRunner(Session(), Session(), threads=2)
    with pytest.raises(MemoryError, match="bad_alloc"):
        runner.run(["output"], {"x": np.arange(2.0, dtype=np.float32)})
    assert ended.is_set()
    (same,) = runner.run(["output"], {"x": np.arange(1.0, 6.0, dtype=np.float32)})
    np.testing.assert_array_equal(same, [1, 2, 3, 4, 5])
    runner.close()


class GpuSession:
    """An imitation of a session on a GPU: it doubles x, and keeps the graph number of every run."""

    def __init__(self) -> None:
        self.runs: list[str] = []

    def io_binding(self) -> Any:
        bound: dict[str, Any] = {}
        keep = bound.__setitem__
        return SimpleNamespace(bound=bound, bind_ortvalue_input=keep, bind_ortvalue_output=keep)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self.runs.append(options.get_run_config_entry("gpu_graph_id"))
        binding.bound["output"].update_inplace(2.0 * binding.bound["x"].numpy())


def test_every_number_of_rows_is_captured_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("ditserve.service.backends.runners", reason="onnxruntime is not installed")
    value = module.ort.OrtValue
    on_host = SimpleNamespace(
        ortvalue_from_numpy=lambda array, *place: value.ortvalue_from_numpy(array.copy()),
        ortvalue_from_shape_and_type=lambda shape, kind, *place: value.ortvalue_from_shape_and_type(
            shape, kind
        ),
    )
    monkeypatch.setattr(module.ort, "OrtValue", on_host)
    session = GpuSession()
    runner = module.CudaGraphRunner(session, (2,), threading.Lock())
    for rows in (1, 3, 1, 3):
        x = np.random.default_rng(rows).standard_normal((rows, 2), np.float32)
        (output,) = runner.run(["output"], {"x": x})
        np.testing.assert_array_equal(output, 2.0 * x)
    assert session.runs == ["1"] * module.CAPTURE_RUNS + ["3"] * module.CAPTURE_RUNS + ["1", "3"]


def test_the_weights_of_a_pipeline_count_as_those_of_the_network() -> None:
    module = pytest.importorskip("ditserve.service.backends.onnx", reason="onnxruntime is not installed")
    files = {
        "weights.safetensors": 5,
        "pipeline/transformer/a.safetensors": 7,
        "pipeline/transformer/b.safetensors": 11,
        "pipeline/text_encoder/model.safetensors": 100,
        "backbone.onnx": 1000,
    }
    entries = {name: FileEntry(sha256="0" * 64, bytes=size) for name, size in files.items()}
    assert module.weights_bytes(MANIFEST.model_copy(update={"files": entries})) == 5 + 7 + 11

"""Tests of shared weights: they change where numbers lie, never what a graph computes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from ditserve.export.calibrate import CalibrationRows
from ditserve.export.errors import ExportError
from ditserve.export.half import write_half
from ditserve.export.parity import compare_rows, forward, graph_backbone
from ditserve.export.quantize import write_int8
from ditserve.export.source import open_source
from ditserve.export.storage import remove_graph, save_weights, share_weights
from ditserve.export.verify import LIMITS, check, open_session, run
from ditserve.model.spec.bundle import CALIBRATION, WEIGHTS, Bundle, write_manifest
from ditserve.model.spec.errors import BundleError
from ditserve.service.backends.onnx import open_onnx

RNG = np.random.default_rng(0)
MATRIX = RNG.standard_normal((32, 48)).astype(np.float16).astype(np.float32)
BIAS = RNG.standard_normal(512).astype(np.float16).astype(np.float32)
X = RNG.standard_normal((3, 48)).astype(np.float32)


def graph(transposed: bool) -> onnx.ModelProto:
    """Return the graph x (B, 48) → (x · MATRIXᵀ tiled to 512, plus a bias) · a constant that is no weight."""
    weight = MATRIX.T.copy() if transposed else MATRIX
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"])
        if transposed
        else helper.make_node("Gemm", ["x", "w"], ["h"], transB=1),
        helper.make_node("Tile", ["h", "times"], ["tiled"]),
        helper.make_node("Add", ["tiled", "bias"], ["biased"]),
        helper.make_node("Mul", ["biased", "other"], ["y"]),
    ]
    constants = {
        "w": weight,
        "bias": BIAS,
        "other": np.full(512, 1.5, np.float32),
        "times": np.array([1, 16]),
    }
    body = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 48])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 512])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def answer(proto: onnx.ModelProto, folder: Path) -> npt.NDArray[np.float32]:
    onnx.save(proto, folder / "graph.onnx")
    result: npt.NDArray[np.float32] = run(open_session(folder / "graph.onnx"), {"x": X})["y"]
    return result


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_graph_that_shares_weights_computes_the_same(
    tmp_path: Path, transposed: bool, dtype: torch.dtype
) -> None:
    weights = tmp_path / "weights.safetensors"
    # With "odd", the matrix begins at an offset that is no multiple of a page or a cache line.
    save_weights(
        weights, {"a.odd": torch.ones(3), "m": torch.from_numpy(MATRIX), "b": torch.from_numpy(BIAS)}, dtype
    )
    before = answer(graph(transposed), tmp_path)
    shared = share_weights(graph(transposed), tmp_path)
    outside = [tensor for tensor in shared.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    assert len(outside) == 2
    assert all(
        entry.value == weights.name for t in outside for entry in t.external_data if entry.key == "location"
    )
    np.testing.assert_array_equal(answer(shared, tmp_path), before)
    assert (tmp_path / "graph.onnx").stat().st_size < 4096


def test_a_graph_in_another_precision_than_the_file_shares_it_too(tmp_path: Path) -> None:
    save_weights(tmp_path / WEIGHTS, {"m": torch.from_numpy(MATRIX)}, torch.float32)
    half = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["batch", 48])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["batch", 32])],
            [numpy_helper.from_array(MATRIX.T.astype(np.float16), "w")],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    shared = share_weights(half, tmp_path)
    onnx.save(shared, tmp_path / "half.onnx")
    output = run(open_session(tmp_path / "half.onnx"), {"x": X.astype(np.float16)})["y"]
    np.testing.assert_allclose(output, X @ MATRIX.T, rtol=0.02, atol=0.05)


def test_a_weight_that_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"^weight blocks\.0\.attn is not finite in float16"):
        save_weights(tmp_path / "w.safetensors", {"blocks.0.attn": torch.full((2,), 1e6)}, torch.float16)


def test_a_large_graph_keeps_its_tensors_beside_it_all_the_way(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer, ONNX Runtime, the manifest and the quantiser treat it as they would above 2 GiB."""
    monkeypatch.setattr("ditserve.export.storage.INLINE_BYTES", 0)
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    source = open_source(folder)
    rows = CalibrationRows.load(folder / CALIBRATION).with_null(source.network.config)
    write_half(open_source(folder), folder, rows, "fp16")
    file = write_int8(source.dit, folder, rows, "cpu", reduce_range=True)
    write_manifest(folder, source.manifest)
    bundle = Bundle.open(folder)
    assert {"backbone.fp16.onnx.data", "backbone.int8.onnx.data"} <= set(bundle.manifest.files)
    held = onnx.load(file, load_external_data=False).graph.initializer
    places = {entry.value for t in held for entry in t.external_data if entry.key == "location"}
    assert places == {"weights.safetensors", "backbone.int8.onnx.data"}
    check("INT8", compare_rows(source, rows, graph_backbone(source.network, file)), LIMITS["int8"])
    backend = open_onnx(bundle, precision="int8", threads=1)
    x, labels = rows.x[:2].numpy(), rows.labels[:2].numpy()
    state = backend.modulate(rows.timestep[:2].numpy(), backend.embed(labels))
    want = forward(source.network, rows.at(torch.arange(2))).numpy()
    np.testing.assert_allclose(backend.denoise(x, state), want, atol=0.2)
    (folder / "backbone.int8.onnx.data").write_bytes(b"damaged")
    with pytest.raises(BundleError, match=r"backbone\.int8\.onnx\.data differs"):
        Bundle.open(folder)
    remove_graph(file)
    assert not list(folder.glob("backbone.int8*"))

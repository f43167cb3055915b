"""INT8 graphs: what is quantised and how, and how near it stays where it is served."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from export.calibrate import Walk, trajectories
from export.int8 import EXACT
from export.onnx import forward
from export.quantize import FILES, Target, backbone_inputs, this_processor
from export.session import open_session, run
from export.smooth import int8_linears
from export.source import open_source
from export.verify import LIMITS, check, compare
from tests.export.tiny import CONFIG

TARGETS: list[Target] = ["cpu", "tensorrt"]


def quantised_products(proto: onnx.ModelProto) -> set[str]:
    """Products whose second input comes from a DequantizeLinear."""
    made_by = {value: node.op_type for node in proto.graph.node for value in node.output}
    products = [node for node in proto.graph.node if node.op_type in ("MatMul", "Gemm")]
    return {node.name for node in products if made_by.get(node.input[1]) == "DequantizeLinear"}


@pytest.mark.parametrize("target", TARGETS)
def test_exactly_the_block_linears_are_quantised_symmetrically(full_bundle: Path, target: Target) -> None:
    proto = onnx.load(full_bundle / FILES[target])
    dit = open_source(full_bundle).dit
    assert quantised_products(proto) == {f"{name}/MatMul" for name in int8_linears(dit)}
    assert len(int8_linears(dit)) == 4 * CONFIG.depth
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = tensors[node.input[2]]
            assert zero.data_type == TensorProto.INT8
            assert not numpy_helper.to_array(zero).any()
    weights = [
        numpy_helper.to_array(t)
        for t in tensors.values()
        if t.data_type == TensorProto.INT8 and len(t.dims) == 2
    ]
    assert len(weights) == 4 * CONFIG.depth
    largest = max(int(np.abs(weight.astype(np.int32)).max()) for weight in weights)
    assert (
        largest <= 64 if target == "cpu" else largest > 100
    )  # 7-bit weights cannot saturate 16-bit accumulators


@pytest.mark.parametrize("target", TARGETS)
def test_int8_stays_within_its_limit_in_every_noise_band(full_bundle: Path, target: Target) -> None:
    source = open_source(full_bundle)
    rows = trajectories(source.dit, source.manifest, source.schedule, Walk(samples=2, steps=10, seed=7))
    session = open_session(full_bundle / FILES[target], options=EXACT if target == "tensorrt" else {})
    dtype = np.float16 if target == "tensorrt" else np.float32
    output = np.concatenate(
        [run(session, inputs)["output"] for inputs in backbone_inputs(source.dit, rows, dtype)]
    )
    bands = compare(forward(source.dit, rows).numpy(), output, rows.timestep.numpy(), 1000)
    check("INT8", bands, LIMITS["int8"])
    assert min(band.relative_l2 for band in bands) > 1e-4  # it really is quantised


def test_the_cpu_graph_gives_on_this_processor_what_it_says(full_bundle: Path) -> None:
    source = open_source(full_bundle)
    rows = trajectories(source.dit, source.manifest, source.schedule, Walk(samples=1, steps=4))
    inputs = next(backbone_inputs(source.dit, rows, np.float32))
    served, exact = (
        run(open_session(full_bundle / FILES["cpu"], options=options), inputs)["output"]
        for options in ({}, EXACT)
    )
    assert np.linalg.norm(served - exact) / np.linalg.norm(exact) < 0.01


def test_the_fp16_graph_takes_and_gives_half_precision(full_bundle: Path) -> None:
    graph = onnx.load(full_bundle / "backbone.fp16.onnx").graph
    assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {
        TensorProto.FLOAT16
    }
    made_by = {value: node for node in graph.node for value in node.output}
    islands = [
        node
        for node in graph.node
        if node.op_type == "LayerNormalization" and node.name.startswith("blocks.0/")
    ]
    assert islands
    assert all(made_by[node.input[0]].op_type == "Cast" for node in islands)  # statistics in fp32


@pytest.mark.parametrize(
    ("text", "vnni"),
    [
        ("flags\t\t: fpu avx2 fma\n", False),
        ("flags\t\t: avx2 avx512f avx512_vnni\n", True),
        ("flags\t\t: avx2 avx_vnni\n", True),
        ("Features\t: fp asimd asimddp\n", True),
        ("model name: avx512_vnni imitation\n", False),
    ],
)
def test_the_processor_is_asked_for_vnni(tmp_path: Path, text: str, vnni: bool) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert this_processor(tmp_path / "cpuinfo").vnni is vnni


def test_an_unreadable_processor_counts_as_one_without_vnni(tmp_path: Path) -> None:
    assert not this_processor(tmp_path / "missing").vnni


def test_calibration_does_not_disturb_random_numbers(full_bundle: Path) -> None:
    source = open_source(full_bundle)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    trajectories(source.dit, source.manifest, source.schedule, Walk(samples=1, steps=2))
    assert torch.equal(torch.get_rng_state(), before)

"""Builds by NVIDIA's real compiler, ahead of time and without a GPU. No engine is executed here."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from ditserve.export.graph import backbone_graph
from ditserve.export.half import half_network
from ditserve.export.source import parameters
from ditserve.export.storage import save_graph, save_weights, save_whole
from ditserve.export.tensorrt.build import BuildCancelled, BuildError, BuildOptions, Profile, build_engine
from ditserve.export.tensorrt.engines import Fusion, fusion_of
from ditserve.export.tensorrt.module import TensorRt
from ditserve.export.trt import main
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.engine_cache import GRAPHS
from tests.export.tiny import CONFIG, tiny_dit

ROOT = Path(__file__).resolve().parents[3]
OPTIONS = BuildOptions(profiles=(Profile(1, 2, 4),), targets=("sm80",))
RECORDED = json.loads((Path(__file__).parents[1] / "data" / "tensorrt_11_4_names.json").read_text())["names"]
USED = {
    "Builder": [
        "build_serialized_network",
        "create_builder_config",
        "create_network",
        "create_optimization_profile",
    ],
    "BuilderFlag": ["TF32"],
    "DataType": ["FLOAT"],
    "IBuilderConfig": [
        "add_optimization_profile",
        "builder_optimization_level",
        "clear_flag",
        "create_timing_cache",
        "get_timing_cache",
        "profiling_verbosity",
        "progress_monitor",
        "set_memory_pool_limit",
        "set_timing_cache",
    ],
    "ICudaEngine": [
        "create_execution_context",
        "get_tensor_dtype",
        "get_tensor_profile_shape",
        "num_optimization_profiles",
    ],
    "IExecutionContext": [
        "execute_async_v3",
        "infer_shapes",
        "set_input_shape",
        "set_optimization_profile_async",
        "set_tensor_address",
    ],
    "ILogger": ["log"],
    "Logger": ["WARNING"],
    "INetworkDefinition": ["get_input", "num_inputs"],
    "IOptimizationProfile": ["set_shape"],
    "IProgressMonitor": ["phase_finish", "phase_start", "step_complete"],
    "ITensor": ["name", "shape"],
    "ITimingCache": ["serialize"],
    "MemoryPoolType": ["WORKSPACE"],
    "NetworkDefinitionCreationFlag": ["STRONGLY_TYPED"],
    "OnnxParser": ["get_error", "num_errors", "parse_from_file"],
    "ParserError": ["desc", "node_name", "node_operator"],
    "ProfilingVerbosity": ["DETAILED"],
    "Runtime": ["deserialize_cuda_engine"],
}
ONLY_RTX = {"ComputeCapability": [], "IBuilderConfig": ["num_compute_capabilities", "set_compute_capability"]}
HANDLES = {
    "builder",
    "config",
    "network",
    "parser",
    "optimization",
    "error",
    "after",
    "module",
    "tensor",
    "trt.module",
    "self._trt",
    "self._engine",
    "self._context",
    "self._runtime",
    "self._kinds",
    "execution",
    "kinds",
    "self._trt.Logger",
}
SPEAKING = (
    "export/tensorrt/engine_runner.py",
    "export/tensorrt/build.py",
    "export/tensorrt/module.py",
    "service/backends/tensorrt.py",
)
OWN = {"Listener", "Relay", "__version__", "__members__", "upper"}


def linears(config: DiTConfig) -> int:
    return 4 * config.depth


def fused(rtx: TensorRt, bundle: Path, precision: str) -> Fusion:
    return fusion_of(build_engine(rtx, bundle / GRAPHS[precision][0], OPTIONS).plan)


@pytest.mark.parametrize("name", [f"{owner}.{name}" for owner, names in USED.items() for name in names])
def test_every_name_used_is_in_tensorrt_11(name: str) -> None:
    owner, attribute = name.split(".")
    assert attribute in RECORDED[owner]


def test_every_name_used_is_in_tensorrt_rtx(rtx: TensorRt) -> None:
    for table in (USED, ONLY_RTX):
        for owner, names in table.items():
            missing = [name for name in names if not hasattr(getattr(rtx.module, owner), name)]
            assert not missing, f"{owner} lacks {missing}"


def test_the_table_of_names_is_complete() -> None:
    listed = {
        name for table in (USED, ONLY_RTX) for owner, names in table.items() for name in (owner, *names)
    }
    for file in SPEAKING:
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in HANDLES:
                assert node.attr in listed | OWN | {"module", "log"}, f"{file}:{node.lineno} uses {node.attr}"


def test_fp32_compiles(rtx: TensorRt, full_bundle: Path) -> None:
    fusion = fused(rtx, full_bundle, "fp32")
    assert fusion.kernels > 0
    assert fusion.int8_matmuls == 0


def test_fp16_compiles_with_fused_attention(rtx: TensorRt, full_bundle: Path) -> None:
    fusion = fused(rtx, full_bundle, "fp16")
    assert fusion.attention >= 1
    assert fusion.int8_matmuls == 0


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_shipped_model_compiles(rtx: TensorRt, precision: str) -> None:
    shipped = Bundle.open(ROOT / "model/zoo/emoji64")
    config = shipped.manifest.config
    assert isinstance(config, DiTConfig)
    fusion = fused(rtx, shipped.path, precision)
    assert fusion.attention >= (precision != "fp32")
    assert fusion.int8_matmuls == (linears(config) if precision == "int8" else 0)


def test_int8_compiles_with_every_linear_folded_and_attention_still_fused(
    rtx: TensorRt, full_bundle: Path
) -> None:
    fusion = fused(rtx, full_bundle, "int8")
    assert fusion.int8_matmuls == linears(CONFIG)
    assert fusion.attention >= 1


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_graph_of_any_size_compiles_for_the_size_that_is_served(
    rtx: TensorRt, tmp_path: Path, precision: str
) -> None:
    config = replace(CONFIG, depth=1, layout_rank=0, head_channels=0, rope=True)
    network = tiny_dit(config)
    save_weights(tmp_path / "weights.safetensors", parameters(network), torch.float32)
    proto = backbone_graph(network if precision == "fp32" else half_network(network, precision))
    assert "4*rows" in str(proto.graph.input[0])
    save_graph(proto, tmp_path / "backbone.onnx")
    fusion = fusion_of(build_engine(rtx, tmp_path / "backbone.onnx", replace(OPTIONS, size=(16, 16))).plan)
    assert fusion.attention >= (0 if precision == "fp32" else 1)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "depth": 6,
            "attention": ("window:2+1", "neighbourhood:1", "axial", "low_rank:3", "linear", "channel"),
            "levels": (0, 0, 0, 1, 1, 0),
            "conv_mlp": True,
        },
        {"experts": 4, "condition_gate": True},
        {"experts": 4, "top_k": 2, "routing": "token_choice", "shared_expert": True},
        {"merge_tokens": 0.5, "shared_modulation": True},
    ],
)
def test_variants_of_the_network_compile(rtx: TensorRt, tmp_path: Path, changes: dict[str, Any]) -> None:
    network = tiny_dit(replace(CONFIG, **{"depth": 1, "layout_rank": 0, "head_channels": 0, **changes}))
    save_whole(backbone_graph(half_network(network, "fp16")), tmp_path / "backbone.onnx")
    engine = build_engine(rtx, tmp_path / "backbone.onnx", replace(OPTIONS, size=(16, 16)))
    assert fusion_of(engine.plan).kernels > 0


def test_tensors_beside_a_large_graph_are_found(
    rtx: TensorRt, full_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditserve.export.storage.INLINE_BYTES", 0)
    save_whole(onnx.load(full_bundle / GRAPHS["int8"][0]), tmp_path / "backbone.onnx")
    assert (tmp_path / "backbone.onnx.data").is_file()
    assert fusion_of(build_engine(rtx, tmp_path / "backbone.onnx", OPTIONS).plan).int8_matmuls


def test_the_same_graph_compiles_to_the_same_engine(rtx: TensorRt, full_bundle: Path) -> None:
    plans = {build_engine(rtx, full_bundle / "backbone.onnx", OPTIONS).plan for _ in range(2)}
    assert len(plans) == 1


def test_asymmetric_int8_is_refused_with_the_reason(rtx: TensorRt, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="quantise"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], name="dequantise"),
    ]
    constants = [
        numpy_helper.from_array(numpy_value, name)
        for numpy_value, name in (
            (numpy_helper.to_array(helper.make_tensor("s", TensorProto.FLOAT, [], [0.1])), "scale"),
            (numpy_helper.to_array(helper.make_tensor("z", TensorProto.UINT8, [], [128])), "zero"),
        )
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])]
    body = helper.make_graph(nodes, "g", inputs, outputs, constants)
    onnx.save(
        helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10),
        tmp_path / "bad.onnx",
    )
    with pytest.raises(BuildError, match=r"cannot read bad\.onnx: .*(?i:zero point|type)"):
        build_engine(rtx, tmp_path / "bad.onnx", OPTIONS)


def test_a_file_that_is_no_graph_is_refused(rtx: TensorRt, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    with pytest.raises(BuildError, match=r"cannot read bad\.onnx"):
        build_engine(rtx, tmp_path / "bad.onnx", OPTIONS)


def test_a_profile_tensorrt_refuses_is_an_error(rtx: TensorRt, full_bundle: Path) -> None:
    upside_down = Profile(1, 2, 4)
    object.__setattr__(upside_down, "min", 3)
    with pytest.raises(BuildError, match=r"refuses the profile 3\.\.4"):
        build_engine(
            rtx, full_bundle / "backbone.onnx", BuildOptions(profiles=(upside_down,), targets=("sm80",))
        )


def test_an_unknown_target_lists_the_known(rtx: TensorRt, full_bundle: Path) -> None:
    with pytest.raises(BuildError, match=r"cannot compile for sm13: choose among .*SM89"):
        build_engine(
            rtx, full_bundle / "backbone.onnx", BuildOptions(profiles=OPTIONS.profiles, targets=("sm13",))
        )


def test_a_build_stops_when_asked(rtx: TensorRt, full_bundle: Path) -> None:
    class Impatient:
        steps = 0

        def start(self, phase: str, parent: str | None, steps: int) -> None: ...

        def step(self, phase: str, step: int) -> bool:
            self.steps += 1
            return self.steps < 5

        def finish(self, phase: str) -> None: ...

    with pytest.raises(BuildCancelled):
        build_engine(rtx, full_bundle / "backbone.onnx", OPTIONS, monitor=Impatient())


def test_the_command_compiles_all_precisions(
    rtx: TensorRt, full_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        str(full_bundle),
        "--all",
        "--backend",
        "tensorrt_rtx",
        "--target",
        "sm89",
        "--compile-only",
        "--buckets",
        "1,2",
    ]
    assert main(arguments) == 0
    assert "compiles" in capsys.readouterr().err
    assert not (full_bundle / "engines").exists()

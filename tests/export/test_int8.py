"""INT8 graphs: the layers that are quantised, the error on each target, and the report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from safetensors.torch import save_file

from ditserve.export.calibrate import TrajectorySettings, calibration_rows
from ditserve.export.errors import ExportError
from ditserve.export.int8 import EXACT, QuantizationSettings, add_int8, main
from ditserve.export.parity import compare_rows, graph_backbone
from ditserve.export.quality import FrechetSettings, frechet_report
from ditserve.export.quantize import FILES, Target, backbone_inputs, local_processor
from ditserve.export.smooth import int8_linears
from ditserve.export.source import open_source, parameters
from ditserve.export.verify import LIMITS, check, open_session, run
from ditserve.model.evaluation.classifier_network import Classifier, ClassifierCard
from ditserve.model.spec.bundle import Bundle, digest, write_manifest
from ditserve.model.spec.unet_config import UNetConfig
from tests.export.tiny import CONFIG, tiny_source

TARGETS: list[Target] = ["cpu", "tensorrt"]


def quantised_products(proto: onnx.ModelProto) -> set[str]:
    """Return the names of the products whose second input comes from a DequantizeLinear."""
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
    # 7-bit weights cannot saturate 16-bit accumulators.
    assert largest <= 64 if target == "cpu" else largest > 100


@pytest.mark.parametrize("target", TARGETS)
def test_int8_stays_within_its_limit_in_every_noise_band(full_bundle: Path, target: Target) -> None:
    source = open_source(full_bundle)
    rows = calibration_rows(source, TrajectorySettings(samples=2, steps=10, seed=7)).with_null(CONFIG)
    served = graph_backbone(source.dit, full_bundle / FILES[target], EXACT if target == "tensorrt" else None)
    bands = compare_rows(source, rows, served)
    check("INT8", bands, LIMITS["int8"])
    assert min(band.relative_l2 for band in bands) > 1e-4  # it really is quantised


def test_the_cpu_graph_gives_on_this_processor_what_it_says(full_bundle: Path) -> None:
    source = open_source(full_bundle)
    rows = calibration_rows(source, TrajectorySettings(samples=1, steps=4)).with_null(CONFIG)
    inputs = next(backbone_inputs(source.dit, rows))
    served, exact = (
        run(open_session(full_bundle / FILES["cpu"], options=options), inputs)["output"]
        for options in ({}, EXACT)
    )
    assert np.linalg.norm(served - exact) / np.linalg.norm(exact) < 0.01


def test_the_fp16_graph_takes_and_gives_fp32_and_computes_in_half_precision(full_bundle: Path) -> None:
    graph = onnx.load(full_bundle / "backbone.fp16.onnx").graph
    assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {
        TensorProto.FLOAT
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
    assert local_processor(tmp_path / "cpuinfo").vnni is vnni


def test_an_unreadable_processor_counts_as_one_without_vnni(tmp_path: Path) -> None:
    assert not local_processor(tmp_path / "missing").vnni


def test_a_bundle_is_smoothed_quantised_and_tells_what_it_cost(
    own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditserve.export.int8._speedup", lambda *_: {"batch_1": 1.5, "batch_4": 1.4})
    walk = TrajectorySettings(samples=2, steps=10)
    summary = add_int8(own_bundle, "cpu", QuantizationSettings(range="reduced", trajectories=walk))
    assert summary["calibration"]["rows"] == 40
    bundle = Bundle.open(own_bundle)
    assert "backbone.int8.onnx" in bundle.manifest.files
    assert bundle.manifest.provenance["smoothing"] == summary["smoothing"]
    metrics = bundle.manifest.metrics
    assert metrics["int8_weight_bits"] == 7
    assert metrics["int8_speedup_batch_1"] == 1.5
    assert metrics["int8_relative_l2"] == max(band["relative_l2"] for band in summary["error"])
    assert metrics["int8_pictures_psnr_db"] > 20
    # Quality is not measured without data.
    assert "int8_quality_loss" not in metrics
    monkeypatch.setattr("ditserve.export.int8._speedup", lambda *_: {"batch_1": 1.01})
    kept = {file.name: file.read_bytes() for file in own_bundle.iterdir()}
    with pytest.raises(ExportError, match=r"1\.01 times as fast as fp32 here, 1\.1 is asked for: --keep"):
        add_int8(own_bundle, "cpu", QuantizationSettings(trajectories=walk))
    assert {file.name: file.read_bytes() for file in own_bundle.iterdir()} == kept


def test_the_cost_in_quality_is_the_growth_of_the_frechet_distance(full_bundle: Path, tmp_path: Path) -> None:
    """Random pictures stand for the training data; a backbone that adds 0.5 stands for a worse one."""
    source = open_source(full_bundle)
    data = tmp_path / "pictures.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3), np.uint8)
    (labels, styles) = (factor.classes for factor in source.manifest.factors)
    np.savez(data, x=pixels, y=np.arange(32) // 2 % 4, s=np.arange(32) % 2, names=labels, styles=styles)
    settings = FrechetSettings(data, classifier_in(tmp_path / "classifier"), pictures=16, steps=4)
    same = frechet_report(source, source.dit.backbone, settings)
    assert same["quality_loss"] == 0.0
    assert same["frechet_between"] == pytest.approx(0.0, abs=1e-4)
    other = frechet_report(source, lambda x, state: source.dit.backbone(x, state) + 0.5, settings)
    assert other["frechet_between"] > 0
    assert other["quality_loss"] == pytest.approx(other["frechet"] / other["frechet_fp32"] - 1, abs=1e-3)
    with pytest.raises(ExportError, match="nowhere"):
        frechet_report(
            source, source.dit.backbone, FrechetSettings(tmp_path / "nowhere", settings.classifier)
        )


def classifier_in(folder: Path) -> Path:
    """Write a classifier of random weights for 16×16 pictures into `folder`."""
    factors = tiny_source().manifest.factors
    torch.manual_seed(0)
    network = Classifier(ClassifierCard(image_size=(16, 16), widths=(4, 8), factors=factors))
    folder.mkdir()
    save_file(
        {name: tensor.half() for name, tensor in network.state_dict().items()}, folder / "weights.safetensors"
    )
    sha256 = digest(folder / "weights.safetensors")
    (folder / "classifier.json").write_text(
        network.card.model_copy(update={"sha256": sha256}).model_dump_json()
    )
    return folder


def test_a_unet_is_refused_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = UNetConfig(
        image_size=(8, 8), in_channels=3, base_channels=8, multipliers=(1,), res_blocks=1, attention=(),
        head_size=8, classes=(4, 2), learn_sigma=False,
    )  # fmt: skip
    source = tiny_source(config)
    save_file(parameters(source.network), tmp_path / "weights.safetensors")
    write_manifest(tmp_path, source.manifest)
    assert main([str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err
        == "export.int8: tiny is a U-Net, and this is for a DiT: choose another model\n"
    )

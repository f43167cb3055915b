"""Graphs of imported diffusers pipelines; one served from its graphs is in test_pipelines_over_http."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from ditserve.export import pipeline as exported
from ditserve.export.calibrate import TrajectorySettings
from ditserve.export.errors import ExportError
from ditserve.export.onnx import main
from ditserve.model.spec.bundle import BACKBONE, DECODER, ENCODER, PIPELINE, Bundle
from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.pipeline_bundle import write_pipeline_bundle
from ditserve.model.spec.pipeline_folder import read_pipeline
from ditserve.service.backends import BackendUnavailable, load_backend
from tests.tiny_pipelines import save_pipeline, tokens

FEW = TrajectorySettings(samples=2, steps=2)
# Families whose autoencoder is exported here. Those of the others are of the kinds of pixart's and of sd3's,
# which test_pipelines_over_http serves from its graphs.
AUTOENCODERS = ("pixart", "sana")


def bundle_of(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Bundle:
    pipeline = save_pipeline(family, folder / "pipeline")
    pipeline.transformer.to(dtype).save_pretrained(folder / "pipeline" / "transformer")
    found = read_pipeline(
        folder / "pipeline", name="tiny", licence="CC0-1.0", size=(8, 8), tokens=tokens(family)
    )
    write_pipeline_bundle(found, folder / "bundle")
    return Bundle.open(folder / "bundle")


def without_autoencoder(manifest: Manifest, folder: Path) -> dict[str, Any]:
    """Write an autoencoder that gives back what it is given; return no errors of it."""
    for name in (DECODER, ENCODER):
        sides = [helper.make_tensor_value_info(side, TensorProto.FLOAT, None) for side in ("x", "y")]
        node = helper.make_node("Identity", ["x"], ["y"])
        graph = helper.make_graph([node], "nothing", sides[:1], sides[1:])
        onnx.save(helper.make_model(graph, ir_version=10), folder / name)
    return {}


@pytest.mark.parametrize(
    ("family", "size"), [("pixart", (8, 8)), ("flux", (12, 10)), ("auraflow", (12, 10)), ("sana", (5, 7))]
)
def test_graphs_agree_with_torch_and_refer_to_the_imported_weights(
    family: str, size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of one batch have noise levels and texts of their own; weights in bf16 are not stored again."""
    source = bundle_of(family, tmp_path, torch.bfloat16)
    (tmp_path / "out").mkdir()
    if family not in AUTOENCODERS:
        monkeypatch.setattr(exported, "_write_autoencoder", without_autoencoder)
    report = exported.export_pipeline(source, tmp_path / "out", {"version": "2"}, FEW)
    bundle = Bundle.open(tmp_path / "out")
    assert bundle.manifest.version == "2"
    names = ["embedder", "conditioner", "backbone"]
    names += ["decoder", "encoder"] if family in AUTOENCODERS else []
    assert set(report["graphs"]) >= {f"{name}.onnx" for name in names}
    graph = onnx.load(bundle.file(BACKBONE), load_external_data=False).graph
    outside = {
        entry.value
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert outside == {f"{PIPELINE}/transformer/diffusion_pytorch_model.safetensors"}
    torched, onnxed = load_backend("torch", bundle, threads=1), load_backend("onnx", bundle, threads=1)
    random = np.random.default_rng(0)
    encoder = onnxed.text_encoder
    assert encoder is not None
    texts = np.stack([encoder.encode(text) for text in ("a cat", "the red moon", "")])
    labels = np.zeros((3, 0), np.int64)
    told = np.array([0.9, 0.2, 0.5], np.float32) * bundle.manifest.diffusion.noise_scale
    x = random.standard_normal((3, 4, *size), np.float32)
    answers = []
    for backend in (torched, onnxed):
        embeddings = backend.embed(labels, texts)
        if bundle.manifest.guidance_embedded is not None:
            embeddings[:, -1] = (1.0, 3.5, 6.0)
        answers.append(backend.denoise(x, backend.modulate(told, embeddings)))
        one_size = backend is onnxed and family == "pixart"
        side = 1 if family == "sana" else 2
        assert backend.size_multiples == (None if one_size else (side, side))
    assert np.abs(answers[1] - answers[0]).max() <= 1e-4 * np.abs(answers[0]).max()
    if family not in AUTOENCODERS:
        return
    sides = [side * bundle.manifest.upscale for side in size]
    pixels = random.integers(0, 256, (2, *sides, 3), np.uint8)
    encoded = [backend.encode(pixels) for backend in (torched, onnxed)]
    assert encoded[0].shape == (2, 4, *size)
    assert np.abs(encoded[1] - encoded[0]).max() <= 1e-4 * np.abs(encoded[0]).max()
    pictures = [backend.decode(x).astype(int) for backend in (torched, onnxed)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--half", "fp16"], "--half is not for an imported pipeline: torch computes it in half precision"),
        (["--ladder", "quick"], "--ladder is not for an imported pipeline: no ladder is measured"),
        (["--weights", "fp16"], "--weights is not for an imported pipeline: its weights stay"),
        (["--vae", "somewhere"], "--vae is not for an imported pipeline: it brings its autoencoder"),
        (["--data", "somewhere"], "--data is not for an imported pipeline: no training pictures"),
    ],
)
def test_what_is_not_for_a_pipeline_is_refused_and_nothing_is_written(
    sd3: Bundle, flags: list[str], reason: str, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "somewhere").mkdir()
    words = [str(tmp_path / word) if word == "somewhere" else word for word in flags]
    assert main([str(sd3.path), "--out", str(tmp_path / "out"), *words]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_family_that_does_not_export_is_told_in_one_sentence(
    sd3: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: Any) -> None:
        raise torch.onnx.errors.OnnxExporterError("no translation\nof aten.fold")

    monkeypatch.setattr(exported, "write_graphs", unknown)
    with pytest.raises(ExportError, match=r"^tiny has no graph, serve it in torch: no translation of aten"):
        exported.export_pipeline(sd3, tmp_path, {}, FEW)


@pytest.mark.parametrize("backend", ["onnx", "tensorrt"])
def test_a_precision_without_a_graph_is_refused(sd3: Bundle, backend: str) -> None:
    with pytest.raises(BackendUnavailable, match="tiny is an imported pipeline"):
        load_backend(backend, sd3, precision="fp16")


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_of("sd3", tmp_path_factory.mktemp("sd3"))

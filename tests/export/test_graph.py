"""Graphs of every option of the network agree with torch, at any batch and any size that the model takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from diffusers import AutoencoderKL
from onnx import TensorProto, helper, numpy_helper

from ditserve.export.calibrate import TrajectorySettings, calibration_rows
from ditserve.export.decoder import check_decoder, write_decoder
from ditserve.export.errors import ExportError
from ditserve.export.graph import SIDES, backbone_graph
from ditserve.export.graph_files import write_graphs
from ditserve.export.half import half_network
from ditserve.export.parity import expected_outputs, verify_graphs
from ditserve.export.rewriting import transpose_narrow_convolutions
from ditserve.export.source import parameters
from ditserve.export.storage import save_weights
from ditserve.model.nets.autoencoder import autoencoder_folder, fingerprint, open_decoder
from ditserve.model.nets.factory import NetworkConfig
from ditserve.model.nets.small_autoencoder import (
    SmallAutoencoder,
    SmallAutoencoderConfig,
    save_small_autoencoder,
)
from ditserve.model.spec.bundle import DECODER, ENCODER, MANIFEST, parse_manifest, write_manifest
from ditserve.model.spec.dit_config import BLOCK_KINDS, DiTConfig
from ditserve.model.spec.manifest import LatentSpec
from ditserve.model.spec.network_config import size_multiples
from ditserve.model.spec.unet_config import UNetConfig
from tests.export.tiny import tiny_source

PLAIN = DiTConfig(
    image_size=(16, 12), patch_size=4, in_channels=3, hidden_size=32, depth=2, num_heads=2, classes=(4,),
    learn_sigma=False,
)  # fmt: skip
UNET = UNetConfig(
    image_size=(8, 4), in_channels=3, base_channels=8, multipliers=(1, 2), res_blocks=1, attention=(1,),
    head_size=8, classes=(4, 2), text_size=4,
)  # fmt: skip
OPTIONS: dict[str, NetworkConfig] = {
    "rope, qk-norm, learned sigma, text beside labels, cross-attention, condition tokens in front": replace(
        PLAIN,
        rope=True,
        qk_norm=True,
        learn_sigma=True,
        text_size=5,
        fusion="mlp",
        blocks=("cross_attention", "in_context"),
    ),
    "no condition, SwiGLU, convolution head, two modulations": replace(
        PLAIN, depth=1, classes=(), swiglu=True, head_channels=6, blocks=("adaln",), base_size=(8, 8)
    ),
    "a plan of all kinds, layout path": replace(PLAIN, depth=4, blocks=BLOCK_KINDS, layout_rank=2),
    "conditional mean, texts in place of labels": replace(
        PLAIN, depth=1, mean_rank=3, mean_maps=2, text_size=5, text_labels=True
    ),
    "text tokens alone, qk-norm": replace(
        PLAIN, depth=1, classes=(), text_size=5, text_tokens=3, qk_norm=True
    ),
    "every kind of attention, a convolutional MLP, levels": replace(
        PLAIN,
        image_size=(16, 24),
        depth=6,
        attention=("window:2+1", "neighbourhood:1", "axial", "low_rank:3", "linear", "channel"),
        levels=(0, 0, 0, 1, 1, 0),
        conv_mlp=True,
    ),
    "merged tokens": replace(PLAIN, image_size=(16, 24), depth=1, merge_tokens=0.5),
    "experts that choose, a gate of the condition": replace(PLAIN, depth=1, experts=4, condition_gate=True),
    "tokens that choose, a shared modulation": replace(
        PLAIN,
        depth=1,
        experts=4,
        top_k=2,
        routing="token_choice",
        shared_expert=True,
        shared_modulation=True,
    ),
    "U-Net": UNET,
    "clips, space and time": replace(
        PLAIN, image_size=(4, 8, 12), attention=("space", "time"), rope=True, head_channels=6
    ),
    "clips that are told their first frame": replace(
        PLAIN, image_size=(4, 8, 12), attention=("space", "time"), first_frame=True
    ),
    "clips, local attention": replace(
        PLAIN,
        image_size=(4, 16, 16),
        depth=3,
        num_heads=3,
        hidden_size=24,
        attention=("window:2+1", "neighbourhood:1", "axial"),
        levels=(0, 0, 1),
        conv_mlp=True,
    ),
}


@pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS)
def test_every_option_exports(config: NetworkConfig, tmp_path: Path) -> None:
    source = tiny_source(config)
    save_weights(tmp_path / "weights.safetensors", parameters(source.network), torch.float32)
    write_graphs(source.network, source.manifest, tmp_path)
    rows = calibration_rows(source, TrajectorySettings(samples=3, steps=3)).with_null(config)
    expected = expected_outputs(source.network, rows)
    bands = verify_graphs(source.manifest, tmp_path, rows, expected)
    conditional = bool(config.classes or config.text_size)
    free = not (isinstance(config, DiTConfig) and config.has_layout)
    assert ("embedder.onnx" in bands) is conditional
    assert any(name.startswith("backbone.onnx at ") for name in bands) is free
    backbone = onnx.load(tmp_path / "backbone.onnx", load_external_data=False).graph
    multiples = size_multiples(config) or ()
    named = zip(multiples, SIDES[-len(multiples) :], strict=True)
    sides = [f"{part}*{side}" if part > 1 else side for part, side in named] if free else [*config.image_size]
    shape = backbone.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in shape] == ["batch", 3, *sides]
    doubles = [tensor.name for tensor in backbone.initializer if tensor.data_type == onnx.TensorProto.DOUBLE]
    # TensorRT has no float64.
    assert not doubles


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"experts": 4}, {"merge_tokens": 0.5}])
def test_variants_in_half_precision_run_on_a_cpu(changes: dict[str, Any]) -> None:
    network = tiny_source(replace(PLAIN, image_size=(16, 24), depth=1, **changes)).network
    random = torch.Generator().manual_seed(0)
    x, labels = torch.randn(15, 3, 16, 24, generator=random), torch.tensor([[0], [2], [4]]).repeat(5, 1)
    state = network.modulate(torch.tensor([1.0, 500.0, 900.0]).repeat(5), network.embed(labels))
    session = ort.InferenceSession(backbone_graph(half_network(network, "fp16")).SerializeToString())
    names = [entry.name for entry in session.get_inputs()]
    given = dict(zip(names, [tensor.numpy() for tensor in (x, *state)], strict=True))
    exact, (half,) = network.backbone(x, state), session.run(None, given)
    # Rounding may change which tokens of a row are merged.
    errors = (torch.from_numpy(half) - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert float(errors.median()) < 0.01


def test_a_cpu_gets_few_channels_by_a_transposed_convolution(tmp_path: Path) -> None:
    """The convolution of the patches and a wide one stay as they are."""
    source = tiny_source(replace(PLAIN, depth=1, head_channels=6))
    for name, expected in (("fp32", ["Conv", "Conv", "ConvTranspose"]), ("fp16", ["Conv"] * 3)):
        network = source.network if name == "fp32" else half_network(source.network, name)
        kinds = [node.op_type for node in backbone_graph(network).graph.node if "Conv" in node.op_type]
        assert sorted(kinds) == expected


@pytest.mark.parametrize(
    ("attributes", "turned"),
    [
        ({"pads": [1, 1, 1, 1]}, True),
        ({"pads": [1, 1, 1, 1], "strides": [2, 2]}, False),
        ({}, False),
        ({"pads": [1, 1, 1, 1], "dilations": [2, 2]}, False),
        ({"pads": [1, 1, 1, 1], "group": 2}, False),
    ],
)
def test_only_convolutions_that_keep_the_size_are_turned(attributes: dict[str, Any], turned: bool) -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((4, 8 // attributes.get("group", 1), 3, 3)).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], **attributes)
    shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    graph = helper.make_graph([node], "g", shapes[:1], shapes[1:], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    x = random.standard_normal((2, 8, 9, 7)).astype(np.float32)
    (before,) = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    transpose_narrow_convolutions(model.graph)
    assert (model.graph.node[0].op_type == "ConvTranspose") is turned
    (after,) = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )
    network.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_the_autoencoder_of_a_model_on_latents_is_graphs_of_any_size(tmp_path: Path, vae: Path) -> None:
    manifest = tiny_source(PLAIN).manifest
    spec = LatentSpec(shift=(0.1,) * 4, scale=(2.0,) * 4)
    config = replace(PLAIN, in_channels=4)
    latent = manifest.model_copy(update={"decoder": "sd-vae", "latents": spec, "config": config})
    bands = write_decoder(latent, tmp_path, vae=vae)
    latents, pixels = ["batch", 4, "rows", "columns"], ["batch", 3, "2*rows", "2*columns"]
    for name, expected in ((DECODER, [latents, pixels]), (ENCODER, [pixels, latents])):
        assert bands[name][0].relative_l2 < 1e-4
        graph = onnx.load(tmp_path / name).graph
        shapes = [
            [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in (*graph.input, *graph.output)
        ]
        given, made = shapes
        assert (given, made[:2]) == (expected[0], expected[1][:2])
        # The exporter names the sides of what convolutions with a stride make as it likes.
        assert all(isinstance(side, str) for side in made[2:])
    (tmp_path / "other").mkdir()
    write_decoder(latent, tmp_path / "other", graph=tmp_path / DECODER)
    for name in (DECODER, ENCODER):
        assert (tmp_path / "other" / name).read_bytes() == (tmp_path / name).read_bytes()
    (tmp_path / ENCODER).unlink()
    (tmp_path / "older").mkdir()
    write_decoder(latent, tmp_path / "older", graph=tmp_path / DECODER)
    assert [file.name for file in (tmp_path / "older").iterdir()] == [DECODER]
    with pytest.raises(ExportError, match="works on latents: name the folder of its autoencoder with --vae"):
        check_decoder(latent)


def test_a_model_of_one_channel_cannot_go_without_a_decoder() -> None:
    source = tiny_source(replace(PLAIN, in_channels=1))
    with pytest.raises(ExportError, match=r"makes 1 channels, not red, green and blue: .* --vae"):
        check_decoder(source.manifest)


def test_a_small_autoencoder_comes_along_for_what_draws_with_torch(tmp_path: Path) -> None:
    sizes = SmallAutoencoderConfig(latent_channels=4, widths=(16,), blocks=(1,))
    folder, bundle = tmp_path / "small", tmp_path / "bundle"
    for made in (folder, bundle):
        made.mkdir()
    save_small_autoencoder(folder, SmallAutoencoder(sizes), {})
    spec = LatentSpec(shift=(0.0,) * 4, scale=(1.0,) * 4, factor=2)
    update: dict[str, Any] = {"decoder": "small", "latents": spec, "config": replace(PLAIN, in_channels=4)}
    pixels = tiny_source(PLAIN).manifest
    update["diffusion"] = pixels.diffusion.model_copy(update={"clip_x0": False})
    latent = pixels.model_copy(update=update)
    write_decoder(latent, bundle, vae=folder)
    own = autoencoder_folder(bundle, None)
    assert own is not None
    assert fingerprint(own) == fingerprint(folder)
    write_manifest(bundle, latent)
    listed = parse_manifest((bundle / MANIFEST).read_bytes(), bundle).files
    assert {f"autoencoder/{file.name}" for file in folder.iterdir()} == {
        name for name in listed if "/" in name
    }
    assert open_decoder(latent, own).factor == 2
    again = tmp_path / "again"
    again.mkdir()
    write_decoder(latent, again, graph=bundle / DECODER)
    assert fingerprint(again / "autoencoder") == fingerprint(folder)
    # The graphs hold no second copy of its weights.
    for name in (DECODER, ENCODER):
        tensors = onnx.load(bundle / name, load_external_data=False).graph.initializer
        assert any(tensor.data_location == TensorProto.EXTERNAL for tensor in tensors)
        assert all(len(tensor.raw_data) < 1024 for tensor in tensors)

"""Imports: what a file tells is read, what it leaves open is asked for, and no other function comes in."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ditserve.model.convert import main
from ditserve.model.nets.dit import DiT
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.errors import BundleError
from ditserve.model.train.load import load_model
from ditserve.model.weights.diffusers import to_diffusers
from ditserve.model.weights.imported import ImportOptions
from ditserve.model.weights.imports import noise_cosine, read_weights
from ditserve.model.weights.official import WeightsError, from_official, to_official
from ditserve.service.backends import load_backend
from tests.model.weights.reference import official_dit, sit_velocity

Make = Callable[..., DiT]
State = dict[str, Tensor]
SMALL = DiTConfig(image_size=(8, 8), hidden_size=16, depth=2, num_heads=2, classes=(5,))
S2 = DiTConfig(image_size=(4, 4), hidden_size=384, depth=12, num_heads=6, classes=(5,))
TOLD = ImportOptions(num_heads=2, num_classes=5, predicts_noise=True)


@pytest.fixture
def state(network: Make) -> State:
    """A random state dict in the published layout."""
    return to_official(network(SMALL).state_dict(), SMALL)


@pytest.fixture
def noise_state() -> State:
    """Weights that predict the noise: every block is the identity, and the rest hands x through."""
    dit = DiT(SMALL)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.zero_()
        dit.x_embedder.proj.weight.copy_(100 * torch.eye(16).reshape(16, 4, 2, 2))
        # Noise this large drowns the positions, and LayerNorm keeps its direction. The rows of the last map
        # go from (C, P, P) to (P, P, C_out).
        rows = torch.zeros(2, 2, 8, 16)
        for k, (c, p, q) in enumerate(torch.cartesian_prod(*map(torch.arange, (4, 2, 2))).tolist()):
            rows[p, q, c, k] = 1.0
        dit.final_layer.linear.weight.copy_(rows.flatten(0, 2))
    return to_official(dit.state_dict(), SMALL)


def saved(folder: Path, stored: Any, name: str = "weights.pt") -> Path:
    torch.save(stored, folder / name)
    return folder / name


def test_the_imported_network_is_the_published_function(state: State, tmp_path: Path) -> None:
    found = read_weights(saved(tmp_path, state), TOLD)
    ours = DiT(found.config).eval()
    ours.load_state_dict(found.weights)
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 400.0, 999.0])
    y = torch.tensor([0, 4, 5])
    with torch.no_grad():
        expected, got = official_dit(state, x, t, y, heads=2), ours(x, t, y[:, None])
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_noise_prediction_is_seen_and_a_velocity_is_not_taken_for_it(
    state: State, noise_state: State, tmp_path: Path
) -> None:
    found = read_weights(saved(tmp_path, noise_state), replace(TOLD, predicts_noise=False))
    assert any("its output is that noise (cosine 0.9" in note for note in found.notes)
    # At the noisy end a perfect SiT returns the data less the noise: the noise turned, told the time 0.
    flow = {**noise_state}
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        flow[name] = -flow[name]
    x = torch.randn(1, 4, 8, 8)
    velocity = sit_velocity(flow, x, torch.zeros(1), torch.tensor([5]), heads=2)
    assert torch.cosine_similarity(velocity.flatten(), x.flatten(), dim=0) < -0.9
    for unlike in (flow, state):
        with pytest.raises(WeightsError, match="given pure noise its output is not that noise"):
            read_weights(saved(tmp_path, unlike), replace(TOLD, predicts_noise=False))
    weights, config = from_official(state, num_heads=2)
    assert abs(noise_cosine(weights, config)) < 0.9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": "SiT-XL/2"}, "model SiT-XL/2.*--function sit"),
        ({"prediction": "velocity"}, "prediction velocity.*--function sit"),
        ({"prediction": "score", "path_type": "GVP"}, "prediction score.*only a linear path with a velocity"),
        ({"prediction": "velocity", "path_type": "VP"}, "path_type VP.*only a linear path with a velocity"),
        ({"prediction": "v", "path_type": "cosine"}, "path_type cosine.*only a linear path with a velocity"),
    ],
)
@pytest.mark.parametrize("as_namespace", [True, False])
def test_a_flow_whose_arguments_do_not_tell_its_function_is_refused(
    state: State, tmp_path: Path, arguments: dict[str, str], words: str, as_namespace: bool
) -> None:
    args = argparse.Namespace(**arguments) if as_namespace else arguments
    file = saved(tmp_path, {"ema": state, "args": args})
    with pytest.raises(WeightsError, match=words):
        read_weights(file, TOLD)


def test_an_official_training_checkpoint_needs_no_options(network: Make, tmp_path: Path) -> None:
    state = to_official(network(S2).state_dict(), S2)
    args = argparse.Namespace(model="DiT-S/2", image_size=32, num_classes=5, vae="ema")
    found = read_weights(
        saved(tmp_path, {"model": {}, "ema": state, "opt": {}, "args": args}), ImportOptions()
    )
    assert found.config == S2
    assert "predicts the noise (DiT-S/2)" in found.notes[0]
    args.model = "DiT-B/2"
    with pytest.raises(WeightsError, match="says that it is a DiT-B/2"):
        read_weights(saved(tmp_path, {"ema": state, "args": args}), ImportOptions())
    args.model, args.num_classes = "DiT-S/2", 6
    with pytest.raises(WeightsError, match="6 rows for 6 classes, and none for the null class"):
        read_weights(saved(tmp_path, {"ema": state, "args": args}), ImportOptions())


def test_a_class_table_is_asked_about(state: State, tmp_path: Path) -> None:
    file = saved(tmp_path, state)
    for classes, words in [
        (None, "6 rows, which may be 5 classes and the null class, or 6 classes"),
        (6, "6 rows for 6 classes, and none for the null class"),
        (9, "6 rows, and 9 classes with the null class need 10"),
    ]:
        with pytest.raises(WeightsError, match=words):
            read_weights(file, replace(TOLD, num_classes=classes))


def wrapped(state: State, how: str) -> Any:
    """Return a state dict as other tools save it."""
    prefixed = {
        "data parallel": "module.",
        "compiled": "_orig_mod.",
        "both": "module._orig_mod.",
        "lightning": "model.",
    }
    if how in prefixed:
        return {prefixed[how] + name: tensor for name, tensor in state.items()}
    if how == "ema module":
        averaged = {f"ema_model.{name}": tensor for name, tensor in state.items()}
        online = {f"online_model.{name}": tensor + 1 for name, tensor in state.items()}
        return {**averaged, **online, "initted": torch.tensor(True), "step": torch.tensor(3)}
    if how == "nested":
        return {"state_dict": {"model": {f"module.{name}": tensor for name, tensor in state.items()}}}
    if how == "fp16":
        return {name: tensor.half() for name, tensor in state.items()}
    return {how: state, "epoch": 3}


@pytest.mark.parametrize(
    "how",
    [
        "data parallel",
        "compiled",
        "both",
        "lightning",
        "ema module",
        "nested",
        "fp16",
        "ema",
        "model_ema",
        "model",
        "state_dict",
    ],
)
def test_wrapped_files_are_the_same_weights(state: State, tmp_path: Path, how: str) -> None:
    plain, _ = from_official(state, num_heads=2)
    found = read_weights(saved(tmp_path, wrapped(state, how)), TOLD).weights
    assert found.keys() == plain.keys()
    assert all(torch.allclose(found[name].float(), plain[name], atol=1e-2) for name in plain)
    assert how == "fp16" or all(torch.equal(found[name], plain[name]) for name in plain)


def test_projectors_tell_an_sit_unless_it_is_said_otherwise(state: State, tmp_path: Path) -> None:
    file = saved(tmp_path, {**state, "projectors.0.0.weight": torch.zeros(2, 2)})
    with pytest.raises(
        WeightsError, match=r"projectors of REPA.*--function repa imports that, --predicts-noise"
    ):
        read_weights(file, replace(TOLD, predicts_noise=False))
    assert not any(name.startswith("projectors") for name in read_weights(file, TOLD).weights)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused(state: State, tmp_path: Path, number: float) -> None:
    state["blocks.1.mlp.fc2.bias"][3] = number
    with pytest.raises(WeightsError, match=r"blocks\.1\.mlp\.fc2\.bias holds NaN or infinite"):
        read_weights(saved(tmp_path, state), TOLD)


def test_integers_are_refused(state: State, tmp_path: Path) -> None:
    state["blocks.1.mlp.fc2.bias"] = state["blocks.1.mlp.fc2.bias"].to(torch.int8)
    with pytest.raises(WeightsError, match=r"is of torch\.int8"):
        read_weights(saved(tmp_path, state), TOLD)


@pytest.fixture
def pipeline(network: Make, tmp_path: Path) -> Path:
    """A diffusers pipeline's folder, with class names and without weights."""
    _, fields = to_diffusers(network(SMALL).state_dict(), SMALL)
    (tmp_path / "pipe/transformer").mkdir(parents=True)
    (tmp_path / "pipe/transformer/config.json").write_text(json.dumps(fields))
    labels = {str(k): name for k, name in enumerate(("cat", "dog", "fox", "owl", "bee"))}
    (tmp_path / "pipe/model_index.json").write_text(
        json.dumps({"_class_name": "MyPipeline", "id2label": labels})
    )
    return tmp_path / "pipe"


@pytest.mark.parametrize("layout", ["plain", "fp16 variant", "shards", "sharded variant", "bin shards"])
def test_weights_of_a_diffusers_folder(network: Make, pipeline: Path, layout: str) -> None:
    state, _ = to_diffusers(network(SMALL).state_dict(), SMALL)
    folder, stem = pipeline / "transformer", "diffusion_pytorch_model"
    if layout == "plain":
        save_file(state, folder / f"{stem}.safetensors")
    elif layout == "fp16 variant":
        save_file(
            {name: tensor.half() for name, tensor in state.items()}, folder / f"{stem}.fp16.safetensors"
        )
    else:
        suffix = ".bin" if layout == "bin shards" else ".safetensors"
        variant = ".fp16" if "variant" in layout else ""
        weight_map: dict[str, str] = {}
        for k in range(2):
            name = f"{stem}{variant}-0000{k + 1}-of-00002{suffix}"
            part = {key: state[key] for key in list(state)[k::2]}
            (torch.save if suffix == ".bin" else save_file)(part, folder / name)
            weight_map |= dict.fromkeys(part, name)
        index = folder / (f"{stem}{suffix}.index{variant}.json" if variant else f"{stem}{suffix}.index.json")
        index.write_text(json.dumps({"weight_map": weight_map}))
    options = ImportOptions(function="published", predicts_noise=True)
    found = read_weights(pipeline, options)
    assert found.classes == ("cat", "dog", "fox", "owl", "bee")
    ours = network(SMALL).state_dict()
    assert all(torch.allclose(found.weights[name].float(), ours[name], atol=1e-2) for name in ours)


def test_a_missing_shard_and_one_outside_are_named(pipeline: Path, tmp_path: Path) -> None:
    index = pipeline / "transformer/diffusion_pytorch_model.safetensors.index.json"
    for name, words in [("gone.safetensors", "gone.safetensors cannot be read"), ("../out.bin", "outside")]:
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(WeightsError, match=words):
            read_weights(pipeline, ImportOptions(function="published"))


def test_the_function_of_a_diffusers_folder_is_asked_for_told_and_kept(
    network: Make, pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, _ = to_diffusers(network(SMALL).state_dict(), SMALL)
    save_file(state, pipeline / "transformer/diffusion_pytorch_model.safetensors")
    command = ["import", str(pipeline), str(tmp_path / "out"), "--licence", "MIT", "--predicts-noise"]
    assert main(command) == 2
    assert "--function diffusers if" in capsys.readouterr().err
    assert main([*command, "--function", "diffusers"]) == 0
    assert "the function is that of diffusers: timestep frequencies k/127" in capsys.readouterr().out
    manifest = Bundle.open(tmp_path / "out").manifest
    assert any("k/127" in note for note in manifest.provenance["import"]["notes"])
    assert manifest.factors[0].classes[1] == "dog"


@pytest.mark.parametrize(
    ("file", "fields", "words"),
    [
        ("transformer/config.json", {"_class_name": "PixArtTransformer2DModel"}, "holds a PixArt"),
        ("transformer/config.json", {"num_attention_heads": None}, "makes no DiT"),
        (
            "scheduler/scheduler_config.json",
            {"prediction_type": "v_prediction"},
            "prediction_type v_prediction",
        ),
        ("scheduler/scheduler_config.json", {"beta_end": 0.012}, "beta_end 0.012"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "trained_betas"),
        ("scheduler/scheduler_config.json", {"predction_type": "v_prediction"}, "field predction_type: no"),
        ("scheduler/scheduler_config.json", {"sigma_data": 0.5}, "field sigma_data: no scheduler of the"),
    ],
)
def test_other_models_and_processes_are_refused(
    network: Make, pipeline: Path, file: str, fields: dict[str, Any], words: str
) -> None:
    state, _ = to_diffusers(network(SMALL).state_dict(), SMALL)
    save_file(state, pipeline / "transformer/diffusion_pytorch_model.safetensors")
    (pipeline / file).parent.mkdir(exist_ok=True)
    known = json.loads((pipeline / file).read_text()) if (pipeline / file).exists() else {}
    (pipeline / file).write_text(json.dumps({**known, **fields}))
    with pytest.raises(WeightsError, match=words):
        read_weights(pipeline, ImportOptions(function="published", predicts_noise=True))


def test_an_import_in_bf16_or_of_views_can_be_loaded(state: State, tmp_path: Path) -> None:
    large = torch.zeros(100, 16)
    large[:6] = state["y_embedder.embedding_table.weight"]
    state["y_embedder.embedding_table.weight"] = large[:6]
    state["final_layer.linear.weight"] = state["final_layer.linear.weight"].bfloat16()
    file = saved(tmp_path, state)
    command = ["import", str(file), str(tmp_path / "über 1"), "--licence", "MIT", "--heads", "2"]
    assert main([*command, "--num-classes", "5", "--predicts-noise"]) == 0
    assert load_model(tmp_path / "über 1").manifest.name == "ber-1"
    assert (tmp_path / "über 1/weights.safetensors").stat().st_size < 200_000


def test_serving_an_import_that_was_never_exported_names_the_command(state: State, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["import", str(saved(tmp_path, state)), str(out), "--licence", "MIT", "--heads", "2"]
    assert main([*command, "--num-classes", "5", "--predicts-noise"]) == 0
    with pytest.raises(BundleError, match=f"python -m export.onnx {out} --out {out} writes all graphs"):
        load_backend("onnx", Bundle.open(out))

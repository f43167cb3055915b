"""Training of adapters: the base stays as it is, the file is small, a resumed run is the one that went on."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from ditserve.model.data.dataset import DataError
from ditserve.model.data.examples import Examples
from ditserve.model.data.latents import Latents, Moments
from ditserve.model.nets.lora import AdapterBank, adaptable_layers
from ditserve.model.spec.adapters import adapter_files
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.manifest import LatentSpec
from ditserve.model.train import training
from ditserve.model.train.base_model import in_terms_of
from ditserve.model.train.checkpoint import CheckpointError
from ditserve.model.train.config import TrainConfig
from ditserve.model.train.dry_run import estimate_memory, estimate_stages, format_estimate
from ditserve.model.train.load import load_model
from ditserve.model.train.loaded_model import load_bundle, save_model
from ditserve.model.train.recipe import run_fields
from ditserve.model.train.trainer import Trainer
from ditserve.model.weights.lora import AdapterError, adapter_base, read_adapter
from tests.model.train.training_cases import assert_same, newest_state, tiny_config, tiny_run, write_pictures


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a trained network, whose gates are open."""
    folder = tmp_path_factory.mktemp("base")
    training.train(tiny_config(folder, steps=4, lr=0.05, warmup=0))
    save_model(folder / "bundle", load_model(folder / "run"))
    return folder / "bundle"


def adapter_run(folder: Path, base: Path, **changes: Any) -> dict[str, Any]:
    """Return the fields of a run that adapts `base` to other pictures of two of its classes."""
    raw = tiny_run(folder)
    for field in ("model", "diffusion"):
        del raw[field]
    raw["data"]["path"] = str(write_pictures(folder / "other.npz", ("b", "a")))
    return {**raw, "init": str(base), "lora": {"rank": 2}, "lr": 0.02, **changes}


def made(folder: Path, base: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate(adapter_run(folder, base, **changes))


def test_the_terms_learn_and_the_base_stays(tmp_path: Path, base: Path) -> None:
    trainer = Trainer(made(tmp_path, base, steps=30))
    assert trainer.adapted is not None
    before = {name: tensor.clone() for name, tensor in trainer.adapted.base.state_dict().items()}
    names = {name for name, _ in trainer.state.model.named_parameters()}
    assert names == {
        f"blocks.{block}.{layer}.lora_{letter}.weight"
        for block in range(2)
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        for letter in "AB"
    }
    batch = trainer.source.make(0)
    with torch.no_grad():
        first = trainer.losses(batch)[1]["loss"].item()
        plain = load_bundle(Bundle.open(base)).network(batch.x0, batch.t.float(), batch.labels)
        assert torch.equal(trainer.state.model(batch.x0, batch.t.float(), batch.labels), plain), (
            "it starts there"
        )
    for _ in range(30):
        trainer.step()
    with torch.no_grad():
        assert trainer.losses(batch)[1]["loss"].item() < 0.9 * first
    assert_same(before, dict(trainer.adapted.base.state_dict()))


def test_classes_are_the_base_s_by_name(tmp_path: Path, base: Path) -> None:
    dataset = Trainer(made(tmp_path, base)).dataset
    assert [factor.name for factor in dataset.factors] == ["label", "style"]
    assert dataset.factors[0].classes == ("a", "b", "c")
    assert dataset.labels.tolist() == [[1, 0], [1, 1], [0, 0], [0, 1]]
    unknown = adapter_run(tmp_path, base)
    write_pictures(tmp_path / "other.npz", ("a", "zebra"))
    with pytest.raises(DataError, match="'zebra' is no label of the bundle to adapt"):
        Trainer(TrainConfig.model_validate(unknown))
    np.savez(tmp_path / "other.npz", x=np.zeros((2, 8, 8, 3), np.uint8), y=np.zeros(2, int), names=["a"])
    assert Trainer(TrainConfig.model_validate(unknown)).dataset.labels.tolist() == [[3, 2], [3, 2]], (
        "not given"
    )


def test_latents_are_normalised_as_those_of_the_base(tmp_path: Path, base: Path) -> None:
    pictures = Trainer(made(tmp_path, base)).dataset
    manifest = Bundle.open(base).manifest
    latents = LatentSpec(shift=(0.5, -1.0), scale=(2.0, 4.0))
    of_latents = manifest.model_copy(update={"decoder": "small", "latents": latents})
    with pytest.raises(DataError, match="holds pictures, the bundle to adapt denoises latents"):
        in_terms_of(of_latents, pictures, Path("other"))
    own = np.ones((2, 1, 1), np.float32)
    shared = {field.name: getattr(pictures, field.name) for field in fields(Examples)}
    dataset = Latents(moments=cast(Moments, None), shift=0 * own, scale=own, **shared)
    adapted = cast(Latents, in_terms_of(of_latents, dataset, Path("other")))
    assert adapted.shift.tolist() == [[[0.5]], [[-1.0]]]
    assert (adapted.scale.shape, adapted.scale.ravel().tolist()) == ((2, 1, 1), [2.0, 4.0])
    assert adapted.labels.tolist() == pictures.labels.tolist()


def test_the_file_is_read_as_it_was_trained(tmp_path: Path, base: Path) -> None:
    """A network with the adapter and the merged one of the run draw the same."""
    config = made(tmp_path, base, lora={"rank": 2, "alpha": 6.0})
    training.train(config)
    (tmp_path / "adapters").mkdir()
    (config.output / "run.safetensors").rename(tmp_path / "adapters" / "run.safetensors")
    (file,) = adapter_files(tmp_path / "adapters")
    bundle = Bundle.open(base)
    network = load_bundle(bundle).network
    conditioner, backbone = adaptable_layers(network, network.config)
    layers = {**conditioner, **backbone}
    adapter = read_adapter(file, layers, base=adapter_base(bundle))
    bank = AdapterBank(layers, {"run": adapter.terms})
    merged = load_model(config.output).network
    x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor([900.0, 100.0]), torch.tensor([[0, 1], [3, 2]])
    with torch.inference_mode(), bank.applied([[("run", 1.0)]] * 2):
        drawn = network(x, t, labels)
    with torch.inference_mode():
        torch.testing.assert_close(drawn, merged(x, t, labels), atol=1e-5, rtol=1e-4)
        assert (drawn - network(x, t, labels)).abs().max() > 1e-3
    with pytest.raises(AdapterError, match="it was trained on other weights, those of run"):
        read_adapter(file, layers, base={"name": "bundle", "sha256": "other"})


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, base: Path) -> None:
    straight = made(tmp_path, base, steps=8, output=str(tmp_path / "straight"), checkpoint_blocks=True)
    training.train(straight)
    resumed = made(tmp_path, base, steps=8, checkpoint_blocks=True)
    resumed.output.mkdir()
    trainer = Trainer(resumed)
    training.start(trainer)
    for _ in range(3):
        trainer.step()
    trainer.save()
    training.train(TrainConfig.model_validate(json.loads((resumed.output / "config.json").read_text())))
    assert_same(newest_state(straight.output), newest_state(resumed.output))
    tensors = [load_file(run.output / f"{run.output.name}.safetensors") for run in (straight, resumed)]
    assert_same(*tensors)
    state = newest_state(straight.output)
    assert sum(tensor.nbytes for name, tensor in state.items() if name.startswith("model.")) < 10_000
    with pytest.raises(CheckpointError, match="trained with another lora"):
        training.train(made(tmp_path, base, steps=9, lora={"rank": 3}))


def test_a_dry_run_prices_an_adapter(tmp_path: Path, base: Path) -> None:
    trainer = Trainer(made(tmp_path, base))
    trainer.step()
    memory = estimate_memory(trainer)
    assert trainer.adapted is not None
    terms = sum(p.numel() for p in trainer.state.model.parameters())
    frozen = sum(p.numel() for p in trainer.adapted.base.parameters())
    assert (memory.gradients, memory.weights) == (4 * terms, 4 * (terms + frozen))
    trainer = Trainer(made(tmp_path, base))
    lines = list(format_estimate(trainer, estimate_stages(trainer, probe=1)))
    assert f"rank 2 beside 8 layers, a file of {4 * terms / 1e6:.2f} MB" in lines[1]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"init": None}, "lora needs init, the folder of the bundle to adapt"),
    ({"init": "/nowhere"}, "lora needs init, the folder of the bundle to adapt, and /nowhere is none"),
    ({"model": {"patch_size": 2}}, "an adapter is of the network of init: leave model out"),
    ({"diffusion": {"schedule": "flow", "prediction": "flow"}}, "of the noise of init: leave diffusion out"),
    ({"stages": [{"size": 4, "steps": 6}, {"size": 8}]}, "an adapter is trained without stages"),
    ({"compile": True}, "an adapter is trained without compile"),
    ({"parallel": {"mode": "fsdp"}}, "an adapter is trained in replicas"),
    ({"lora": {"rank": 0}}, "greater than or equal to 1"),
    ({"lora": {"rank": 8, "dropout": 0.1}}, "Extra inputs are not permitted"),
]


@pytest.mark.parametrize(("changes", "sentence"), WRONG)
def test_a_run_that_cannot_be_is_refused(
    changes: dict[str, Any], sentence: str, tmp_path: Path, base: Path
) -> None:
    with pytest.raises(ValidationError) as refused:
        made(tmp_path, base, **changes)
    assert sentence in str(refused.value)


def test_targets_that_name_no_layer_are_refused(tmp_path: Path, base: Path) -> None:
    with pytest.raises(ValueError, match=r"lora.targets names no layer of run, such as blocks\.0"):
        Trainer(made(tmp_path, base, lora={"targets": ["transformer.*"]}))
    trainer = Trainer(made(tmp_path, base, lora={"targets": ["*.adaLN_modulation.1"]}))
    assert trainer.adapted is not None
    assert len(trainer.adapted.layers) == 3


def test_the_recipe_takes_network_and_size_from_the_base(tmp_path: Path, base: Path) -> None:
    pictures = write_pictures(tmp_path / "large.npz", size=24)
    fields, choices = run_fields(None, pictures, [f"init={base}", "lora.rank=4", f"output={tmp_path}/out"])
    config = TrainConfig.model_validate(fields)
    assert config.data.size == (8, 8)
    assert config.network_config(config.open_dataset()) == Bundle.open(base).manifest.config
    assert not {"model", "diffusion", "data.size"} & {choice.field for choice in choices}

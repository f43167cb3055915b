"""A run is loaded from its newest checkpoint; a run on latents, with their normalisation and decoder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file

from ditserve.model.data.latents import INDEX
from ditserve.model.nets.autoencoder import fingerprint
from ditserve.model.nets.factory import make_network
from ditserve.model.sample import main
from ditserve.model.spec.manifest import LatentSpec
from ditserve.model.spec.network_config import network_config
from ditserve.model.train.load import load_model
from ditserve.model.train.loaded_model import LoadedModel, LoadError, save_model

SHAPE = {"patch_size": 2, "in_channels": 4, "hidden_size": 16, "depth": 1, "num_heads": 2}


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    """Write the moments of four pictures, as `python -m model.data latents` does."""
    folder = tmp_path / "latents"
    folder.mkdir()
    moments = torch.zeros(4, 2, 4, 8, 8)
    labels = {"y": torch.tensor([0, 1, 0, 1]), "s": torch.zeros(4, dtype=torch.int64)}
    save_file({"mean": moments, "log_variance": moments + 0, **labels}, folder / "00000.safetensors")
    index = {"autoencoder": "0", "picture_size": [16, 16], "size": [8, 8], "channels": 4, "groups": []}
    index |= {"names": ["cat", "dog"], "styles": [], "shards": [{"file": "00000.safetensors", "count": 4}]}
    index |= {"mean": [1.0, 2.0, 3.0, 4.0], "std": [0.5, 1.0, 1.5, 2.0]}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


@pytest.fixture
def latent_run(latents: Path, tmp_path: Path) -> Path:
    config = network_config({**SHAPE, "image_size": (8, 8), "classes": (2,), "learn_sigma": False})
    step = tmp_path / "run/checkpoints/step-0000010"
    step.mkdir(parents=True)
    save_file(dict(make_network(config).named_parameters()), step / "ema.safetensors")
    (step / "state.json").write_text('{"step": 10}')
    run_fields = {"data": {"path": str(latents)}, "model": SHAPE, "steps": 10, "output": "run"}
    run_fields["diffusion"] = {"schedule": "linear", "prediction": "epsilon", "clip_x0": False}
    (tmp_path / "run/config.json").write_text(json.dumps(run_fields))
    return tmp_path / "run"


def test_the_newest_checkpoint_is_the_one_of_most_steps(latent_run: Path) -> None:
    checkpoints = latent_run / "checkpoints"
    for name, step in (("step-9999999", 9_999_999), ("step-10000000", 10_000_000), ("step-best", 10)):
        shutil.copytree(checkpoints / "step-0000010", checkpoints / name)
        (checkpoints / name / "state.json").write_text(json.dumps({"step": step}))
    (checkpoints / "step-10000001").mkdir()  # cut short
    assert load_model(latent_run).manifest.version == "0.10000000"


def test_a_second_average_is_not_the_model(latent_run: Path) -> None:
    step = latent_run / "checkpoints/step-0000010"
    (step / "ema.safetensors").rename(step / "ema-0.9999.safetensors")
    with pytest.raises(LoadError, match="holds no readable checkpoint"):
        load_model(latent_run)


def test_a_run_on_latents_knows_its_normalisation(latent_run: Path) -> None:
    manifest = load_model(latent_run).manifest
    assert manifest.decoder == "sd-vae"
    assert manifest.latents == LatentSpec(shift=(1.0, 2.0, 3.0, 4.0), scale=(0.5, 1.0, 1.5, 2.0), factor=2)
    assert "latents" in manifest.description
    (config := json.loads((latent_run / "config.json").read_text()))["data"]["latent_scale"] = 0.18215
    (latent_run / "config.json").write_text(json.dumps(config))
    published = load_model(latent_run).manifest.latents
    assert published is not None
    assert published.shift == (0.0,) * 4
    assert published.scale == pytest.approx((1 / 0.18215,) * 4)


def test_a_run_on_latents_is_loaded_with_the_pictures_at_hand(latent_run: Path, tmp_path: Path) -> None:
    """`model.evaluate` compares with the pictures; the network's size is that of its latents."""
    x, y = np.zeros((4, 16, 16, 3), np.uint8), np.array([0, 1, 0, 1])
    np.savez(tmp_path / "pictures.npz", x=x, y=y, names=np.array(["cat", "dog"]))
    found = load_model(latent_run, data=tmp_path / "pictures.npz")
    assert found.network.config == load_model(latent_run).network.config


def test_latents_are_not_clipped(latent_run: Path) -> None:
    """Their values have no bounds: clipped to [-1, 1], pictures come out pale and soft."""
    fields = json.loads((latent_run / "config.json").read_text())
    # Earlier releases wrote what was the default for pixels into every run.
    fields["diffusion"]["clip_x0"] = True
    (latent_run / "config.json").write_text(json.dumps(fields))
    assert not load_model(latent_run).manifest.diffusion.clip_x0


def test_its_samples_are_decoded(
    latents: Path, latent_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
    ).save_pretrained(tmp_path / "vae")
    index = json.loads((latents / INDEX).read_text())
    (latents / INDEX).write_text(json.dumps(index | {"autoencoder": fingerprint(tmp_path / "vae")}))
    command = [
        str(latent_run),
        "-c",
        "label=dog",
        "--steps",
        "2",
        "--count",
        "2",
        "-o",
        str(tmp_path / "out.png"),
    ]
    assert main([*command, "--vae", str(tmp_path / "vae")]) == 0
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (32, 16)
    assert main(command) == 2
    assert "pass the folder of its autoencoder with --vae" in capsys.readouterr().err


def test_of_a_bundle_in_the_folder_of_a_run_the_newer_state_is_opened_and_told(
    latent_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An earlier release exported into the folder of the run, and the run was trained on."""
    run = load_model(latent_run)
    step = run.manifest.provenance["step"]
    capsys.readouterr()
    for made, opened in [
        (step - 1, f"the training run, at step {step}"),
        (step, f"the bundle, of step {step}"),
    ]:
        manifest = run.manifest.model_copy(update={"name": "old", "provenance": {"step": made}})
        save_model(latent_run, LoadedModel(run.network, manifest))
        loaded = load_model(latent_run)
        assert (loaded.manifest.name == "old") == (made == step)
        assert capsys.readouterr().err.endswith(f"opened {opened}\n")

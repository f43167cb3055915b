"""The recipe that pictures and the machine suggest: fitting, changeable, and kept by the run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ditserve.model.data import __main__ as data_command
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.train import recipe
from ditserve.model.train.__main__ import main
from ditserve.model.train.config import TrainConfig
from ditserve.model.train.recipe import BUDGET_S, ENOUGH_STEPS, NETWORKS, patch_size, run_fields
from tests.model.train.test_training_latents import autoencoder
from tests.model.train.training_cases import write_pictures

ROOT = Path(__file__).parents[3]
ZOO = ROOT / "model" / "zoo"
PARAMETERS = {"DiT-S": 32.96, "DiT-B": 130.51, "DiT-L": 458.10, "DiT-XL": 675.13}
RECIPES = sorted((ROOT / "model" / "train" / "recipes").glob("*.json"))


def write_folder(
    folder: Path, classes: tuple[str, ...], sides: tuple[int, ...] = (20, 40), each: int = 4
) -> Path:
    """Write `each` pictures of noise of every class, or into the folder itself for the class ""."""
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for k in range(each):
            side = sides[k % len(sides)]
            pixels = rng.integers(0, 256, (side, side + k % 2, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{k}.png")
    return folder


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Return the pictures a second by network width, 1,000 unless set, instead of measured ones."""
    rates: dict[int, float] = {}

    def rate(config: DiTConfig, batch: int, device: str) -> float:
        return rates.get(config.hidden_size, 1_000.0)

    monkeypatch.setattr(recipe, "images_per_s", rate)
    return rates


def chosen(data: Path, *overrides: str, config: Path | None = None) -> dict[str, Any]:
    """Return the fields of a run on `data` on the CPU, which make a TrainConfig with a network."""
    fields, _ = run_fields(config, data, ["device=cpu", *overrides])
    run = TrainConfig.model_validate(fields)
    run.network_config(run.open_dataset())
    return fields


def test_a_recipe_fits_the_pictures(tmp_path: Path, speed: dict[int, float]) -> None:
    fields = chosen(write_folder(tmp_path / "six pets", tuple("abcdef")), "data.hold_out=0")
    assert fields["output"] == "runs/six-pets"
    assert fields["data"]["size"] == 16  # most have 20 pixels
    assert fields["model"]["patch_size"] == 2
    assert fields["model"]["hidden_size"] == NETWORKS[0][1]  # 24 pictures teach no larger one
    assert fields["steps"] == 500 * 24 // 16
    flat = chosen(write_folder(tmp_path / "flat", ("",), sides=(90,)))
    assert (flat["data"]["size"], flat["model"]["patch_size"]) == (64, 8)
    own = chosen(write_pictures(tmp_path / "set.npz", size=28))
    assert "size" not in own["data"]
    assert own["model"]["patch_size"] == 4


def test_a_recipe_fits_the_time(
    tmp_path: Path, speed: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "NETWORKS", tuple((0, *numbers) for _, *numbers in NETWORKS))
    monkeypatch.setattr(recipe, "PASSES", 10**6)
    data = write_pictures(tmp_path / "set.npz")
    batch, enough = 12, ENOUGH_STEPS * 12 / BUDGET_S
    assert chosen(data, f"batch={batch}")["model"]["hidden_size"] == 384
    speed[384], speed[192] = enough - 1, enough + 1
    fields = chosen(data, f"batch={batch}")
    assert fields["model"]["hidden_size"] == 192
    assert fields["steps"] == int((enough + 1) * BUDGET_S / batch)
    # The smallest is taken even on a machine that is too slow for it.
    speed[64] = speed[128] = 0.1
    assert chosen(data)["steps"] == recipe.LEAST_STEPS


def test_what_is_given_stays_and_the_rest_follows_from_it(tmp_path: Path, speed: dict[int, float]) -> None:
    data = write_folder(tmp_path / "pets", ("a", "b"))
    fields = chosen(data, "data.size=24", "steps=7", "lr=0.5", "sheet_every=3")
    assert [fields[key] for key in ("steps", "lr", "sheet_every")] == [7, 0.5, 3]
    assert fields["model"]["patch_size"] == 3
    named = chosen(data, "network=DiT-S/4", "network.depth=2")
    assert named["model"] == {"name": "DiT-S/4", "depth": 2}
    unet = '{"network": "unet", "base_channels": 8, "multipliers": [1, 2], "attention": [], "head_size": 8}'
    assert chosen(data, f"network={unet}")["lr"] > 0
    latent_like = chosen(data, "diffusion.schedule=linear", "diffusion.prediction=epsilon")
    assert latent_like["diffusion"] == {"schedule": "linear", "prediction": "epsilon"}


def test_latents_get_a_recipe(tmp_path: Path, speed: dict[int, float]) -> None:
    pictures = write_pictures(tmp_path / "pictures.npz", size=16)
    vae = autoencoder(tmp_path / "vae", 0)
    command = ["latents", str(pictures), "--autoencoder", str(vae), "--out", str(tmp_path / "latents")]
    assert data_command.main(command) == 0
    fields = chosen(tmp_path / "latents")
    assert fields["diffusion"]["prediction"] == "epsilon"
    assert fields["model"]["patch_size"] == 2


def test_a_few_broken_pictures_are_left_out_and_many_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_folder(tmp_path / "pets", ("a", "b"))
    (data / "a" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    command = ["--data", str(data), "--output", str(tmp_path / "run"), "--steps", "2", "--device", "cpu"]
    assert main([*command, "--dry-run", "--set", "sheet_every=9"]) == 0
    assert "corrupt_limit" in (out := capsys.readouterr().out)
    assert "cannot be read" in out.replace("\n", "")
    assert not (tmp_path / "run").exists()
    (data / "b" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n broken too")
    assert main(command) == 2
    assert "2 pictures cannot be read" in capsys.readouterr().err


def test_a_run_goes_on_with_its_own_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_folder(tmp_path / "pets", ("a", "b"))
    command = ["--data", str(data), "--output", str(tmp_path / "run"), "--device", "cpu"]
    assert main([*command, "--steps", "2", "--set", "lr=0.25"]) == 0
    assert main([*command, "--steps", "3"]) == 0
    assert "goes on with its own recipe" in (out := capsys.readouterr().out)
    assert "resumed from" in out
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["steps"], saved["lr"]) == (3, 0.25)


@pytest.mark.parametrize("name", ["emoji64", "tiny"])
def test_recipes_of_the_zoo_train_on_other_pictures(
    name: str, tmp_path: Path, speed: dict[int, float]
) -> None:
    shipped = json.loads((ZOO / name / "train.json").read_text())
    fields = chosen(write_folder(tmp_path / "pets", ("a", "b")), config=ZOO / name / "train.json")
    assert {key: fields[key] for key in ("model", "steps", "lr")} == {
        key: shipped[key] for key in ("model", "steps", "lr")
    }
    assert fields["output"] == "runs/pets"
    assert "names" not in fields["data"]


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_shipped_recipes_are_for_latents_of_any_kind(
    file: Path, tmp_path: Path, speed: dict[int, float], capsys: pytest.CaptureFixture[str]
) -> None:
    fields = chosen(write_folder(tmp_path / "pets", ("a", "b")), config=file)
    config = TrainConfig.model_validate(fields)
    # 102.4 million pictures, as in the paper's 400,000 steps of 256.
    assert config.steps * config.batch == 400_000 * 256
    assert config.min_lr < config.lr
    # The rate of the paper for DiT-XL, and higher ones for fewer parameters.
    size = PARAMETERS[file.stem] / PARAMETERS["DiT-XL"]
    assert config.lr * math.sqrt(size) == pytest.approx(1e-4, rel=0.02)
    assert main(["--config", str(file), "--dry-run"]) == 2
    assert "--data" in capsys.readouterr().err


def test_without_data_and_configuration_it_is_said_what_to_give(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "--data FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "tokens", "patch"),
    [((64, 64), 64, 8), ((32, 32), 64, 4), ((28, 28), 64, 4), ((48, 64), 64, 8), ((31, 31), 64, 1)],
)
def test_the_patch_divides_the_picture(size: tuple[int, int], tokens: int, patch: int) -> None:
    assert patch_size(size, tokens) == patch

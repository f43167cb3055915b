"""Runs on latents: a named decoder draws their sample sheets, and a wrong one is refused at the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from ditserve.model.data import __main__ as data
from ditserve.model.sampling.sheet import STRIP
from ditserve.model.train.__main__ import main
from ditserve.model.train.load import load_model
from ditserve.model.train.training_log import read_log
from tests.model.train.training_cases import config_file, tiny_run, write_pictures


def autoencoder(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Any]:
    """Return a run on the latents of six pictures of 16×16."""
    pictures = write_pictures(tmp_path / "pictures.npz", size=16)
    command = ["latents", str(pictures), "--autoencoder", str(autoencoder(tmp_path / "vae", 0))]
    assert data.main([*command, "--out", str(tmp_path / "latents")]) == 0
    raw = tiny_run(tmp_path)
    raw["data"]["path"] = str(tmp_path / "latents")
    return {**raw, "steps": 2, "diffusion": {**raw["diffusion"], "clip_x0": False}}


def test_sheets_are_decoded(run: dict[str, Any], tmp_path: Path) -> None:
    run["vae"] = str(tmp_path / "vae")
    assert main(["--config", config_file(run, tmp_path)]) == 0
    with Image.open(tmp_path / "run" / "sheet-0000002.png") as sheet:
        assert sheet.height == 2 * (16 + STRIP)
    # No folder of this machine is told to those who get the bundle.
    assert str(tmp_path) not in load_model(tmp_path / "run").manifest.model_dump_json()


def test_without_a_decoder_it_is_said_that_there_are_no_sheets(
    run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", config_file(run, tmp_path)]) == 0
    assert "no sample sheets: vae does not name" in capsys.readouterr().out
    assert not list((tmp_path / "run").glob("sheet-*"))
    assert 0 < read_log(tmp_path / "run")[-1]["attention_entropy"] <= 1
    run |= {"steps": 3, "vae": str(tmp_path / "vae")}
    assert main(["--config", config_file(run, tmp_path)]) == 0
    assert (tmp_path / "run" / "sheet-0000003.png").is_file()


def test_a_decoder_that_cannot_be_right_is_refused_at_once(
    run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = autoencoder(tmp_path / "other", 1)
    on_pictures = {**run["data"], "path": str(tmp_path / "pictures.npz")}
    for change, message in (
        ({"vae": str(other)}, "other is not what made the latents"),
        ({"vae": str(tmp_path)}, "is not an autoencoder's folder"),
        ({"vae": str(tmp_path / "vae"), "data": on_pictures}, "works on pixels"),
    ):
        for mode in ([], ["--dry-run"]):
            assert main(["--config", config_file({**run, **change}, tmp_path), *mode]) == 2
            assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

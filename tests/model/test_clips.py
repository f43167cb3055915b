"""Clips and volumes from data to evaluation: analytic shapes, a few steps of training, sheets, figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from ditserve.model import describe, evaluate
from ditserve.model.evaluation.motion import motion, motion_errors
from ditserve.model.train import training
from ditserve.model.train.config import TrainConfig
from ditserve.model.train.load import load_model

FRAMES, SIDE = 4, 8


def ball(radius: float, centre: tuple[float, float, float]) -> npt.NDArray[np.uint8]:
    """Return a ball in a volume (FRAMES, SIDE, SIDE, 3): seen as frames, a disc that grows and shrinks."""
    places = np.stack(np.meshgrid(np.arange(FRAMES), np.arange(SIDE), np.arange(SIDE), indexing="ij"), -1)
    inside = (((places - centre) ** 2).sum(-1) <= radius**2)[..., None]
    return np.where(inside, np.array([200, 40, 40], np.uint8), np.array([255, 255, 255], np.uint8))


def write_shapes(folder: Path, card: dict[str, object]) -> Path:
    """Write six balls of two names, and a card."""
    file = folder / "shapes.npz"
    balls = [ball(radius, (1.5, 3.0 + k, 3.5)) for k in range(3) for radius in (1.5, 3.0)]
    np.savez(file, x=np.stack(balls), y=np.array([0, 1] * 3), names=np.array(["small", "large"]))
    file.with_suffix(".json").write_text(json.dumps({"licence": "CC0-1.0", **card}))
    return file


def run_config(folder: Path, data: Path, **changes: object) -> TrainConfig:
    fields = {
        "data": {"path": str(data), "hold_out": 0},
        "output": str(folder / "run"),
        "model": {
            "patch_size": 4, "hidden_size": 24, "depth": 2, "num_heads": 2, "attention": ["space", "time"]
        },
        "diffusion": {"schedule": "flow", "prediction": "flow"},
        "steps": 3, "batch": 2, "checkpoint_every": 3, "sheet_every": 3, "log_every": 1, "threads": 1,
        **changes,
    }  # fmt: skip
    return TrainConfig.model_validate(fields)


@pytest.fixture
def clip_run(tmp_path: Path) -> Path:
    """A run of three steps on clips at five frames a second."""
    data = write_shapes(tmp_path, {"first_axis": "frames", "fps": 5})
    config = run_config(tmp_path, data, stages=[{"size": 4, "steps": 1}, {"size": 8, "steps": 2}])
    training.train(config)
    return config.output


def test_a_run_on_clips_leaves_moving_sheets_and_a_model(clip_run: Path, tmp_path: Path) -> None:
    with Image.open(clip_run / "sheet-0000003.png") as sheet:
        assert (sheet.n_frames, sheet.info["duration"]) == (FRAMES, 200.0)  # type: ignore[attr-defined]
    loaded = load_model(clip_run)
    assert (loaded.manifest.first_axis, loaded.manifest.fps) == ("frames", 5.0)
    config = loaded.network.config
    # The first stage was of frames of 4×4, and its tokens stand one apart.
    assert (config.image_size, getattr(config, "base_size", None)) == ((FRAMES, 8, 8), (FRAMES, 4, 4))
    assert loaded.manifest.description.startswith("Diffusion Transformer over 4×8×8 pixels")


def test_the_motion_of_a_model_is_measured(
    clip_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "shapes.npz", tmp_path / "evaluation"
    line = [str(clip_run), "--data", str(data), "--out", str(out), "--limit", "2", "--steps", "2"]
    assert evaluate.main(line) == 0
    assert "error of the change against the real clip" in capsys.readouterr().out
    figures = json.loads((out / "evaluation.json").read_text())["figures"]
    # A ball of radius 3 changes from frame to frame, and so the still clip's error is not zero.
    assert figures["generated"]["pixel_still_error"] == pytest.approx(figures["real"]["pixel_change"])
    assert figures["real"]["pixel_change"] > 1
    with Image.open(out / "clips.webp") as sheet:
        assert sheet.n_frames == FRAMES  # type: ignore[attr-defined]


def test_a_run_on_volumes_names_their_depth(tmp_path: Path) -> None:
    config = run_config(tmp_path, write_shapes(tmp_path, {"first_axis": "depth"}), steps=1)
    training.train(config)
    manifest = load_model(config.output).manifest
    assert (manifest.first_axis, manifest.fps, manifest.config.image_size) == ("depth", None, (FRAMES, 8, 8))


def test_motion_of_clips_by_hand() -> None:
    clip = torch.zeros(1, 3, 3, 1, 1)
    # Frames of 0, 2/127.5 and 3/127.5: changes of 2 and 1 steps, which change by −1.
    clip[:, :, 1], clip[:, :, 2] = 2 / 127.5, 3 / 127.5
    assert motion(clip) == pytest.approx({"pixel_change": 1.5, "pixel_jerk": 1.0}, rel=1e-5)
    still = torch.zeros_like(clip)
    errors = {"pixel_motion_error": 1.5, "pixel_still_error": 1.5, "pixel_error": 5 / 3}
    assert motion_errors(still, clip) == pytest.approx(errors, rel=1e-5)
    assert motion_errors(clip, clip)["pixel_motion_error"] == 0
    assert "pixel_jerk" not in motion(clip[:, :, :2])


def test_a_network_that_cannot_take_the_frames_is_refused(tmp_path: Path) -> None:
    data = write_shapes(tmp_path, {"first_axis": "frames", "fps": 5})
    for changes, message in (
        ({"model": {"patch_size": [3, 4, 4]}}, "image_size 4x8x8 is not divisible by patch_size 3x4x4"),
        ({"model": {"network": "unet"}}, "image_size must be two positive numbers"),
        ({"stages": [{"size": [2, 8, 8], "steps": 3}]}, "stages.size 2x8x8 has another first axis"),
    ):
        config = run_config(tmp_path, data, **changes)
        with pytest.raises(ValueError, match=message):
            config.network_config(config.open_dataset())


def test_the_cost_of_a_clip_is_of_all_its_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "network.json"
    network = {"image_size": [4, 8, 8], "patch_size": 4, "hidden_size": 24, "depth": 2, "num_heads": 2}
    costs = {}
    for attention in ("full", "time"):
        file.write_text(json.dumps({**network, "attention": attention}))
        assert describe.main([str(file), "--json"]) == 0
        (costs[attention],) = json.loads(capsys.readouterr().out).values()
    assert costs["full"]["tokens"] == 4 * 2 * 2
    # Each token attends to 16, or to the four frames at its place.
    assert costs["full"]["attention_macs"] == 4 * costs["time"]["attention_macs"]
    assert costs["full"]["linear_macs"] == costs["time"]["linear_macs"]
    assert describe.main([str(file), "--size", "8", "8", "8", "--json"]) == 0
    (longer,) = json.loads(capsys.readouterr().out).values()
    assert longer["tokens"] == 8 * 2 * 2

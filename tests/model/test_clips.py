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
from ditserve.model.nets.dit import DiT
from ditserve.model.sampling.denoise import Conditions, Denoiser, denoise
from ditserve.model.spec.grids import even_grid, noise_levels
from ditserve.model.spec.solvers import step_table
from ditserve.model.spec.source import SourceLatent
from ditserve.model.train import training
from ditserve.model.train.config import TrainConfig
from ditserve.model.train.load import load_model
from ditserve.model.train.loaded_model import save_model
from ditserve.model.train.trainer import Trainer

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


def walk(row: int, column: int) -> npt.NDArray[np.uint8]:
    """Return a disc that walks to the right, and comes back on the left: (FRAMES, SIDE, SIDE, 3)."""
    y, x = np.mgrid[:SIDE, :SIDE]
    half = SIDE // 2
    away = [
        ((x - column - frame + half) % SIDE - half) ** 2 + ((y - row + half) % SIDE - half) ** 2
        for frame in range(FRAMES)
    ]
    inside = (np.stack(away) <= 4)[..., None]
    return np.where(inside, np.array([200, 40, 40], np.uint8), np.array([255, 255, 255], np.uint8))


@torch.no_grad()
def test_a_clip_follows_the_first_frame_that_the_network_is_told(tmp_path: Path) -> None:
    """The places of four discs are in no training clip: only the first frame tells where they walk."""
    places = [(row, column) for row in range(SIDE) for column in range(SIDE)]
    kept_out = places[5::17]
    file = tmp_path / "walks.npz"
    clips = np.stack([walk(*place) for place in places if place not in kept_out])
    np.savez(file, x=clips, y=np.zeros(len(clips), int), names=np.array(["disc"]))
    file.with_suffix(".json").write_text('{"licence": "CC0-1.0", "first_axis": "frames", "fps": 4}')
    model = {"patch_size": 4, "hidden_size": 48, "depth": 1, "num_heads": 2, "first_frame": True}
    learning = {"steps": 100, "batch": 8, "lr": 0.005, "warmup": 10, "ema": 0.98, "loss_space": "x0"}
    diffusion = {"schedule": "flow", "prediction": "x0"}
    trainer = Trainer(run_config(tmp_path, file, model=model, diffusion=diffusion, **learning))
    with torch.enable_grad():
        for _ in range(100):
            trainer.step()
    trainer.close()
    network, schedule = trainer.averaged_network(), trainer.schedule
    assert isinstance(network, DiT)
    table = step_table("ddim", noise_levels(even_grid(schedule), 8, schedule), schedule)
    put_back = torch.ones(1, FRAMES, SIDE, SIDE)
    put_back[:, 0] = 0

    def error(told: bool) -> float:
        """Return the mean squared error of the frames after the first."""
        errors = []
        for place in kept_out:
            clip = torch.from_numpy(walk(*place)).permute(3, 0, 1, 2) / 127.5 - 1
            conditions = Conditions((network.embed(torch.zeros(2, 0, dtype=torch.int64)),))
            if told:
                conditions = conditions.begun(network, clip[:, 0])
            source = SourceLatent(clip[:, :1].expand(-1, FRAMES, -1, -1), put_back)
            *_, drawn = denoise(Denoiser(network, schedule, conditions), table, [1, 2], source=source)
            assert torch.equal(drawn[0, :, 0], clip[:, 0])
            errors.append((drawn - clip)[:, :, 1:].square().mean().item())
        return float(np.mean(errors))

    assert error(told=True) < 0.7 * error(told=False)


def test_an_adapter_is_trained_with_first_frames(tmp_path: Path) -> None:
    data = write_shapes(tmp_path, {"first_axis": "frames", "fps": 5})
    model = {"patch_size": 4, "hidden_size": 24, "depth": 1, "num_heads": 2, "first_frame": True}
    config = run_config(tmp_path, data, model=model, steps=1)
    training.train(config)
    bundle = tmp_path / "bundle"
    save_model(bundle, load_model(config.output))
    fields = config.model_dump(mode="json", include={"data", "steps", "batch", "threads"})
    adapted = {**fields, "init": str(bundle), "lora": {"rank": 2}, "output": str(tmp_path / "adapter")}
    trainer = Trainer(TrainConfig.model_validate(adapted))
    batch = trainer.next_batch()
    assert batch.first_frame is not None
    _, terms = trainer.losses(batch)
    trainer.close()
    assert torch.isfinite(terms["loss"])


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
        (
            {"model": {"first_frame": True}, "stages": [{"size": 4, "steps": 1}, {"size": 8, "steps": 2}]},
            "model.first_frame fixes the picture size: train without it, or without stages",
        ),
    ):
        config = run_config(tmp_path, data, **changes)
        with pytest.raises(ValueError, match=message):
            config.network_config(config.open_dataset())


def test_first_frames_are_of_clips_and_of_plain_runs(tmp_path: Path) -> None:
    data = write_shapes(tmp_path, {"first_axis": "depth"})
    config = run_config(tmp_path, data, model={"patch_size": 4, "first_frame": True})
    with pytest.raises(ValueError, match=r"model\.first_frame is for clips, and the data are volumes"):
        config.network_config(config.open_dataset())
    refused: list[tuple[dict[str, object], str]] = [
        ({"first_frame_given": 0.5}, "first_frame_given needs model.first_frame: set it true"),
        (
            {"model": {"first_frame": True}, "parallel": {"pipeline": 2}, "accumulate": 2},
            "a model with first_frame is trained without distillation and pipeline",
        ),
    ]
    for changes, message in refused:
        with pytest.raises(ValueError, match=message):
            run_config(tmp_path, data, **changes)


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

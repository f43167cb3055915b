"""A bundle that draws clips: exported whole, opened again, drawn from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from ditserve.model import sample
from ditserve.model.nets.dit import DiT
from ditserve.model.sampling.denoise import Conditions
from ditserve.model.spec.bundle import GOLDEN, Bundle


def frames_of(file: Path) -> list[tuple[int, int]]:
    with Image.open(file) as picture:
        sizes = []
        for k in range(getattr(picture, "n_frames", 1)):
            picture.seek(k)
            sizes.append(picture.size)
            assert picture.info.get("duration") in (None, 125, 125.0)
        return sizes


def test_a_clip_bundle_says_what_it_draws(clip_bundle: Path) -> None:
    manifest = Bundle.open(clip_bundle).manifest
    assert (manifest.first_axis, manifest.fps, manifest.config.image_size) == ("frames", 8.0, (4, 16, 16))
    # A golden image is a picture, and there is none of a clip.
    assert manifest.golden is None
    assert GOLDEN not in manifest.files


def test_a_clip_bundle_is_sampled_to_a_moving_sheet(
    clip_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = ["-c", "label=circle,style=flat", "--count", "2", "--steps", "2"]
    for name, size, frames in (
        ("own.webp", [], 4),
        ("longer.png", ["--size", "6", "16", "32"], 6),
        ("windows.webp", ["--size", "6", "16", "16", "--windows"], 6),
    ):
        file = tmp_path / name
        assert sample.main([str(clip_bundle), *drawn, *size, "-o", str(file)]) == 0
        width = 64 if name == "longer.png" else 32
        assert frames_of(file) == [(width, 16)] * frames
        assert f"({width}×16, {frames} frames)" in capsys.readouterr().out


def test_a_first_frame_stays(clip_bundle: Path, tmp_path: Path) -> None:
    first, file = tmp_path / "first.png", tmp_path / "clip.webp"
    Image.new("RGB", (16, 16), (255, 128, 0)).save(first)
    drawn = [str(clip_bundle), "-c", "label=star", "--count", "1", "--steps", "2", "-o", str(file)]
    assert sample.main([*drawn, "--image", str(first)]) == 0
    with Image.open(file) as clip:
        colours = []
        for k in range(4):
            clip.seek(k)
            colours.append(clip.convert("RGB").getcolors())
    assert colours[0] == [(256, (255, 128, 0))]
    assert all(colours[k] != colours[0] for k in (1, 2, 3))
    # A clip of the same frames is what a clip starts from.
    assert sample.main([*drawn, "--image", str(file), "--strength", "0.5"]) == 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], True),
        (["--size", "6", "16", "16"], True),
        (["--size", "4", "16", "32"], False),
        (["--size", "6", "16", "16", "--windows"], False),
    ],
)
def test_the_network_is_told_a_first_frame_of_its_own_size(
    clip_bundle: Path,
    tmp_path: Path,
    options: list[str],
    told: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frames, begun = [], Conditions.begun

    def record(conditions: Conditions, network: DiT, frame: Tensor) -> Conditions:
        frames.append(frame)
        return begun(conditions, network, frame)

    monkeypatch.setattr(Conditions, "begun", record)
    first = tmp_path / "first.png"
    Image.new("RGB", (16, 16), (255, 0, 0)).save(first)
    drawn = ["-c", "label=star", "--count", "1", "--steps", "1", "-o", str(tmp_path / "clip.webp")]
    assert sample.main([str(clip_bundle), *drawn, "--image", str(first), *options]) == 0
    assert len(frames) == told
    assert all(torch.equal(frame[:, 0, 0], torch.tensor([1.0, -1.0, -1.0])) for frame in frames)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "16", "16"], "--size takes (frames or depth, height, width) of this model"),
        (["--size", "4", "16", "18"], "size 4x16x18 is not a multiple of the patch 4"),
        (["--windows", "--size", "2", "16", "16"], "a latent of 2x16x16 has no window of 4x16x16"),
        (["-o", "clip.jpg"], "clips are written to .png or .webp files, not clip.jpg"),
        (["--image", "two.webp"], "two.webp has 2 frames, and a clip here has 4"),
        (["--image", "two.webp", "--mask", "two.webp"], "--mask is for models of pictures: leave it out"),
    ],
)
def test_bad_options_are_one_sentence(
    clip_bundle: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save("two.webp", save_all=True, append_images=frames[1:])
    assert sample.main([str(clip_bundle), "-c", "label=star", "--steps", "1", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1

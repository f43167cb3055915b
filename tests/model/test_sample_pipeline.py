"""The command `model.sample` on imported pipelines: the picture is the pipeline's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ditserve.model.sample import main
from ditserve.model.sampling.sheet import to_pixels
from ditserve.model.spec.pipeline_bundle import write_pipeline_bundle
from ditserve.model.spec.pipeline_folder import read_pipeline
from tests.tiny_pipelines import expected_latents, expected_pictures, save_pipeline, tokens

ASKED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "sd3": (
        ["--negative-prompt", "blurry", "--scale", "3"],
        {"negative_prompt": "blurry", "guidance_scale": 3.0},
    ),
    "flux": (["--scale", "2.5"], {"guidance_embedded": 2.5}),
    # Guided by a norm, and with words of its own before a prompt; counted from 0.
    "lumina2": ([], {"guidance_scale": 4.0}),
    "z_image": (["--scale", "2"], {"guidance_scale": 2.0}),
}


def bundle_of(family: str, folder: Path) -> tuple[Any, Path]:
    """Write the tiny pipeline of a family and its bundle; return it and the folder of the bundle."""
    pipeline = save_pipeline(family, folder / "pipeline")
    size, limit = (8, 8), tokens(family)
    found = read_pipeline(folder / "pipeline", name="tiny", licence="x", size=size, tokens=limit)
    write_pipeline_bundle(found, folder / "bundle")
    return pipeline, folder / "bundle"


@pytest.mark.parametrize("family", ASKED)
def test_the_picture_of_a_prompt_is_that_of_the_pipeline(family: str, tmp_path: Path) -> None:
    pipeline, bundle = bundle_of(family, tmp_path)
    options, fields = ASKED[family]
    command = [str(bundle), "--prompt", "a red fox", "--steps", "3", "--seed", "5", "--count", "2", *options]
    assert main([*command, "-o", str(tmp_path / "out.png")]) == 0
    with Image.open(tmp_path / "out.png") as opened:
        drawn = np.asarray(opened).astype(int)
    for k in range(2):
        latent = expected_latents(family, pipeline, side=8, prompt="a red fox", steps=3, seed=5 + k, **fields)
        expected = to_pixels(expected_pictures(pipeline, torch.from_numpy(latent)[None]))[0]
        width = expected.shape[1]
        assert np.abs(drawn[:, k * width : (k + 1) * width] - expected).max() <= 1


def test_a_guidance_scale_below_1_is_none_as_in_the_pipeline(sd3: Path, tmp_path: Path) -> None:
    pictures = []
    for scale in ("0", "1", "2"):
        command = [str(sd3), "-p", "a cat", "--steps", "2", "--count", "1", "--scale", scale]
        assert main([*command, "-o", str(tmp_path / "out.png")]) == 0
        pictures.append((tmp_path / "out.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "tiny draws from texts: say what with --prompt"),
        (["-p", "a " * 40], "the text that begins 'a a a a a a a a a a a a a a a a a a a a ' has"),
        (["-p", "a cat", "--negative-prompt", "a " * 40], "tokens, and this model takes 12: shorten it"),
        (["-p", "a cat", "--vae", "x"], "--vae is not for an imported pipeline"),
        (["-p", "a cat", "--encoder", "minilm"], "--encoder is not for an imported pipeline"),
        (["-p", "a cat", "--size", "7", "8"], "image_size 7x8 is not divisible by patch_size 2"),
        (["-p", "a cat", "--size", "32", "8"], "is beyond largest_side 24"),
        (["-c", "label=cat"], "the model has no factor 'label'"),
        (["-p", "a cat", "-p", "the moon", "--combine", "layers"], "choose --combine compose"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_sentence(
    sd3: Path, options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(sd3), *options, "-o", str(tmp_path / "out.png")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("model.sample: ")
    assert sentence in line
    assert not (tmp_path / "out.png").exists()


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_of("sd3", tmp_path_factory.mktemp("sd3"))[1]

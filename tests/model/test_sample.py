"""The command `model.sample`: from a bundle or a training run to a picture, and its refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ditserve.model.nets.dit import DiT
from ditserve.model.sample import main
from ditserve.model.sampling.sheet import STRIP
from ditserve.model.spec.bundle import Bundle, write_manifest
from ditserve.model.spec.diffusion_spec import DiffusionSpec
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.manifest import Factor, Manifest
from ditserve.model.spec.sigma_grids import DynamicShift, SigmaGrid
from ditserve.model.train.load import load_model
from ditserve.model.train.loaded_model import LoadError
from tests.model.conftest import write_bundle

Tiny = Callable[..., DiTConfig]
Make = Callable[..., DiT]
FACTORS = (
    Factor(name="label", classes=("cat", "dog", "fox", "owl", "bee")),
    Factor(name="style", classes=("flat", "shaded", "line")),
)


def size_of(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as opened:
        return opened.size


@pytest.fixture
def finished_run(network: Make, tiny: Tiny, tmp_path: Path) -> Path:
    """The folder of a training run, as the trainer leaves it."""
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "set.npz",
        x=rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8),
        y=np.arange(5),
        names=np.array(FACTORS[0].classes),
    )
    shape = {
        "patch_size": 2,
        "in_channels": 3,
        "hidden_size": 32,
        "depth": 3,
        "num_heads": 2,
        "learn_sigma": False,
    }
    folder = tmp_path / "run"
    step = folder / "checkpoints/step-0000010"
    step.mkdir(parents=True)
    # A checkpoint that is still being written: the one before it is used.
    (step.parent / "step-0000020").mkdir()
    save_file(dict(network(tiny(classes=(5,))).named_parameters()), step / "ema.safetensors")
    (step / "state.json").write_text('{"step": 10}')
    config = {"data": {"path": str(tmp_path / "set.npz")}, "model": shape, "steps": 10, "output": "run"}
    config["diffusion"] = {"schedule": "cosine", "prediction": "x0"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_command_line_on_a_bundle(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep/out.png"
    command = [str(bundle), "-c", "label=fox,style=flat", "-c", "label=cat", "--count", "3", "-o", str(out)]
    assert main([*command, "--combine", "layers", "--progress"]) == 0
    assert size_of(out) == (24, 8)
    printed = capsys.readouterr().out
    assert f"wrote {out} (24×8)" in printed
    first = out.read_bytes()
    assert main([*command, "--combine", "layers", "--seed", "1"]) == 0
    assert out.read_bytes() != first


@pytest.mark.parametrize("how", ["linear", "spherical", "compose", "layers"])
def test_command_line_on_a_unet(unet_bundle: Path, tmp_path: Path, how: str) -> None:
    out = tmp_path / "out.png"
    command = [str(unet_bundle), "-c", "label=fox", "-c", "label=cat,weight=2", "--combine", how]
    assert main([*command, "--size", "8", "16", "-o", str(out), "--count", "2"]) == 0
    assert size_of(out) == (32, 8)
    with pytest.raises(LoadError, match="tiny is a U-Net, and this is for a DiT"):
        _ = load_model(unet_bundle).dit


def test_command_line_without_condition_makes_a_sheet(bundle: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "sheet.png")
    assert main([str(bundle), "-o", out, "--solver", "ddpm", "--steps", "2", "--size", "16", "8"]) == 0
    width, height = size_of(Path(out))
    # A cell is as wide as the longest caption.
    assert (width % 5, height) == (0, 3 * (16 + STRIP))
    assert width > 5 * 8


def test_a_larger_picture_in_windows(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "wide.png"
    command = [str(bundle), "-c", "label=fox", "--count", "1", "--steps", "2", "-o", str(out)]
    pictures = []
    # A size that is no multiple of the patch is possible in windows only.
    for size, windows in (("20", ["--windows"]), ("21", ["--windows"]), ("20", [])):
        assert main([*command, "--size", "11" if windows else "12", size, *windows]) == 0
        pictures.append(out.read_bytes())
        assert size_of(out) == (int(size), 11 if windows else 12)
    assert len(set(pictures)) == 3
    # At the model's own size there is one window, the picture.
    own = []
    for windows in ([], ["--windows"]):
        assert main([*command, "--size", "8", "8", *windows]) == 0
        own.append(out.read_bytes())
    assert own[0] == own[1]


def test_windows_of_a_flow_walk_the_grid_of_the_models_own_size(bundle: Path, tmp_path: Path) -> None:
    """A shift that follows from the size is that of a window, as in the service, not that of the picture."""
    manifest = Bundle.open(bundle).manifest
    defaults = manifest.defaults.model_copy(update={"solver": "euler", "grid": "uniform"})
    dynamic = DynamicShift()
    pictures = {}
    for name, grid in {
        "dynamic": SigmaGrid(dynamic=dynamic, tokens=256),
        "static": SigmaGrid(shift=dynamic.shift(256, 3)),
    }.items():
        flow = DiffusionSpec(schedule="flow", prediction="flow", sigma_grid=grid)
        write_manifest(bundle, manifest.model_copy(update={"diffusion": flow, "defaults": defaults}))
        command = [str(bundle), "-c", "label=fox", "--count", "1", "--steps", "3", "--size", "8", "24"]
        for windows in ([], ["--windows"]):
            assert main([*command, *windows, "-o", str(tmp_path / "out.png")]) == 0
            pictures[name, bool(windows)] = (tmp_path / "out.png").read_bytes()
    assert pictures["dynamic", True] == pictures["static", True]
    assert pictures["dynamic", False] != pictures["static", False]


def test_a_picture_to_start_from_and_the_part_of_it_that_is_repainted(bundle: Path, tmp_path: Path) -> None:
    random, out = np.random.default_rng(0), tmp_path / "out.png"
    pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    mask[:4] = 255
    Image.fromarray(pixels).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    command = [str(bundle), "-c", "label=fox", "--count", "1", "--steps", "5", "-o", str(out)]

    def drawn(*more: str) -> npt.NDArray[np.int16]:
        assert main([*command, *more]) == 0
        with Image.open(out) as picture:
            return np.asarray(picture).astype(np.int16)

    edit = ["--image", str(tmp_path / "image.png")]
    np.testing.assert_array_equal(drawn(*edit, "--strength", "1"), drawn())
    repainted = drawn(*edit, "--mask", str(tmp_path / "mask.png"), "--strength", "0.5")
    np.testing.assert_array_equal(repainted[4:], pixels[4:])
    assert np.abs(repainted - pixels)[:4].max() > 0


def test_command_line_on_a_run(finished_run: Path, tmp_path: Path) -> None:
    assert main([str(finished_run), "-c", "label=owl", "--steps", "2", "-o", str(tmp_path / "out.png")]) == 0
    opened = load_model(finished_run)
    assert opened.manifest.factors[0].classes == FACTORS[0].classes
    assert opened.dit.config.classes == (5,)
    (finished_run / "checkpoints/step-0000010/ema.safetensors").unlink()
    with pytest.raises(LoadError, match="no readable checkpoint"):
        load_model(finished_run)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "neither a bundle"),
        (["BUNDLE", "-c", "label=dgo"], "did you mean dog"),
        (["BUNDLE", "-c", "label=cat", "-c", "label=fox,weight=-1"], "sum to more than 0"),
        (["BUNDLE", "--count", "3"], "--count is of a condition"),
        (["BUNDLE", "--steps", "2000"], r"steps must be in 1..1000"),
        (["BUNDLE", "--solver", "magic"], "solver must be one of"),
        (["BUNDLE", "--size", "7", "8"], "not a multiple of the patch"),
        (["BUNDLE", "--interval", "0.5", "0.2"], "interval"),
        (["BUNDLE", "-c", "text=a fox"], "takes no text"),
        (["BUNDLE", "--negative-prompt", "fog"], "takes no text"),
        (["BUNDLE", "--windows", "--size", "6", "8"], "has no window"),
        (["RUN", "--data", "absent.npz"], "absent.npz does not exist"),
        (["BROKEN"], "not the configuration of a training run"),
        (["BUNDLE", "--mask", "RUN"], "--mask needs a picture to start from"),
        (["BUNDLE", "--image", "RUN", "--strength", "0"], "--strength must be above 0"),
        (["BUNDLE", "--image", "RUN"], "is no picture that can be read"),
    ],
)
def test_errors_are_one_sentence(
    bundle: Path,
    finished_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text('{"model": 3}')
    paths = {"BUNDLE": str(bundle), "RUN": str(finished_run), "BROKEN": str(tmp_path / "broken")}
    command = [paths.get(argument, argument) for argument in arguments]
    assert main([*command, "-o", str(tmp_path / "out.png")]) == 2
    captured = capsys.readouterr().err
    assert message.replace("\\", "") in captured
    assert captured.strip().count("\n") == 0
    assert captured.startswith("model.sample: ")


class Counting:
    """A text encoder of three numbers a sentence."""

    size = 3

    def encode(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        return np.array([[len(text), text.count("o"), 1.0] for text in sentences], np.float32)


def test_a_negative_prompt_is_what_guidance_subtracts(network: Make, tiny: Tiny, tmp_path: Path) -> None:
    bundle, out = write_bundle(network(tiny(text_size=3)), tmp_path / "words"), tmp_path / "out.png"
    encoder = f"{__name__}:Counting"
    pictures = []
    for more in ([], ["--negative-prompt", "fog"], ["--negative-prompt", "fog", "--scale", "1"]):
        for condition in (["-c", "text=a fox", "--count", "1"], ["--columns", "5"]):
            command = [str(bundle), "--encoder", encoder, "-o", str(out), "--steps", "2", *condition, *more]
            assert main(command) == 0
            pictures.append(out.read_bytes())
    one, sheet, one_against, sheet_against, one_unguided, _ = pictures
    assert one != one_against != one_unguided
    assert sheet != sheet_against


def test_a_file_of_prompts_is_a_sheet_of_pictures_that_each_prompt_alone_gives(
    network: Make, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, out, file = (
        write_bundle(network(tiny(text_size=3)), tmp_path / "words"),
        tmp_path / "o.png",
        tmp_path / "p",
    )
    command = [str(bundle), "--encoder", f"{__name__}:Counting", "-o", str(out), "--steps", "2"]
    file.write_text("a fox\n\na long long green owl\n")
    sheet = [*command, "--prompts", str(file)]
    assert main([*sheet, "--count", "2"]) == 0
    with Image.open(out) as opened:
        pixels = np.asarray(opened)
    # Two rows of two pictures, each in a cell as wide as its caption and above it.
    assert pixels.shape[0] == 2 * (8 + STRIP)
    left = (pixels.shape[1] // 2 - 8) // 2
    for row, prompt in enumerate(("a fox", "a long long green owl")):
        assert main([*command, "-p", prompt, "--count", "1", "--seed", str(2 * row)]) == 0
        with Image.open(out) as opened:
            alone = np.asarray(opened)
        top = row * (8 + STRIP)
        np.testing.assert_array_equal(pixels[top : top + 8, left : left + 8], alone)
    file.write_text(" \n")
    assert main(sheet) == 2
    assert "has no prompt: write one a line" in capsys.readouterr().err
    assert main([*sheet, "-p", "a fox"]) == 2
    assert "--prompts is a sheet of its own" in capsys.readouterr().err


def test_a_model_without_guidance_is_not_guided(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = Bundle.open(bundle).manifest
    defaults = manifest.defaults.model_copy(update={"guidance_scale": 1.0})
    write_manifest(bundle, manifest.model_copy(update={"guidance": "none", "defaults": defaults}))
    command = [str(bundle), "-c", "label=fox", "-o", str(bundle.parent / "out.png"), "--scale"]
    assert main([*command, "2"]) == 2
    assert "it has no guidance: leave --scale out" in capsys.readouterr().err
    assert main([*command, "1"]) == 0


def test_weights_that_do_not_fit_are_listed(bundle: Path, network: Make) -> None:
    state = dict(network().state_dict())
    state["x_embedder.proj.bias"] = torch.zeros(3)
    save_file(state, bundle / "weights.safetensors")
    from_manifest = json.loads((bundle / "manifest.json").read_text())
    write_manifest(bundle, Manifest.model_validate(from_manifest))
    with pytest.raises(LoadError, match=r"wrong shape \(1\): x_embedder.proj.bias \(3,\) instead of \(32,\)"):
        load_model(bundle)

"""Sampling offline: pictures, conditions as they are written, and the command line."""

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

from ditserve.model.nets.autoencoder import Identity
from ditserve.model.nets.dit import DiT
from ditserve.model.sample import main
from ditserve.model.sampling.prompt import PromptTerm, SampleError, embed_terms, parse_condition
from ditserve.model.sampling.sheet import picture_grid, sample_sheet, sheet_labels, to_pixels
from ditserve.model.spec.bundle import Factor, Manifest, write_manifest
from ditserve.model.spec.diffusion import Schedule, make_schedule
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.train.load import load_model
from ditserve.model.train.loaded_model import LoadError

Tiny = Callable[..., DiTConfig]
Make = Callable[..., DiT]
FACTORS = (
    Factor(name="label", classes=("cat", "dog", "fox", "owl", "bee")),
    Factor(name="style", classes=("flat", "shaded", "line")),
)


def size_of(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as opened:
        return opened.size


class CountingEncoder:
    """Three numbers about a sentence; stands in for a language model."""

    size = 3

    def encode(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        return np.array([[len(each), each.count(" ") + 1, 1] for each in sentences], np.float32)


@pytest.fixture
def schedule() -> Schedule:
    return make_schedule("cosine", prediction="x0")


@pytest.fixture
def finished_run(network: Make, tiny: Tiny, tmp_path: Path) -> Path:
    """A training run's folder as the trainer leaves it."""
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
    (step.parent / "step-0000020").mkdir()  # being written: the one before it is used
    save_file(dict(network(tiny(classes=(5,))).named_parameters()), step / "ema.safetensors")
    (step / "state.json").write_text('{"step": 10}')
    config = {"data": {"path": str(tmp_path / "set.npz")}, "model": shape, "steps": 10, "output": "run"}
    config["diffusion"] = {"schedule": "cosine", "prediction": "x0"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_pixels_and_picture_grid() -> None:
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).reshape(5, 1, 1, 1).expand(5, 3, 2, 2)
    pixels = to_pixels(x)
    assert pixels[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]
    picture = np.asarray(picture_grid(pixels, 3))
    assert picture.shape == (4, 6, 3)
    assert picture[0, ::2, 0].tolist() == [0, 0, 128]
    assert picture[2, ::2, 0].tolist() == [255, 255, 255]  # the last is padding


def test_class_sheets() -> None:
    assert sheet_labels((3, 2)) == ([(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)], 3)
    assert sheet_labels((100,), 4) == ([(0,), (25,), (50,), (75,)], 4)
    assert sheet_labels((2, 1, 9)) == ([(0, 0, None), (1, 0, None)], 2)
    assert sheet_labels((), 2) == ([(), ()], 2)


def test_sheet_of_a_model(network: Make, schedule: Schedule) -> None:
    assert sample_sheet(network(), schedule, Identity(), steps=2).size == (5 * 8, 3 * 8)


def test_conditions_are_parsed() -> None:
    assert parse_condition("", FACTORS) == PromptTerm((None, None))
    assert parse_condition("style=line,label=fox,weight=0.5", FACTORS) == PromptTerm((2, 2), None, 0.5)
    assert parse_condition("text=a fox, in snow,label=fox", FACTORS) == PromptTerm(
        (2, None), "a fox, in snow"
    )
    for text, message in (
        ("colour=red", "no factor 'colour'; it has label, style"),
        ("label=caat", r"no class 'caat'; did you mean cat"),
        ("label=zzzzz", "for example cat, dog, fox"),
        ("label=cat,weight=much", "not a number"),
    ):
        with pytest.raises(SampleError, match=message):
            parse_condition(text, FACTORS)


def test_text_goes_through_the_named_encoder(
    tiny: Tiny, network: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditserve.model.sampling.prompt.open_encoder", lambda name: CountingEncoder())
    dit = network(tiny(text_size=3))
    terms = [PromptTerm((1, None), "a fox"), PromptTerm((1, None))]
    with_text, without = embed_terms(dit, terms, "counting")
    labels = torch.tensor([[1, 3]])
    assert torch.allclose(with_text, dit.embed(labels, torch.tensor([[5.0, 2.0, 1.0]]))[0])
    assert torch.allclose(without, dit.embed(labels)[0])
    with pytest.raises(SampleError, match="gives 3 numbers, the model takes 7"):
        embed_terms(network(tiny(text_size=7)), terms, "counting")
    with pytest.raises(SampleError, match="takes no text"):
        embed_terms(network(), terms, "counting")


def test_command_line_on_a_bundle(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep/out.png"
    command = [str(bundle), "-c", "label=fox,style=flat", "-c", "label=cat", "--count", "3", "-o", str(out)]
    assert main([*command, "--combine", "layers", "--progress"]) == 0
    assert size_of(out) == (24, 8)
    told = capsys.readouterr().out
    assert f"wrote {out} (24×8)" in told
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
    assert size_of(Path(out)) == (5 * 8, 3 * 16)


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
        (["BUNDLE", "--steps", "2000"], r"steps must be in 1..1000"),
        (["BUNDLE", "--solver", "magic"], "solver must be one of"),
        (["BUNDLE", "--size", "7", "8"], "not a multiple of the patch"),
        (["BUNDLE", "--interval", "0.5", "0.2"], "interval"),
        (["BUNDLE", "-c", "text=a fox"], "takes no text"),
        (["RUN", "--data", "absent.npz"], "absent.npz does not exist"),
        (["BROKEN"], "not the configuration of a training run"),
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
    places = {"BUNDLE": str(bundle), "RUN": str(finished_run), "BROKEN": str(tmp_path / "broken")}
    command = [places.get(argument, argument) for argument in arguments]
    assert main([*command, "-o", str(tmp_path / "out.png")]) == 2
    captured = capsys.readouterr().err
    assert message.replace("\\", "") in captured
    assert captured.strip().count("\n") == 0
    assert captured.startswith("model.sample: ")


def test_weights_that_do_not_fit_are_listed(bundle: Path, network: Make) -> None:
    state = dict(network().state_dict())
    state["x_embedder.proj.bias"] = torch.zeros(3)
    save_file(state, bundle / "weights.safetensors")
    from_manifest = json.loads((bundle / "manifest.json").read_text())
    write_manifest(bundle, Manifest.model_validate(from_manifest))
    with pytest.raises(LoadError, match=r"wrong shape \(1\): x_embedder.proj.bias \(3,\) instead of \(32,\)"):
        load_model(bundle)

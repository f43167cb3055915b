"""Import and export of files: layouts that are read, code that is never run, and the command line."""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from ditserve.model.convert import main
from ditserve.model.nets.dit import DiT
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.weights.imported import ImportOptions
from ditserve.model.weights.imports import read_weights
from ditserve.model.weights.official import WeightsError, to_official
from ditserve.model.weights.state_files import read_state

Make = Callable[..., DiT]
PLAIN = DiTConfig(image_size=(8, 8), hidden_size=16, depth=2, num_heads=2, classes=(5,))
# Facts of the small model that its file does not tell.
KNOWN = ImportOptions(num_heads=2, num_classes=5, predicts_noise=True)
BRING = ["import", "--licence", "MIT", "--heads", "2", "--num-classes", "5", "--predicts-noise"]


@pytest.fixture
def official(network: Make, tmp_path: Path) -> Path:
    """A published file of a small model, as the release is: a bare state dict."""
    torch.save(to_official(network(PLAIN).state_dict(), PLAIN), tmp_path / "dit.pt")
    return tmp_path / "dit.pt"


def test_training_checkpoint_gives_its_average(network: Make, tmp_path: Path) -> None:
    """The file of the published trainer has model, ema, opt and a pickled Namespace."""
    ema, raw = (to_official(network(PLAIN, seed).state_dict(), PLAIN) for seed in (1, 2))
    stored = {"model": raw, "ema": ema, "opt": {"state": {}}, "args": argparse.Namespace(lr=1e-4)}
    torch.save(stored, tmp_path / "0400000.pt")
    assert torch.equal(
        read_state(tmp_path / "0400000.pt").tensors["x_embedder.proj.bias"], ema["x_embedder.proj.bias"]
    )
    torch.save({"model": raw}, tmp_path / "model.pt")
    assert torch.equal(
        read_state(tmp_path / "model.pt").tensors["x_embedder.proj.bias"], raw["x_embedder.proj.bias"]
    )


class Trap:
    """An object that an attacker pickles: loading it would write a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return Path.touch, (str(self.mark),)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    torch.save({"weight": Trap(tmp_path / "mark")}, tmp_path / "trap.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Trap(tmp_path / "mark"), protocol=2))
    for name in ("trap.pt", "plain.pt"):
        with pytest.raises(WeightsError, match=f"{name} cannot be read"):
            read_state(tmp_path / name)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["broken.pt", "broken.safetensors", "absent.pt", "absent.safetensors"])
def test_unreadable_files(tmp_path: Path, name: str) -> None:
    if name.startswith("broken"):
        (tmp_path / name).write_bytes(b"not weights")
    with pytest.raises(WeightsError, match=f"{name} cannot be read"):
        read_state(tmp_path / name)


def test_files_without_tensors(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "epoch.pt")
    with pytest.raises(WeightsError, match="must map names to tensors"):
        read_state(tmp_path / "epoch.pt")


@pytest.mark.parametrize("layout", ["model folder", "pipeline folder", "weights file", "bin"])
def test_diffusers_layouts(network: Make, official: Path, tmp_path: Path, layout: str) -> None:
    weights = read_weights(official, KNOWN).weights
    main([*BRING, str(official), str(tmp_path / "bundle")])
    folder = tmp_path / ("pipeline/transformer" if layout == "pipeline folder" else "model")
    assert main(["export", str(tmp_path / "bundle"), str(folder), "--to", "diffusers"]) == 0
    source = {
        "pipeline folder": folder.parent,
        "weights file": folder / "diffusion_pytorch_model.safetensors",
    }
    if layout == "bin":
        file = folder / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    options = ImportOptions(function="published", predicts_noise=True)
    again = read_weights(source.get(layout, folder), options)
    assert again.config == PLAIN
    assert all(torch.equal(again.weights[name], weights[name]) for name in weights)


def test_exported_folder_opens_in_diffusers(official: Path, tmp_path: Path) -> None:
    main([*BRING, str(official), str(tmp_path / "bundle")])
    main(["export", str(tmp_path / "bundle"), str(tmp_path / "out"), "--to", "diffusers"])
    model = DiTTransformer2DModel.from_pretrained(tmp_path / "out")
    assert model.config.num_embeds_ada_norm == 5


def test_import_makes_a_bundle_and_export_gives_the_file_back(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "names.txt").write_text("cat\ndog\nfox\nowl\nbee\n")
    command = [*BRING, str(official), str(tmp_path / "small dit"), "--licence", "CC-BY-NC-4.0"]
    assert main([*command, "--classes", str(tmp_path / "names.txt")]) == 0
    assert "M parameters" in capsys.readouterr().out
    bundle = Bundle.open(tmp_path / "small dit")
    assert bundle.manifest.config == PLAIN
    assert bundle.manifest.name == "small-dit"
    assert bundle.manifest.factors[0].classes == ("cat", "dog", "fox", "owl", "bee")
    assert bundle.manifest.licence == "CC-BY-NC-4.0"
    assert bundle.manifest.diffusion.guidance_channels == 3
    assert main(["export", str(tmp_path / "small dit"), str(tmp_path / "back.pt"), "--to", "official"]) == 0
    before, after = (read_state(file).tensors for file in (official, tmp_path / "back.pt"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "absent.pt", "out", "--licence", "MIT"], "absent.pt does not exist"),
        (["import", "dit.pt", "out", "--licence", "MIT"], "heads must be given"),
        (["import", "empty", "out", "--licence", "MIT"], "holds no diffusion_pytorch_model"),
        (
            ["import", "dit.pt", "out", "--licence", "MIT", "--heads", "2", "--classes", "two"],
            "has 6 rows, and 2 classes with the null class need 3",
        ),
        (["export", "absent", "out.pt", "--to", "official"], "absent is not a bundle"),
    ],
)
def test_errors_are_one_sentence(
    official: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text("{}")
    (tmp_path / "two").write_text("cat\ndog")
    assert main(arguments) == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert captured.startswith("model.convert: ")
    assert captured.count("\n") == 1


def test_a_unet_has_no_other_layout(
    unet_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(unet_bundle), str(tmp_path / "out.pt"), "--to", "official"]) == 2
    assert "holds a U-Net: the layouts are those of a DiT" in capsys.readouterr().err


def test_damaged_diffusers_configuration(network: Make, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    save_file({"a": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(WeightsError, match=r"config\.json cannot be read"):
        read_weights(tmp_path, ImportOptions())
    (tmp_path / "config.json").write_text(json.dumps({"sample_size": PLAIN.image_size[0]}))
    with pytest.raises(WeightsError, match="missing"):
        read_weights(tmp_path, ImportOptions(function="published"))

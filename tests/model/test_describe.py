"""The command `model.describe`: the paper's tables, configurations of every kind, and refusals."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ditserve.model.describe import main, paper, read_config
from ditserve.model.nets.cost import cost, macs
from ditserve.model.nets.factory import make_network
from ditserve.model.spec.dit_config import DiTConfig, published_config
from ditserve.model.spec.unet_config import UNetConfig

# arXiv:2212.09748, Tables 1, 4 and 8 ("Gflops", which are multiply-adds)
GMACS = {
    "DiT-S/8": 0.36,
    "DiT-S/4": 1.41,
    "DiT-S/2": 6.06,
    "DiT-B/8": 1.42,
    "DiT-B/4": 5.56,
    "DiT-B/2": 23.01,
    "DiT-L/8": 5.01,
    "DiT-L/4": 19.70,
    "DiT-L/2": 80.71,
    "DiT-XL/8": 7.39,
    "DiT-XL/4": 29.05,
    "DiT-XL/2": 118.64,
    "DiT-XL/2 512px": 524.60,
    "DiT-XL/2 adaln": 118.56,
    "DiT-XL/2 cross_attention": 137.62,
    "DiT-XL/2 in_context": 119.37,
}


@pytest.mark.parametrize("name", GMACS)
def test_multiply_adds_of_the_paper(name: str) -> None:
    config = paper()[name]
    with torch.device("meta"):
        row = (
            torch.empty(1, 4, *config.image_size),
            torch.empty(1),
            torch.empty(1, 1, dtype=torch.int64),
            None,
        )
        count = sum(macs(make_network(config), row)) / 1e9
    assert count == pytest.approx(GMACS[name], abs=0.07 if "512" in name else 0.03)


def test_the_papers_table_is_complete() -> None:
    assert paper().keys() == GMACS.keys()


def write(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_configurations_are_read_from_anything(tmp_path: Path) -> None:
    assert read_config("DiT-B/4") == published_config("DiT-B/4")
    assert read_config(write(tmp_path / "a.json", {"depth": 2})) == DiTConfig(depth=2)
    assert read_config(write(tmp_path / "b.json", {"name": "DiT-S/8"})) == published_config("DiT-S/8")
    unet = {"network": "unet", "base_channels": 64}
    assert read_config(write(tmp_path / "c.json", unet)) == UNetConfig(base_channels=64)


def test_a_run_has_the_size_and_classes_of_its_pictures(tmp_path: Path) -> None:
    images = np.zeros((3, 8, 12, 3), np.uint8)
    np.savez(tmp_path / "set.npz", x=images, y=np.arange(3), names=np.array(["a", "b", "c"]))
    run = {
        "data": {"path": str(tmp_path / "set.npz")},
        "model": {"depth": 2, "in_channels": 3},
        "diffusion": {"schedule": "linear", "prediction": "epsilon"},
        "steps": 10,
        "output": "run",
    }
    expected = DiTConfig(depth=2, in_channels=3, image_size=(8, 12), classes=(3,), learn_sigma=False)
    assert read_config(write(tmp_path / "run.json", run)) == expected


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unet = {"network": "unet", "base_channels": 16, "multipliers": [1, 2], "attention": [1], "head_size": 16}
    file = write(tmp_path / "unet.json", unet)
    assert main(["DiT-S/8", file]) == 0
    table = capsys.readouterr().out
    assert "33.15 M" in table
    assert "unet.json" in table
    assert main([file, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)[file]
    assert printed["flops"] == 2 * printed["macs"]
    assert printed.items() >= asdict(cost(read_config(file))).items()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("DiT-XXL/2", "unknown model name"),
        ("absent.json", "neither a bundle nor a JSON file"),
        ("broken.json", "not valid JSON"),
        ("list.json", "must hold a JSON object"),
        ("field.json", "no field 'heads'"),
        ("kind.json", "unknown network 'mamba'"),
        ("size.json", "hidden_size 30 is not divisible"),
        ("run.json", "absent.npz does not exist"),
    ],
)
def test_errors_are_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argument: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.json").write_text("{")
    write(Path("list.json"), [1])
    write(Path("field.json"), {"heads": 2})
    write(Path("kind.json"), {"network": "mamba"})
    noise = {"schedule": "linear", "prediction": "epsilon"}
    run = {"data": {"path": "absent.npz"}, "model": {}, "diffusion": noise, "steps": 10, "output": "run"}
    write(Path("run.json"), run)
    write(Path("size.json"), {"hidden_size": 30, "num_heads": 4})
    assert main([argument]) == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert captured.count("\n") == 1


def test_the_parts_of_a_network_add_up_to_its_backbone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unet = {"network": "unet", "base_channels": 16, "multipliers": [1, 2], "attention": [1], "head_size": 16}
    file = write(tmp_path / "unet.json", unet)
    for name in ("DiT-S/8", file):
        assert main([name, "--json"]) == main([name, "--parts", "--json"]) == 0
        printed = capsys.readouterr().out
        whole, end = json.JSONDecoder().raw_decode(printed)
        parts = json.loads(printed[end:])[name]
        assert sum(part["macs"] for part in parts) == whole[name]["backbone_macs"]
        assert sum(part["name"].startswith("blocks.") for part in parts) >= 8
    assert parts[0]["shape"] == [16, 32, 32]
    assert main([file, "--parts", "--size", "16", "16"]) == 0
    table = capsys.readouterr().out
    assert "blocks.0" in table
    assert "16×16×16" in table

"""`python -m service models`: bundles with their state and size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ditserve.model.spec.bundle import Bundle, write_manifest
from ditserve.model.spec.zoo import FLAGSHIP, TINY
from ditserve.service.bundle_table import run


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run([*arguments, "--json"]) == 0
    return {Path(entry["folder"]).name: entry for entry in json.loads(capsys.readouterr().out)}


def test_the_state_of_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = Bundle.open(TINY).manifest
    for name in ("whole", "cut", "flipped", "weights"):
        shutil.copytree(TINY, tmp_path / name)
    (tmp_path / "cut" / "backbone.onnx").unlink()
    weights = bytearray((tmp_path / "flipped" / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "flipped" / "weights.safetensors").write_bytes(weights)
    for graph in (tmp_path / "weights").glob("*.onnx"):
        graph.unlink()
    write_manifest(tmp_path / "weights", manifest)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (tmp_path / "no model").mkdir()

    found = listed(capsys, str(tmp_path))
    assert set(found) == {"whole", "cut", "flipped", "weights", "pipeline"}
    assert found["whole"]["state"] == "ready: fp32"
    assert found["whole"]["bytes"] == sum(entry.bytes for entry in manifest.files.values())
    assert found["cut"]["state"].startswith("damaged: ")
    assert "backbone.onnx is missing" in found["cut"]["state"]
    assert "differs from the hash" in found["flipped"]["state"]
    assert found["weights"]["state"].startswith("weights only: python -m export.onnx ")
    assert found["pipeline"]["state"].startswith("pipeline: served as it is")
    assert listed(capsys, str(tmp_path), "--no-verify")["flipped"]["state"] == "ready: fp32"


def test_without_a_folder_those_that_ship_and_those_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(TINY, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert {FLAGSHIP.name, TINY.name, "mine"} <= set(listed(capsys))
    assert run([]) == 0
    assert len({line.index(" MB ") for line in capsys.readouterr().out.splitlines()}) == 1


@pytest.mark.parametrize(("name", "reason"), [("", "holds no bundle"), ("absent", "No such file")])
def test_a_folder_that_is_named_must_hold_one(
    name: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([str(tmp_path / name)]) == 2
    assert reason in capsys.readouterr().err

"""`python -m service schema`: what `GET /models` tells, of a folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.zoo import TINY
from ditserve.service.http.model_schema import folder_schema, run
from ditserve.service.settings import Settings
from tests.tiny_pipelines import save_pipeline

ROOT = Path(__file__).parents[3]


@pytest.mark.anyio
async def test_it_tells_what_the_service_tells(stage: Any, bundle_path: Path) -> None:
    answer = await stage.client.get("/models")
    told = answer.json()["models"][0]
    schema = folder_schema(bundle_path, Settings.parse()).model_dump(mode="json")
    # What workers run, and the sizes that they make, is known where they are alone.
    apart = {"networks", "size_step"}
    assert {name: value for name, value in schema.items() if name not in apart} == {
        name: value for name, value in told.items() if name not in apart
    }


def test_lines_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([str(TINY)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = dict(line.split(maxsplit=1) for line in lines if not line.startswith(" "))
    manifest = Bundle.open(TINY, verify=False).manifest
    assert rows["size"].startswith("32x32 pixels; others by multiples of 4")
    assert rows["guidance"] == f"classifier-free, {manifest.defaults.guidance_scale:g} unless asked"
    assert rows["steps"].startswith(f"1 to {manifest.diffusion.timesteps}; {manifest.defaults.steps} by ")
    assert [line for line in lines if line.startswith("condition label") and "24 classes: " in line]


def test_what_others_wrote_cannot_steer_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((TINY / "manifest.json").read_text())
    manifest |= {"description": "\x1b[2Jgone", "files": {}, "golden": None}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert run([str(tmp_path)]) == 0
    assert run([str(tmp_path), "--json"]) == 0
    out = capsys.readouterr().out
    assert "?[2Jgone" in out
    assert "\x1b" not in out


def test_a_pipelines_folder_has_a_schema_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pipeline("sd3", tmp_path / "sd3")
    before = sorted(tmp_path.rglob("*"))
    program = (
        "import sys; from ditserve.service.__main__ import main; status = main(sys.argv[1:]); "
        "sys.exit(status or bool({'torch', 'onnxruntime', 'diffusers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, "schema", str(tmp_path / "sd3"), "--json"]
    home = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=home, capture_output=True, text=True, check=True)
    assert sorted(tmp_path.rglob("*")) == before
    schema = json.loads(done.stdout)
    assert schema["text"] is True
    assert schema["text_tokens"] > 0
    assert schema["guidance"] == "classifier-free"
    assert run([str(tmp_path / "sd3")]) == 0
    assert f"condition text  any, up to {schema['text_tokens']} tokens" in capsys.readouterr().out


def test_a_folder_without_a_model_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} is not a bundle: manifest.json is missing")
    (tmp_path / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    assert run([str(tmp_path)]) == 2
    assert "python -m model.convert import" in capsys.readouterr().err
    (tmp_path / "model_index.json").write_text('{"_class_name": "OtherPipeline"}')
    assert run([str(tmp_path)]) == 2
    assert "OtherPipeline, which cannot be served" in capsys.readouterr().err

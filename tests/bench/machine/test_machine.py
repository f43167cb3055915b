"""The share of the machine's peak: measured for any bundle, with the share of each operator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ditserve.bench import report
from ditserve.bench.machine import __main__ as machine
from ditserve.bench.machine import matmul_peak, operators
from tests.service.tiny_bundle import write_bundle


def test_the_command_tells_prints_and_keeps_every_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(matmul_peak, "SIDES", (64,))
    bundle = tmp_path / "tiny"
    bundle.mkdir()
    write_bundle(bundle, weights=True)
    assert machine.main([str(bundle), "--batches", "1", "2", "--rounds", "1"]) == 0
    assert "all matrix products" in capsys.readouterr().out
    kept = json.loads((tmp_path / "machine.json").read_text())
    assert [(point["runtime"], point["rows"]) for point in kept["points"]] == [
        (runtime, rows) for runtime in ("onnx", "torch") for rows in (1, 2)
    ]
    assert all(point["share"] > 0 for point in kept["points"])
    assert (tmp_path / "machine.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_no_network_is_refused_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert machine.main(["DiT-Z/3"]) == 2
    assert capsys.readouterr().err.startswith("bench.machine: ")


def test_the_peak_is_the_fastest_of_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul_peak, "SIDES", (32, 64))
    peak = matmul_peak.MatmulPeak(threads=1)
    assert {library for library, _ in peak.rates} == {"torch", "numpy", "onnxruntime"}
    assert peak.rates[peak.library, peak.side] == max(peak.rates.values())
    assert peak.now() > 0


def test_shares_leave_out_the_first_pass_and_what_is_no_kernel() -> None:
    def event(name: str, operator: str, duration: int) -> dict[str, object]:
        return {"cat": "Node", "name": name, "args": {"op_name": operator}, "dur": duration}

    events = [
        {"cat": "Session", "name": "model_run", "dur": 999},
        event("a_kernel_time", "MatMul", 500),
        event("b_kernel_time", "Add", 500),
        event("a_kernel_time", "MatMul", 60),
        event("b_kernel_time", "Add", 20),
        event("b_fence_before", "Add", 70),
    ]
    assert operators.shares(events) == {"MatMul": 0.75, "Add": 0.25}
    assert operators.product_share({"MatMul": 0.5, "Conv": 0.25, "Add": 0.25}) == 0.75

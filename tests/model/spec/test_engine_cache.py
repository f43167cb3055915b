"""The engine cache: the GPU of this machine, and the command that makes a missing graph."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.engine_cache import Device, NoGpuError, engine_origin, first_gpu
from ditserve.model.spec.errors import BundleError
from tests.export.tiny import tiny_source


def test_nvidia_smi_reports_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="NVIDIA H100 80GB HBM3, 9.0\n")
    )
    device = first_gpu()
    assert device == Device("NVIDIA H100 80GB HBM3", "sm90")
    assert device.slug == "h100-80gb-hbm3-sm90"


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NoGpuError, match="nvidia-smi"):
        first_gpu()


def test_a_missing_graph_names_the_command_that_makes_it(tmp_path: Path) -> None:
    bundle = Bundle(tmp_path, tiny_source().manifest)
    with pytest.raises(
        BundleError, match=r"no backbone\.int8\.fp16\.onnx: .* export\.int8 --target tensorrt"
    ):
        engine_origin(
            bundle,
            "int8",
            "backbone.int8.fp16.onnx",
            flavour="tensorrt",
            version="11.4.0",
            device=Device("NVIDIA L4", "sm89"),
        )

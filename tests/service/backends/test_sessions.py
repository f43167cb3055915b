"""A session runs on the wanted provider or is refused; its errors are those of a backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ditserve.model.spec.bundle import Bundle, write_manifest
from ditserve.model.spec.engine_cache import Device
from ditserve.service.backends import BackendUnavailable, OutOfMemory, load_backend
from tests.service.tiny_bundle import write_bundle


def test_a_graph_that_is_none_is_refused_by_its_path(bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    for name in bundle.manifest.files:
        (tmp_path / name).write_bytes(bundle.file(name).read_bytes())
    (tmp_path / "backbone.onnx").write_bytes(b"not a graph")
    with pytest.raises(BackendUnavailable, match=r"backbone\.onnx cannot be loaded"):
        load_backend("onnx", Bundle(tmp_path, bundle.manifest))


def test_unknown_options_are_refused_in_one_sentence(bundle: Bundle) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    with pytest.raises(BackendUnavailable, match="must be one of auto, fp32, fp16, int8, not 'fp4'"):
        load_backend("onnx", bundle, precision="fp4")
    with pytest.raises(BackendUnavailable, match="has no NoSuchProvider: choose among CPUExecutionProvider,"):
        load_backend("onnx", bundle, providers=("NoSuchProvider",))


@pytest.mark.parametrize(
    ("provider", "package"),
    [("CUDAExecutionProvider", "onnxruntime-gpu"), ("TensorrtExecutionProvider", "tensorrt-cu13")],
)
def test_a_provider_that_is_not_installed_names_its_package(
    bundle: Bundle, provider: str, package: str
) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    if provider in runtime.get_available_providers():
        pytest.skip(f"this ONNX Runtime has {provider}")
    with pytest.raises(BackendUnavailable, match=f"has no {provider}: install .*{package}"):
        load_backend("onnx", bundle, providers=(provider, "CPUExecutionProvider"))


def test_a_provider_that_does_not_start_is_refused_rather_than_left_to_the_cpu(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime itself would warn and compute on the CPU."""
    module = pytest.importorskip("ditserve.service.backends.sessions", reason="onnxruntime is not installed")
    real = module.ort.InferenceSession
    monkeypatch.setattr("ditserve.service.backends.onnx.require_providers", lambda providers: None)
    monkeypatch.setattr(
        module.ort, "InferenceSession", lambda *args, providers: real(*args, providers=[module.CPU])
    )
    with pytest.raises(BackendUnavailable, match="CUDAExecutionProvider does not start"):
        load_backend("onnx", bundle, providers=("CUDAExecutionProvider",))


def test_tensorrt_keeps_its_engines_by_gpu_version_and_content(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = pytest.importorskip("ditserve.service.backends.sessions", reason="onnxruntime is not installed")
    write_bundle(tmp_path, weights=False)
    (tmp_path / "weights.safetensors").write_bytes(b"weights")
    write_manifest(tmp_path, bundle.manifest)
    monkeypatch.setattr(module, "first_gpu", lambda: Device("NVIDIA L4", "sm89"))
    monkeypatch.setattr(module.metadata, "version", lambda package: "11.4.0")
    ((name, first),) = module.provider_entries(Bundle.open(tmp_path), "fp32", (module.TENSORRT,))
    assert name == module.TENSORRT
    folder = f"l4-sm89-onnxruntime-{module.ort.__version__}-11.4.0"
    assert first["trt_engine_cache_path"] == str(tmp_path / "engines" / folder)
    (tmp_path / "weights.safetensors").write_bytes(b"other weights")
    write_manifest(tmp_path, bundle.manifest)
    ((_, other),) = module.provider_entries(Bundle.open(tmp_path), "fp32", (module.TENSORRT,))
    assert other["trt_engine_cache_path"] == first["trt_engine_cache_path"]
    assert other["trt_engine_cache_prefix"] != first["trt_engine_cache_prefix"]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Failed to allocate memory for requested buffer of size 64", OutOfMemory),
        ("some other fault", RuntimeError),
    ],
)
def test_onnx_runtime_out_of_memory_is_told_from_other_faults(
    message: str, expected: type[Exception]
) -> None:
    module = pytest.importorskip("ditserve.service.backends.sessions", reason="onnxruntime is not installed")

    class Session:
        def run(self, *_: Any) -> None:
            raise RuntimeError(message)

    with pytest.raises(expected, match=message):
        module.run_session(Session(), ["output"], {})

"""Imported pipelines in half precision, in the torch backend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.pipeline_bundle import write_pipeline_bundle
from ditserve.model.spec.pipeline_folder import read_pipeline
from ditserve.service.backends import BackendUnavailable
from ditserve.service.backends.torch import TorchBackend
from tests.tiny_pipelines import save_pipeline


def bundle_of(folder: Path, *, gain: float = 1.0) -> Bundle:
    """Write a tiny SD3 whose text tokens come into the network multiplied by `gain`."""
    pipeline = save_pipeline("sd3", folder / "pipeline")
    with torch.no_grad():
        pipeline.transformer.context_embedder.weight.mul_(gain)
    pipeline.save_pretrained(str(folder / "pipeline"), safe_serialization=True)
    found = read_pipeline(folder / "pipeline", name="tiny", licence="CC0-1.0", size=(8, 8), tokens=12)
    write_pipeline_bundle(found, folder / "bundle")
    return Bundle.open(folder / "bundle")


def output(backend: TorchBackend) -> np.ndarray:
    assert backend.text_encoder is not None
    text = backend.text_encoder.encode("a red fox")[None]
    embedding = backend.embed(np.zeros((1, 0), np.int64), text)
    state = backend.modulate(np.array([400.0], np.float32), embedding)
    x = np.random.default_rng(0).standard_normal((1, 4, 8, 8), np.float32)
    return backend.denoise(x, state)


def test_half_precision_is_the_network_s_own(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path)
    expected = output(TorchBackend(bundle, threads=1))
    for precision, dtype, limit in (("fp16", torch.float16, 1e-2), ("bf16", torch.bfloat16, 6e-2)):
        backend = TorchBackend(bundle, threads=1, precision=precision)
        assert {tensor.dtype for tensor in backend._model.parameters()} == {dtype}
        actual = output(backend)
        assert actual.dtype == np.float32
        error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
        assert 1e-6 < error < limit


def test_a_network_that_overflows_in_fp16_is_refused_with_the_remedy(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, gain=2e4)
    with pytest.raises(BackendUnavailable) as refused:
        TorchBackend(bundle, threads=1, precision="fp16")
    assert "tiny overflows in fp16" in str(refused.value)
    assert "choose --precision bf16 or fp32" in str(refused.value)
    for precision in ("bf16", "fp32"):
        assert np.isfinite(output(TorchBackend(bundle, threads=1, precision=precision))).all()


def test_a_precision_that_torch_has_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="auto, fp32, bf16, fp16, fp8, not 'int8'"):
        TorchBackend(bundle_of(tmp_path), precision="int8")

"""A model of ours on latents: torch runs its network, and its autoencoder's graphs beside that."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from ditserve.model.spec.bundle import Bundle
from ditserve.service.backends import BackendUnavailable, load_backend
from tests.service.backends.random_rows import random_rows


def test_torch_draws_from_latents_what_onnx_runtime_does(
    prompted_bundle: Path, rng: np.random.Generator
) -> None:
    bundle = Bundle.open(prompted_bundle)
    onnx, torch = (load_backend(name, bundle, threads=1) for name in ("onnx", "torch"))
    x, state = random_rows(onnx, rng, 2)
    np.testing.assert_allclose(torch.denoise(x, state), onnx.denoise(x, state), atol=2e-5)
    pixels = onnx.decode(x)
    assert pixels.shape == (2, 16, 16, 3)
    np.testing.assert_array_equal(torch.decode(x), pixels)
    np.testing.assert_array_equal(torch.encode(pixels), onnx.encode(pixels))
    torch.close()
    onnx.close()


def test_torch_says_what_is_missing_without_onnx_runtime(
    prompted_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ditserve.service.backends.autoencoder", None)
    with pytest.raises(BackendUnavailable, match=r"ONNX Runtime.*pip install 'ditserve\[cpu\]'"):
        load_backend("torch", Bundle.open(prompted_bundle), threads=1)

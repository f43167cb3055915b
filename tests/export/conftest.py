"""Fixtures of the export tests; bundles are exported once and kept between runs in pytest's cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ditserve.export.errors import ExportError
from ditserve.export.tensorrt.module import TensorRt, load_trt
from tests.export.tiny import cached_clip_bundle, cached_full_bundle, cached_tiny_bundle


@pytest.fixture(scope="session")
def tiny_bundle(pytestconfig: pytest.Config) -> Path:
    """A complete bundle with random weights; read only (tests that change it copy it)."""
    assert pytestconfig.cache is not None
    return cached_tiny_bundle(Path(pytestconfig.cache.mkdir("bundles")))


@pytest.fixture
def own_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that the test may change."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def full_bundle(pytestconfig: pytest.Config) -> Path:
    """The tiny bundle with half-precision and INT8 backbones; read only."""
    assert pytestconfig.cache is not None
    return cached_full_bundle(Path(pytestconfig.cache.mkdir("bundles")))


@pytest.fixture(scope="session")
def rtx() -> TensorRt:
    """The real TensorRT-RTX compiler."""
    try:
        return load_trt("tensorrt_rtx")
    except ExportError as error:
        pytest.skip(f"no TensorRT-RTX here: {error}")


@pytest.fixture(scope="session")
def clip_bundle(pytestconfig: pytest.Config) -> Path:
    """Return an exported bundle that draws clips; tests must not write into it."""
    assert pytestconfig.cache is not None
    return cached_clip_bundle(Path(pytestconfig.cache.mkdir("bundles")))

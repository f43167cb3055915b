"""Fixtures of the export tests; `tiny_bundle` is exported once and cached between runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.export.tiny import cached_tiny_bundle


@pytest.fixture(scope="session")
def tiny_bundle(pytestconfig: pytest.Config) -> Path:
    """A complete bundle with random weights; read only (tests that change it copy it)."""
    assert pytestconfig.cache is not None
    return cached_tiny_bundle(Path(pytestconfig.cache.mkdir("bundles")))


@pytest.fixture
def own_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that the test may change."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))

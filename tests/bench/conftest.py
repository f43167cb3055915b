"""Fixtures of several benchmarks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.prompted_bundle import cached_prompted_bundle


@pytest.fixture(scope="session")
def prompted_bundle(pytestconfig: pytest.Config) -> Path:
    """A bundle that draws from texts, over latents; read only."""
    assert pytestconfig.cache is not None
    return cached_prompted_bundle(Path(pytestconfig.cache.mkdir("bundles")))

"""Fixtures of several benchmarks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.prompted_bundle import write_prompted_bundle


@pytest.fixture(scope="session")
def prompted_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that draws from texts, over latents; read only."""
    return write_prompted_bundle(tmp_path_factory.mktemp("prompted"))

"""Fixtures of the backends' tests."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

from ditserve.model.spec.bundle import Bundle
from tests.service.tiny_bundle import write_bundle


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of random weights; read only."""
    folder = tmp_path_factory.mktemp("tiny")
    write_bundle(folder, weights=find_spec("torch") is not None)
    return Bundle.open(folder)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)

"""The bundles that ship with the repository: whole, small, credited, and made by the config beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.network_config import network_fields
from ditserve.model.train.config import load_config

ZOO = Path(__file__).parent.parent.parent / "model" / "zoo"


@pytest.mark.parametrize(
    ("name", "limit"),
    [("emoji", 60_000_000), ("emoji64", 60_000_000), ("animated-emoji", 15_000_000), ("tiny", 1_000_000)],
)
def test_a_shipped_bundle_is_small_and_of_its_recipe(name: str, limit: int) -> None:
    manifest, config = Bundle.open(ZOO / name).manifest, load_config(ZOO / name / "train.json")
    assert sum(entry.bytes for entry in manifest.files.values()) < limit
    assert config.model.items() <= network_fields(manifest.config).items()
    assert config.diffusion == manifest.diffusion
    assert config.steps == manifest.provenance["step"]
    assert manifest.attribution
    assert {"backbone.onnx", "conditioner.onnx", "weights.safetensors"} <= manifest.files.keys()

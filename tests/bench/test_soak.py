"""Memory over many images: a short run of the real thing, and a check that growth would be seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ditserve.bench import soak
from tests.service.tiny_bundle import write_bundle

MIB = 1 << 20


def test_memory_stays_where_it_is(tmp_path: Path) -> None:
    bundle, out = tmp_path / "bundle", tmp_path / "soak.json"
    bundle.mkdir()
    write_bundle(bundle, weights=False)
    status = soak.main(["--images=200", f"--bundle={bundle}", f"--out={out}"])
    result = json.loads(out.read_text())
    assert status == 0, result
    assert result["images"] >= 200
    assert result["wrong"] == 0


def test_growth_is_told_after_the_warm_up() -> None:
    memory = soak.MemorySeries()
    memory.images = list(range(0, 1001, 10))
    memory.resident = [50 * MIB if images < 150 else 100 * MIB + images * 1024 for images in memory.images]
    summary = memory.summary()
    assert summary["kib_per_1000_images"] == 1000.0
    assert summary["growth_mib"] == pytest.approx(0.59, abs=0.05)
    memory.resident = [50 * MIB if images < 150 else 100 * MIB for images in memory.images]
    assert memory.summary()["growth_mib"] == 0.0

"""The chaos command: a short run of the real thing, and that it would see the failures it looks for."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ditserve.bench.chaos import __main__ as chaos
from ditserve.bench.chaos.clients import RequestOutcome, compare
from ditserve.bench.chaos.faults import ChaosLog
from tests.service.tiny_bundle import write_bundle


@pytest.mark.timeout(180)
def test_faults_lose_nothing(tmp_path: Path) -> None:
    bundle, out = tmp_path / "bundle", tmp_path / "chaos.json"
    bundle.mkdir()
    write_bundle(bundle, weights=False)
    status = chaos.main(["--seconds=6", "--clients=3", f"--bundle={bundle}", f"--out={out}"])
    result = json.loads(out.read_text())
    assert status == 0, result
    assert result["accepted"] > 0
    assert sum(result["faults"].values()) > 0
    assert (result["lost"], result["duplicated"], result["wrong_images"]) == (0, 0, 0)


def test_what_is_lost_wrong_or_answered_twice_is_counted() -> None:
    log = ChaosLog(faults=[(10.0, "worker killed"), (20.0, "API killed")], duplicated=2)
    log.outcomes = [
        RequestOutcome(0, "waiting", "a", "done", "equal", asked_at=9.0, ended_at=13.0),
        RequestOutcome(0, "waiting", "b", "done", "wrong", asked_at=9.5, ended_at=11.0),
        RequestOutcome(0, "waiting", "c", "lost", asked_at=15.0),
        RequestOutcome(0, "hurrying", None, "overloaded", asked_at=12.0, ended_at=12.1),
    ]
    summary = log.summary()
    assert (summary["requests"], summary["accepted"]) == (4, 3)
    assert (summary["lost"], summary["wrong_images"], summary["duplicated"]) == (1, 1, 2)
    assert summary["recovery_s"]["max"] == 3.0


def png(pixels: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def test_images_are_compared() -> None:
    pixels = np.full((4, 4, 3), 100, np.uint8)
    expected = (png(pixels), png(pixels + 5))
    assert compare(expected, expected) == "equal"
    assert compare((png(pixels + 1), png(pixels + 4)), expected) == "close"
    assert compare((png(pixels + 2), expected[1]), expected) == "wrong"
    assert compare(expected[:1], expected) == "wrong"

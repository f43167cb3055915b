"""The chaos command: a short run of the real thing, and that it would see the failures it looks for."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from ditserve.bench.chaos import __main__ as chaos
from ditserve.bench.chaos.clients import RequestOutcome, compare
from ditserve.bench.chaos.doors import Door, pattern
from ditserve.bench.chaos.log import FAILURES, ChaosLog, failed
from tests.service.tiny_bundle import write_bundle


def test_faults_lose_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, out, text = tmp_path / "bundle", tmp_path / "chaos.json", tmp_path / "chaos.md"
    bundle.mkdir()
    write_bundle(bundle, weights=False)
    names = ["crashes", "lost-records", "logs", "other-version"]
    options = ["--seconds=5", "--clients=3", f"--bundle={bundle}", f"--scenarios={','.join(names)}"]
    status = chaos.main([*options, f"--out={out}", f"--report={text}"])
    scenarios = json.loads(out.read_text())["scenarios"]
    assert status == 0, scenarios
    assert scenarios.pop("other-version") == {
        "not_run": "name a checkout of another version with --other-api"
    }
    assert list(scenarios) == names[:-1]
    for summary in scenarios.values():
        assert summary["accepted"] > 0
        assert not any(summary[name] for name in FAILURES)
    assert sum(scenarios["crashes"]["faults"].values()) > 0
    assert capsys.readouterr().out.endswith(text.read_text())
    assert "`other-version` was not run: name a checkout" in text.read_text()


def test_what_fails_its_clients_is_counted() -> None:
    log = ChaosLog(faults=[(10.0, "worker killed"), (20.0, "API killed")], answered_twice=2)
    log.outcomes = [
        RequestOutcome(0, "waiting", "a", "done", match="equal", asked_at=9.0, ended_at=13.0),
        RequestOutcome(0, "waiting", "b", "done", match="wrong", asked_at=9.5, ended_at=11.0, undocumented=1),
        RequestOutcome(0, "waiting", "c", "job-lost", asked_at=15.0),
        RequestOutcome(0, "waiting", "d", asked_at=15.0),
        RequestOutcome(0, "hurrying", None, "overloaded", asked_at=12.0, ended_at=12.1),
        RequestOutcome(0, "hurrying", "e", "deadline-exceeded", due=True),
        RequestOutcome(0, "hurrying", "f", "done", due=True),
    ]
    summary = log.summary()
    assert (summary["requests"], summary["accepted"]) == (7, 6)
    assert {name: summary[name] for name in FAILURES} == {
        "lost": 1,
        "answered_twice": 2,
        "waiting": 1,
        "undocumented": 1,
        "wrong_images": 1,
    }
    assert (summary["broken"], summary["promised"]) == (1, 2)
    assert summary["recovery_s"]["max"] == 3.0
    assert failed(summary)
    by_redis = ChaosLog(outcomes=log.outcomes[2:3], redis_loses=True).summary()
    assert (by_redis["lost"], by_redis["lost_by_redis"], failed(by_redis)) == (0, 1, False)


def test_answers_are_compared_with_the_document() -> None:
    responses = {"200": {"content": {"image/png": {}}}, "204": {"description": "No more."}}
    door = Door(httpx.AsyncClient(), [(pattern("/jobs/{id}/images/{k}"), {"get": {"responses": responses}})])

    def documented(status: int, kind: str, *, method: str = "GET", path: str = "/jobs/a/images/0") -> bool:
        return door.documents(method, path, httpx.Response(status, headers={"content-type": kind}))

    assert documented(200, "image/png")
    assert documented(204, "")
    assert not documented(200, "text/plain")
    assert not documented(500, "image/png")
    assert not documented(200, "image/png", method="POST")
    assert not documented(200, "image/png", path="/jobs/a/b/images/0")


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

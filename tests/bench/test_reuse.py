"""Reuse between steps: what is reused is what was computed, and the command says what it found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ditserve.bench import report, reuse
from ditserve.bench.reuse import caching, draw_reusing_guidance
from ditserve.model.evaluation.front import OperatingPoint
from ditserve.model.evaluation.ladder import draw_inputs, draw_pictures
from ditserve.model.spec.grids import even_grid
from ditserve.model.train.loaded_model import LoadedModel
from tests.export.tiny import CONFIG, tiny_source


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_source(replace(CONFIG, depth=4))


def test_without_reuse_pictures_are_those_of_the_ladder(model: LoadedModel) -> None:
    inputs = draw_inputs(model, 1, None)
    for interval, rows in (((0.0, 1.0), {1: 8, 2: 6, 3: 6}), ((0.2, 0.7), {1: 6, 2: 5, 3: 6})):
        point = OperatingPoint("dpmpp-2m", 4, even_grid(model.schedule), interval)
        plain = draw_pictures(model, inputs, point)
        for every, count in rows.items():
            pictures, counted = draw_reusing_guidance(model, inputs, point, every)
            assert counted == count
            assert torch.allclose(pictures, plain, atol=1e-5) == (count == rows[1])


def test_block_caches_are_tried_whatever_networks_the_bundle_has(model: LoadedModel) -> None:
    tried = caching(model)
    assert list(tried.manifest.backbones) == ["every-2", "every-3"]
    costs = [spec.row_cost for spec in tried.manifest.backbones.values()]
    assert 0.2 < costs[1] < costs[0] < 1.2


def test_the_command_says_what_the_ladder_would_keep(
    prompted_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(reuse, "REUSED_STEPS", (3,))
    monkeypatch.setattr(reuse, "PLAIN_STEPS", (3, 2))
    monkeypatch.setattr(reuse, "LONG_RUN", ("ddim", 4))
    monkeypatch.setattr(reuse, "_pass_seconds", lambda depth: 1.0 + depth)
    assert reuse.main([str(prompted_bundle), "--samples", "1"]) == 0
    shown = capsys.readouterr().out
    assert "-3 every-2" in shown
    assert "-3 guidance every 2" in shown
    record = json.loads((tmp_path / "reuse-prompted.json").read_text())
    assert len(record["measured"]) == 4 + 4
    assert set(record["kept"]) <= {rung["name"] for rung in record["measured"]}
    assert record["dit_xl_2"]["share_of_a_row"] == pytest.approx((1 + 8) / (1 + 28))
    assert reuse.main([str(tmp_path / "nowhere")]) == 2

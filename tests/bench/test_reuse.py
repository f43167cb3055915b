"""Reuse between steps: what is reused is what was computed, and the command says what it found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ditserve.bench import report, reuse
from ditserve.bench.reuse import BlockChange, KeptFeatures, StepReuse, draw
from ditserve.model.evaluation.front import OperatingPoint
from ditserve.model.evaluation.ladder import draw_inputs, draw_pictures
from ditserve.model.spec.grids import even_grid
from ditserve.model.train.loaded_model import LoadedModel
from tests.export.tiny import CONFIG, tiny_source


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_source(replace(CONFIG, depth=4))


def test_a_change_goes_on_along_the_line_through_the_last_two() -> None:
    change = BlockChange()
    change.keep(0, torch.tensor(1.0))
    assert change.at(1) == 1.0
    change.keep(2, torch.tensor(2.0))
    assert change.at(3) == pytest.approx(2.5)
    change.keep(4, torch.tensor(5.0))
    assert change.at(6) == pytest.approx(8.0)


def test_middle_blocks_add_what_they_changed(model: LoadedModel) -> None:
    network = model.dit
    features = KeptFeatures(network, (1, 3))
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    state = network.modulate(torch.full((2,), 500.0), network.embed(torch.zeros(2, 2, dtype=torch.int64)))
    with torch.no_grad():
        whole = network.backbone(x, state)
        assert torch.equal(features.network.backbone(x, state), whole)
        features.step, features.is_due = 1, False
        # The same input: the change that is added is the one that would be computed.
        assert torch.allclose(features.network.backbone(x, state), whole, atol=1e-5)
        assert not torch.allclose(features.network.backbone(2 * x, state), network.backbone(2 * x, state))


def test_without_reuse_pictures_are_those_of_the_ladder(model: LoadedModel) -> None:
    inputs = draw_inputs(model, 1, None)
    point = OperatingPoint("dpmpp-2m", 4, even_grid(model.schedule), (0.0, 1.0))
    plain, rows = draw(model, inputs, "dpmpp-2m", 4, StepReuse())
    assert rows == point.rows(model.manifest) == 8.0
    assert torch.allclose(plain, draw_pictures(model, inputs, point), atol=1e-5)
    for kind, cost in (
        (StepReuse(2), 6.0),
        (StepReuse(2, (1, 3), 0.5), 6.0),
        (StepReuse(3, (0, 3), 0.25), 5.0),
    ):
        pictures, rows = draw(model, inputs, "dpmpp-2m", 4, kind)
        assert rows == cost
        assert not torch.allclose(pictures, plain, atol=1e-5)


def test_the_command_says_what_the_ladder_would_keep(
    prompted_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(reuse, "STEPS", (3,))
    monkeypatch.setattr(reuse, "PLAIN_STEPS", (3, 2))
    monkeypatch.setattr(reuse, "LONG_RUN", ("ddim", 4))
    monkeypatch.setattr(reuse, "_pass_seconds", lambda depth: 1.0 + depth)
    assert reuse.main([str(prompted_bundle), "--samples", "1"]) == 0
    assert "unipc-1-3 blocks 0-2 every 2" in capsys.readouterr().out
    record = json.loads((tmp_path / "reuse-prompted.json").read_text())
    assert len(record["measured"]) == 4 + 4
    assert set(record["kept"]) <= {rung["name"] for rung in record["measured"]}
    assert record["dit_xl_2"]["share_of_a_row"] == pytest.approx((1 + 8) / (1 + 28))
    assert reuse.main([str(tmp_path / "nowhere")]) == 2

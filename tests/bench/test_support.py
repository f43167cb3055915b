"""The table of models and hardware in docs/models.md is the one of the results and tests that there are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ditserve.bench import report, support
from ditserve.model.spec.pipeline_config import FAMILIES
from tests.tiny_pipelines import BUILDERS

ROOT = Path(__file__).parents[2]


def test_the_document_has_the_table_of_now() -> None:
    document = (ROOT / support.DOCUMENT).read_text()
    assert support.updated(document) == document, "run python -m bench.support"


def test_a_pipeline_that_is_told_to_run_is_tested() -> None:
    assert set(FAMILIES) == set(BUILDERS) - {"dit"}


def test_what_no_result_names_was_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    result = {"options": {"networks": ["model/zoo/emoji64"]}, "machine": {}, "gpu": {"name": "X1"}}
    (tmp_path / "gpu.json").write_text(json.dumps(result))
    (tmp_path / "other.json").write_text("[]")
    lines = support.support_table().splitlines()
    assert lines[1] == "| model | X1 |"
    assert "| `emoji64`, ships | runs and measured: [gpu](../bench/results/gpu.json) |" in lines
    assert "| `tiny`, ships | not tried |" in lines

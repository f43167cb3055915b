"""Conditions in words, for models that take them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ditserve.service.jobs import ConditionTerm
from tests.service.http.conftest import MANIFEST, Stage

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module", params=[0, 8])
def bundle_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folders of a model of classes alone, and of one that takes text too."""
    path = tmp_path_factory.mktemp("texts")
    config = {**MANIFEST["config"], "text_size": request.param}
    (path / "manifest.json").write_text(json.dumps({**MANIFEST, "config": config}))
    return path


async def test_a_text_reaches_the_workers_of_a_model_that_takes_one(stage: Stage, bundle_path: Path) -> None:
    terms: list[dict[str, Any]] = [{"text": " a red fox ", "weight": 2}, {"text": "snow"}]
    response = await stage.generate(condition=terms)
    if not json.loads((bundle_path / "manifest.json").read_text())["config"]["text_size"]:
        assert response.status_code == 422
        assert "no factor 'text'" in response.json()["detail"]
        return
    assert response.status_code == 200
    nothing = (None,) * len(MANIFEST["factors"])
    assert stage.worker.claimed[-1].job.condition == (
        ConditionTerm(nothing, 2.0, "a red fox"),
        ConditionTerm(nothing, 1.0, "snow"),
    )
    assert (await stage.generate(condition={"text": 7})).status_code == 422


async def test_openais_prompt_is_the_text_of_a_model_that_takes_one(stage: Stage, bundle_path: Path) -> None:
    response = await stage.client.post("/v1/images/generations", json={"prompt": "a lemon in the snow"})
    assert response.status_code == 200
    (term,) = stage.worker.claimed[-1].job.condition
    if json.loads((bundle_path / "manifest.json").read_text())["config"]["text_size"]:
        assert term == ConditionTerm((None,) * len(MANIFEST["factors"]), 1.0, "a lemon in the snow")
    else:
        assert term.labels == (3, None)

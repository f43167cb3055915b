"""Adapters over HTTP: listed as the workers have them, and refused at intake with one sentence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ditserve.service.fleet import LoadedAdapter
from ditserve.service.http.adapters import common_adapters
from ditserve.service.jobs import AdapterUse
from tests.service.http.conftest import Stage
from tests.service.wire_examples import STATE

pytestmark = pytest.mark.anyio

NOIR, PIXELS = LoadedAdapter("noir", "11", 8), LoadedAdapter("pixel-art", "22", 4)


async def test_a_request_is_drawn_with_the_adapters_that_it_names(stage: Stage) -> None:
    await stage.worker.report(adapters=(PIXELS, NOIR))
    (model,) = (await stage.client.get("/models")).json()["models"]
    assert model["adapters"] == [
        {"name": "noir", "version": "11", "rank": 8},
        {"name": "pixel-art", "version": "22", "rank": 4},
    ]
    wishes = [{"name": "pixel-art"}, {"name": "noir", "scale": -0.5}]
    for path, body in (
        ("/generate", {"condition": {"label": "lemon"}}),
        ("/v1/images/generations", {"prompt": "lemon"}),
    ):
        answer = await stage.client.post(path, json={**body, "adapters": wishes})
        assert answer.status_code == 200, answer.text
        job = stage.worker.claimed[-1].job
        assert job.adapters == (AdapterUse("noir", -0.5, "11"), AdapterUse("pixel-art", 1.0, "22"))


async def test_an_adapter_of_scale_0_costs_nothing(stage: Stage) -> None:
    await stage.worker.report(adapters=(NOIR,))
    assert (await stage.generate(adapters=[{"name": "noir", "scale": 0}])).status_code == 200
    assert stage.worker.claimed[-1].job.adapters == ()


REFUSED: list[tuple[list[dict[str, Any]], str]] = [
    ([{"name": "sketch"}], "There is no 'sketch'; choose among noir, pixel-art."),
    ([{"name": "../noir"}], "There is no '../noir'; choose among noir, pixel-art."),
    ([{"name": "noir"}, {"name": "noir"}], "'noir' is named twice: give it one scale."),
]


@pytest.mark.parametrize(("wishes", "sentence"), REFUSED)
async def test_what_cannot_be_is_one_sentence(
    stage: Stage, wishes: list[dict[str, Any]], sentence: str
) -> None:
    await stage.worker.report(adapters=(NOIR, PIXELS))
    answer = await stage.generate(adapters=wishes)
    assert answer.status_code == 422
    assert answer.json()["detail"] == f"adapters: {sentence}"
    assert answer.json()["errors"] == [{"pointer": "#/adapters", "detail": sentence}]


@pytest.mark.parametrize(
    "wishes",
    [
        [{"name": "noir", "scale": 11}],
        [{"name": "noir", "scale": "1"}],
        [{"name": "noir", "weight": 1}],
        [{"scale": 1}],
        [{"name": 7}],
        [{"name": "n" * 101}],
        [{"name": "noir"}] * 5,
        {"name": "noir"},
        "noir",
    ],
)
async def test_a_field_of_another_form_is_refused(stage: Stage, wishes: Any) -> None:
    await stage.worker.report(adapters=(NOIR,))
    answer = await stage.generate(adapters=wishes)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"].startswith("#/adapters")


async def test_other_backends_say_that_adapters_need_torch(stage: Stage) -> None:
    (model,) = (await stage.client.get("/models")).json()["models"]
    assert model["adapters"] is None
    answer = await stage.generate(adapters=[{"name": "noir"}])
    assert answer.status_code == 422
    assert "need workers of the torch backend" in answer.json()["detail"]
    assert (await stage.generate(adapters=[])).status_code == 200
    await stage.worker.report(adapters=())
    answer = await stage.generate(adapters=[{"name": "noir"}])
    assert answer.json()["detail"] == "adapters: There is no 'noir'; none is loaded."


async def test_an_adapter_that_not_every_worker_has_is_there_soon(stage: Stage) -> None:
    other = replace(STATE, worker="other", models=("fruits",), updated_at=2.0**40)
    await stage.worker.report(adapters=(NOIR, PIXELS))
    await stage.broker.report(replace(other, adapters=(PIXELS, replace(NOIR, version="12"))))
    answer = await stage.generate(adapters=[{"name": "noir"}])
    assert answer.status_code == 503
    assert answer.json()["detail"] == "Not every worker has loaded the adapter 'noir' yet."
    assert answer.headers["retry-after"] == "5"
    assert (await stage.generate(adapters=[{"name": "pixel-art"}])).status_code == 200
    (model,) = (await stage.client.get("/models")).json()["models"]
    assert [adapter["name"] for adapter in model["adapters"]] == ["pixel-art"]


async def test_without_a_worker_nobody_can_say(open_stage: Any) -> None:
    stage = await open_stage(worker=False)
    answer = await stage.generate(adapters=[{"name": "noir"}])
    assert (answer.status_code, answer.json()["code"]) == (503, "overloaded")
    assert common_adapters(()) is None

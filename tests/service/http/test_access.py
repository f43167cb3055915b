"""API keys over HTTP: refusals, quotas, and the paths that stay open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY

from ditserve.service.api_keys import add
from ditserve.service.http.access import OPEN
from tests.service.http.conftest import OpenStage, Stage

pytestmark = pytest.mark.anyio

APPLE = {"condition": {"label": "apple"}}


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
async def stage(open_stage: OpenStage, keys: Path) -> Stage:
    return await open_stage(keys_file=keys)


def bearer(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


@pytest.mark.parametrize(
    "header", [{}, {"authorization": "Basic YTpi"}, bearer("dit_00000000_x"), {"x-api-key": "guess"}]
)
async def test_without_a_good_key_nothing_is_drawn(stage: Stage, header: dict[str, str]) -> None:
    response = await stage.generate(header, **APPLE)
    assert response.status_code == 401
    assert response.json()["code"] == "unauthorized"
    assert response.headers["www-authenticate"].startswith("Bearer")
    assert response.headers["x-request-id"]
    assert stage.worker.claimed == []


@pytest.mark.parametrize("style", ["bearer", "header"])
async def test_a_key_draws(stage: Stage, keys: Path, style: str) -> None:
    key, text = add(keys, "shop")
    response = await stage.generate(bearer(text) if style == "bearer" else {"x-api-key": text}, **APPLE)
    assert response.status_code == 200
    assert stage.worker.claimed[0].job.caller == f"key:{key.id}"
    assert "ratelimit" not in response.headers


async def test_a_key_without_the_scope_is_forbidden(stage: Stage, keys: Path) -> None:
    _, text = add(keys, "operator", scopes=("admin",))
    response = await stage.generate(bearer(text), **APPLE)
    assert (response.status_code, response.json()["code"]) == (403, "forbidden")


async def test_who_is_refused_is_counted_where_they_knocked(stage: Stage, keys: Path) -> None:
    _, text = add(keys, "shop", rate=1)

    def counted(outcome: str) -> float:
        labels = {"route": "/generate", "outcome": outcome}
        return REGISTRY.get_sample_value("dit_requests_total", labels) or 0.0

    before = {outcome: counted(outcome) for outcome in ("invalid", "quota")}
    await stage.generate(**APPLE)
    for _ in range(2):
        await stage.generate(bearer(text), **APPLE)
    assert {outcome: counted(outcome) - count for outcome, count in before.items()} == {
        "invalid": 1,
        "quota": 1,
    }


async def test_every_path_but_the_open_ones_asks(stage: Stage) -> None:
    document = (await stage.client.get("/openapi.json")).json()
    for path, operations in document["paths"].items():
        for method in operations:
            status = (
                await stage.client.request(method, path.replace("{job_id}", "0" * 32).replace("{k}", "0"))
            ).status_code
            assert (status == 401) == (path not in OPEN), (method, path)
    assert (await stage.client.get("/no-such-page")).status_code == 401
    for path in ("/", "/docs"):
        assert (await stage.client.get(path)).status_code == 200


async def test_the_document_says_that_a_key_is_needed(stage: Stage, open_stage: OpenStage) -> None:
    document = (await stage.client.get("/openapi.json")).json()
    operation = document["paths"]["/generate"]["post"]
    assert operation["security"] == [{"key": []}]
    assert {"401", "403", "429"} <= set(operation["responses"])
    assert "security" not in document["paths"]["/livez"]["get"]
    without = (await (await open_stage()).client.get("/openapi.json")).json()
    assert "security" not in without["paths"]["/generate"]["post"]


async def test_a_quota_counts_down_and_refuses(stage: Stage, keys: Path) -> None:
    _, text = add(keys, "shop", rate=2)
    remaining = []
    for _ in range(3):
        response = await stage.generate(bearer(text), **APPLE)
        assert response.headers["ratelimit-policy"] == '"requests";q=2;w=60'
        remaining.append(response.headers["ratelimit"].partition(";t=")[0])
    assert remaining == ['"requests";r=1', '"requests";r=0', '"requests";r=0']
    assert (response.status_code, response.json()["code"]) == (429, "quota-exceeded")
    assert 1 <= int(response.headers["retry-after"]) <= 60
    assert len(stage.worker.claimed) == 2
    # Only drawing counts towards the quota.
    assert (await stage.client.get("/models", headers=bearer(text))).status_code == 200


async def test_a_refusal_for_too_many_jobs_does_not_use_up_the_rate(stage: Stage, keys: Path) -> None:
    stage.worker.hold = True
    _, text = add(keys, "shop", rate=3, concurrency=1)
    later = bearer(text) | {"prefer": "respond-async"}
    address = (await stage.generate(later, **APPLE)).headers["location"]
    for _ in range(4):
        refused = await stage.generate(later, **APPLE)
        assert (refused.status_code, "unfinished" in refused.json()["detail"]) == (429, True)
        assert refused.headers["ratelimit"].startswith('"requests";r=2;')
    await stage.client.delete(address, headers=bearer(text))
    assert (await stage.generate(later, **APPLE)).status_code == 202


async def test_a_refusal_of_a_full_service_does_not_use_up_the_rate(stage: Stage, keys: Path) -> None:
    _, text = add(keys, "shop", rate=100)

    async def send(**body: Any) -> httpx.Response:
        return await stage.generate(bearer(text), **APPLE, **body)

    for _ in range(2):
        refused = await send(deadline_ms=1, allow_degraded=False, steps=100)
        assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
        assert refused.headers["ratelimit"].startswith('"requests";r=100;')
    assert (await send()).headers["ratelimit"].startswith('"requests";r=99;')


async def test_quotas_are_each_keys_own_and_shared_by_processes(open_stage: OpenStage, keys: Path) -> None:
    (_, one), (_, other) = add(keys, "one", rate=1), add(keys, "other", rate=1)
    first, second = await open_stage(keys_file=keys), await open_stage(keys_file=keys, worker=False)
    assert (await first.generate(bearer(one), **APPLE)).status_code == 200
    assert (await second.generate(bearer(one), **APPLE)).status_code == 429
    assert (await first.generate(bearer(other), **APPLE)).status_code == 200


async def test_openais_shape(stage: Stage) -> None:
    response = await stage.client.post("/v1/images/generations", json={"prompt": "an apple"})
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "unauthorized"


async def test_a_job_is_seen_by_its_own_key_and_by_an_admin(stage: Stage, keys: Path) -> None:
    (_, owner), (_, stranger) = add(keys, "owner"), add(keys, "stranger")
    _, admin = add(keys, "admin", scopes=("admin",))
    response = await stage.generate({**bearer(owner), "prefer": "respond-async"}, **APPLE)
    address = response.headers["location"]
    for part in ("", "/events", "/images/0"):
        seen = [
            (await stage.client.get(address + part, headers=bearer(text))).status_code
            for text in (stranger, owner, admin)
        ]
        assert seen == [404, 200, 200], part
    assert (await stage.client.delete(address, headers=bearer(stranger))).status_code == 404


async def test_a_key_may_have_so_many_unfinished_jobs(stage: Stage, keys: Path) -> None:
    stage.worker.hold = True
    (_, text), (_, other) = add(keys, "shop", concurrency=2), add(keys, "other", concurrency=2)
    later = {"prefer": "respond-async"}
    addresses = [
        (await stage.generate({**bearer(text), **later}, **APPLE)).headers["location"] for _ in range(2)
    ]
    refused = await stage.generate({**bearer(text), **later}, **APPLE)
    assert (refused.status_code, refused.json()["code"]) == (429, "quota-exceeded")
    assert int(refused.headers["retry-after"]) > 0
    assert (await stage.generate({**bearer(other), **later}, **APPLE)).status_code == 202
    await stage.client.delete(addresses[0], headers=bearer(text))
    assert (await stage.generate({**bearer(text), **later}, **APPLE)).status_code == 202

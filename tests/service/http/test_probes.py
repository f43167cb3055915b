"""Probes, metrics, and how the API process starts."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ditserve.service.fleet import LoadSnapshot, Starting
from ditserve.service.http import load_cache
from tests.service.http.conftest import OpenStage, Stage

pytestmark = pytest.mark.anyio


async def test_ready_once_a_worker_is_alive(open_stage: OpenStage) -> None:
    stage = await open_stage(worker=False)
    for probe in ("/readyz", "/startupz"):
        response = await stage.client.get(probe)
        assert (response.status_code, response.json()["status"]) == (503, "failing")
        assert "fruits has 0 of 1 workers." in response.json()["reasons"].values()
    assert (await stage.client.get("/livez")).status_code == 200
    await stage.worker.report()
    assert (await stage.client.get("/readyz")).json() == {
        "status": "ok",
        "checks": {"accepting": True, "queue": True, "workers": True},
    }
    assert (await stage.client.get("/startupz")).status_code == 200


async def test_once_started_it_stays_started(stage: Stage) -> None:
    assert (await stage.client.get("/startupz")).status_code == 200
    await stage.broker.retire("stub")
    assert (await stage.client.get("/readyz")).status_code == 503
    assert (await stage.client.get("/startupz")).status_code == 200


async def test_what_workers_to_come_are_doing_is_told(open_stage: OpenStage) -> None:
    stage = await open_stage(worker=False)
    await stage.broker.report(Starting("w1", "fruits", "building the fp16 engine (1 of 1): 25%"))
    answer = await stage.client.get("/startupz")
    assert (answer.status_code, answer.json()["checks"]) == (503, {"started": False})
    assert answer.json()["starting"] == ["fruits: building the fp16 engine (1 of 1): 25%"]
    # A worker that is starting does not count yet.
    assert (await stage.client.get("/readyz")).status_code == 503


async def test_a_fleet_scaled_to_zero_can_be_ready(open_stage: OpenStage) -> None:
    stage = await open_stage(worker=False, ready_workers=0)
    assert (await stage.client.get("/readyz")).status_code == 200


@pytest.mark.parametrize(
    ("running", "age", "limit", "status"),
    [
        (0, 999.0, 0.0, 200),
        (3, 1.0, 0.0, 200),
        (3, 61.0, 0.0, 503),
        (3, 61.0, 120.0, 200),
        (3, 121.0, 120.0, 503),
    ],
    ids=["idle", "busy", "hung", "slow", "slow-and-hung"],
)
async def test_a_hung_engine_makes_not_ready_and_restarts_no_api(
    stage: Stage, running: int, age: float, limit: float, status: int
) -> None:
    await stage.worker.report(running_samples=running, last_step_age_s=age, hang_s=limit)
    assert (await stage.client.get("/readyz")).status_code == status
    assert (await stage.client.get("/livez")).status_code == 200


async def test_metrics_are_well_formed_and_true(open_stage: OpenStage) -> None:
    stage = await open_stage(worker=False)
    await stage.worker.report(running_samples=3, max_rows=4, backlog_rows=30)
    await stage.queued(condition={"label": "lemon"})
    await stage.queued(condition={"label": "lemon"})
    await stage.client.get("/nope")
    text = (await stage.client.get("/metrics")).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert all(":" not in name for name in families)
    values = {name: family.samples[0].value for name, family in families.items() if family.samples}
    assert values["dit_redis_up"] == 1
    assert values["dit_queue_depth"] == 2
    assert values["dit_queue_rows"] == 80
    assert values["dit_workers"] == 1
    assert values["dit_running_samples"] == 3
    # 10,000 rows a second, and 30 + 80 rows that are due in a minute.
    assert values["dit_backlog_workers"] == pytest.approx(110 / 10_000 / 60)
    # Two requests of 40 rows.
    assert values["dit_offered_worker_seconds"] >= 80 / 10_000
    assert values["dit_jobs_dead"] == 0
    requests = {
        (sample.labels["route"], sample.labels["outcome"]): sample.value
        for sample in families["dit_requests"].samples
    }
    assert requests["/generate", "accepted"] >= 2
    assert requests["unmatched", "invalid"] >= 1


async def test_one_load_snapshot_serves_many_requests(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_cache, "LOAD_FRESH_S", 60.0)
    taken = 0
    load = stage.broker.load

    async def counted() -> LoadSnapshot:
        nonlocal taken
        taken += 1
        return await load()

    monkeypatch.setattr(stage.broker, "load", counted)
    await asyncio.gather(*(stage.client.get("/readyz") for _ in range(5)))
    assert taken == 1


async def test_metrics_can_be_turned_off(open_stage: OpenStage) -> None:
    assert (await (await open_stage(metrics=False)).client.get("/metrics")).status_code == 404


def test_processes_share_their_metrics_through_a_folder_of_any_name(tmp_path: Path) -> None:
    tmp_path = tmp_path / "a [b]* #?"
    tmp_path.mkdir()
    count = "from ditserve.service.telemetry import metrics; "
    count += "metrics.STEP_SECONDS.labels('onnx').observe(0.02); metrics.LEASES_EXPIRED.inc()"
    show = "from ditserve.service.telemetry import metrics; from pathlib import Path; import sys; "
    show += "sys.stdout.buffer.write(metrics.exposition({}, redis_up=True, shared=Path(sys.argv[1])))"
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", count], check=True, env=environment)
    shown = subprocess.run(
        [sys.executable, "-c", show, str(tmp_path)],
        check=True,
        env=environment,
        capture_output=True,
        text=True,
    ).stdout
    assert 'dit_step_seconds_count{backend="onnx"} 2.0' in shown
    assert "dit_leases_expired_total 2.0" in shown


def test_the_api_starts_without_a_network_runtime() -> None:
    code = "import sys, ditserve.service.http.api; "
    code += "print([m for m in ('torch', 'onnxruntime', 'onnx') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        == "[]\n"
    )


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--bundle", "/nonexistent"], "is not a bundle"),
        (["--redis-url", "http://127.0.0.1"], "Redis URL"),
        ([], "REDIS_URL is not set"),
    ],
)
def test_what_cannot_work_is_one_sentence(bundle_path: Path, flags: list[str], sentence: str) -> None:
    code = "import sys; from ditserve.service.http.api import run; "
    code += "from ditserve.service.settings import Settings; "
    code += "sys.exit(run(Settings.load(sys.argv[1:])))"
    argv = [sys.executable, "-c", code, "--bundle", str(bundle_path), *flags]
    ended = subprocess.run(argv, capture_output=True, text=True, env={}, timeout=120)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert sentence in ended.stderr
    assert ended.stderr.count("\n") == 1

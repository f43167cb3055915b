"""The load generator: its schedule does not wait for the server, what it tells is what happened, and every server is asked in its words."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditserve.bench import load
from ditserve.bench.adapters import ADAPTERS, Told
from ditserve.bench.answers import P99_NEEDS, Exchange, Promise, Summary
from ditserve.bench.site import free_port
from ditserve.bench.workload import Asked, Kind, Workload
from tests.service.tiny_bundle import write_bundle

SHORT, LONG = Kind(20, True), Kind(50, False)
PROMISE = Promise({SHORT: 1.0, LONG: 2.0})
FULL, CUT = Told(20, "dpmpp-2m-20", False), Told(10, "unipc-1-10", True)


class Time:
    """A clock that only sleeping moves; waking is `late` by so much."""

    def __init__(self, late: float = 0.0) -> None:
        self.now, self.late = 100.0, late

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)  # whoever was started until now has begun
        self.now += seconds + self.late


def at(*times: float) -> list[Asked]:
    return [Asked(time, SHORT, 0, k) for k, time in enumerate(times)]


def exchange(latency: float, kind: Kind = SHORT, status: int = 200, told: Told | None = FULL) -> Exchange:
    return Exchange(Asked(3.0, kind, 0, 0), 3.0, 3.0 + latency, status, told if status == 200 else None)


def summary(*exchanges: Exchange) -> Summary:
    rungs = {"dpmpp-2m-20": 0.04, "unipc-1-10": 0.06}
    return Summary.of([exchanges], PROMISE, distance=rungs, frechet={"dpmpp-2m-20": 34.0})


@pytest.mark.anyio
async def test_requests_leave_on_time_whatever_becomes_of_the_others() -> None:
    time, never = Time(), asyncio.Event()

    async def send(asked: Asked) -> tuple[int, Told | None]:
        if asked.seed == 0:
            await never.wait()  # the first is answered when all others have been
        elif asked.seed == 2:
            never.set()
        return 200, FULL

    found = await load.offer(at(0.0, 0.5, 2.0), send, clock=time.clock, sleep=time.sleep)
    assert [each.sent for each in found] == pytest.approx([0.0, 0.5, 2.0])
    assert found[0].latency == pytest.approx(2.0)


@pytest.mark.anyio
async def test_lateness_does_not_add_up_and_counts_as_latency() -> None:
    time = Time(late=0.3)

    async def send(asked: Asked) -> tuple[int, Told | None]:
        return 200, FULL

    found = await load.offer(at(0.0, 1.0, 1.1, 3.0), send, clock=time.clock, sleep=time.sleep)
    assert [each.lag for each in found] == pytest.approx([0.3, 0.3, 0.2, 0.3])
    assert found[1].latency == pytest.approx(0.3)


def test_percentiles_are_those_of_numpy_and_told_of_enough_answers_only() -> None:
    latency = np.random.default_rng(0).exponential(1.0, P99_NEEDS)
    found = summary(*map(exchange, latency))
    assert (found.p50, found.p95, found.p99) == pytest.approx(tuple(np.percentile(latency, (50, 95, 99))))
    assert found.attainment == np.mean(latency <= 3.0)
    assert found.attainment_low < found.attainment < found.attainment_high
    assert summary(*map(exchange, latency[:-1])).p99 is None


def test_whatever_is_not_answered_in_time_is_a_miss() -> None:
    ends = [
        exchange(1.0),
        exchange(3.5),
        exchange(0.1, status=503),
        exchange(9.0, status=504),
        exchange(5.0, LONG),
    ]
    found = summary(*ends)
    assert found.attainment == pytest.approx(2 / 5)
    assert (found.refused, found.failed) == pytest.approx((0.2, 0.2))
    assert found.achieved_per_s == pytest.approx(3 / 9.0)
    assert found.goodput_per_s == pytest.approx(2 / 9.0)
    assert summary(exchange(0.1, status=503)).p50 is None


def test_quality_is_that_of_the_rungs_used() -> None:
    found = summary(exchange(1.0), exchange(1.0, told=CUT))
    assert (found.steps, found.degraded) == pytest.approx((15.0, 0.5))
    assert found.distance == pytest.approx(0.05)
    assert found.frechet == pytest.approx(34.0)
    assert summary(exchange(9.0)).distance is None


def test_a_workload_is_the_same_for_everyone_and_as_mixed_as_it_says() -> None:
    workload = Workload(10)
    asked = workload.draw(4000, 2.0, 7)
    assert asked == workload.draw(4000, 2.0, 7)
    assert sum(workload.kinds.values()) == pytest.approx(1.0)
    for kind, share in workload.kinds.items():
        assert np.mean([each.kind == kind for each in asked]) == pytest.approx(share, abs=0.03)
    counts = np.bincount([each.label for each in asked], minlength=10)
    assert counts[0] / counts[4] == pytest.approx(5.0, rel=0.25)  # Zipf
    assert len({each.seed for each in asked}) == 4000


@pytest.fixture
def answers() -> dict[str, Any]:
    """What the fake server heard, and how it answers."""
    return {"heard": [], "status": 200, "headers": {}}


@pytest.fixture
async def url(answers: dict[str, Any]) -> Any:
    """A server on a socket that takes one request a connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(line for line in head.lower().split("\r\n") if line.startswith("content-length"))
        body = await reader.readexactly(int(length.partition(":")[2]))
        answers["heard"].append((head.split()[1], json.loads(body)))
        headers = {"content-length": "2", "connection": "close", **answers["headers"]}
        lines = [
            f"HTTP/1.1 {answers['status']} Fine",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        writer.write("\r\n".join([*lines, "", "ok"]).encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


OURS = {"x-steps-used": "12", "x-rung": "dpmpp-2m-12", "x-degraded": "true"}
WISH = {"label": 3, "steps": 20, "guidance": 2.0, "seed": 8}
PLAIN = {
    "condition": {"label": 3},
    "steps": 20,
    "sampler": "dpmpp-2m",
    "grid": "trailing",
    "guidance_scale": 2.0,
    "seed": 8,
}
HEARD: dict[str, dict[str, Any]] = {
    "service": {**PLAIN, "allow_degraded": True, "deadline_ms": 3000},
    "service-undegraded": {**PLAIN, "allow_degraded": False, "deadline_ms": 3000},
    "service-undated": {**PLAIN, "allow_degraded": False},
    "peer": WISH,
    "bentoml": {"wishes": [WISH]},
    "ray": WISH,
}


@pytest.mark.anyio
@pytest.mark.parametrize("name", ADAPTERS)
async def test_every_server_is_asked_in_its_words(name: str, url: str, answers: dict[str, Any]) -> None:
    adapter, ours = ADAPTERS[name], name.startswith("service")
    answers["headers"] = OURS if ours else {}
    asked = Asked(0.0, SHORT, 3, 8)
    async with load.connect(url) as http:
        status, told = await load.sender(http, adapter, PROMISE)(asked)
        answers["status"] = 503
        refused = await load.sender(http, adapter, PROMISE)(asked)
    assert answers["heard"][0] == (adapter.path, HEARD[name])
    assert (status, told) == (200, Told(12, "dpmpp-2m-12", True) if ours else FULL)
    assert refused == (503, None)


@pytest.mark.anyio
async def test_a_server_that_is_gone_is_an_answer_too(unused: str) -> None:
    async with load.connect(unused) as http:
        assert await load.sender(http, ADAPTERS["peer"], None)(at(0.0)[0]) == (0, None)


@pytest.fixture
def unused() -> str:
    return f"http://127.0.0.1:{free_port()}"


def test_a_run_whose_requests_left_late_is_void(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bundle(tmp_path, weights=False)

    async def alone(workload: Workload, send: load.Send) -> dict[Kind, float]:
        return dict.fromkeys(workload.kinds, 1.0)

    def offering(lag: float) -> Callable[..., Awaitable[list[Exchange]]]:
        async def offer(asked: list[Asked], send: load.Send) -> list[Exchange]:
            return [Exchange(each, each.at + lag, each.at + 1.0, 200, FULL) for each in asked]

        return offer

    async def counted(http: Any, adapter: Any) -> tuple[float, float]:
        counters.append(counters[-1] + 10.0)
        return 3 * counters[-1], counters[-1]

    counters = [0.0]
    monkeypatch.setattr(load, "unloaded", alone)
    monkeypatch.setattr(load, "_passes", counted)
    for lag, status in ((0.004, 0), (0.006, 1)):
        monkeypatch.setattr(load, "offer", offering(lag))
        out = tmp_path / "out.json"
        command = ["http://nowhere", "--rate=5", "--requests=50", f"--bundle={tmp_path}", f"--out={out}"]
        assert load.main([*command, f"--pid={os.getpid()}"]) == status
        result = json.loads(out.read_text())
        assert result["void"] is bool(status)
        assert (result["offered"], result["attainment"], result["rows_per_pass"]) == (50, 1.0, 3.0)
        assert result["processor_s_per_image"] >= 0.0
        assert result["resident_mib"] > 1.0
    assert "void" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_one_sentence(
    unused: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bundle(tmp_path, weights=False)
    assert load.main([unused, "--rate=5", f"--bundle={tmp_path}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1

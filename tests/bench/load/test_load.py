"""The load generator: its schedule does not wait for the server, and every server is asked in its dialect."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditserve.bench.load import __main__ as command
from ditserve.bench.load import generator
from ditserve.bench.load.adapters import ADAPTERS, Drawing, DrawnWith
from ditserve.bench.load.processes import Consumption, batch_counters, free_port, process_tree
from ditserve.bench.load.summary import P99_NEEDS, Exchange, LoadSummary, Promise, RungQualities
from ditserve.bench.load.workload import OfferedRequest, RequestKind, Workload
from tests.service.tiny_bundle import write_bundle

SHORT, LONG = RequestKind(20, True), RequestKind(50, False)
PROMISE = Promise({SHORT: 1.0, LONG: 2.0})
FULL, CUT = DrawnWith(20, "dpmpp-2m-20", False), DrawnWith(10, "unipc-1-10", True)


class Time:
    """A clock that only sleeping moves; every sleep lasts `late` seconds too long."""

    def __init__(self, late: float = 0.0) -> None:
        self.now, self.late = 100.0, late

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)  # whoever was started until now has begun
        self.now += seconds + self.late


def at(*times: float) -> list[OfferedRequest]:
    return [OfferedRequest(time, SHORT, 0, k) for k, time in enumerate(times)]


def exchange(
    latency: float, kind: RequestKind = SHORT, status: int = 200, drawn_with: DrawnWith | None = FULL
) -> Exchange:
    return Exchange(
        OfferedRequest(3.0, kind, 0, 0), 3.0, 3.0 + latency, status, drawn_with if status == 200 else None
    )


def summary(*exchanges: Exchange) -> LoadSummary:
    distance, frechet = {"dpmpp-2m-20": 0.04, "unipc-1-10": 0.06}, {"dpmpp-2m-20": 34.0}
    return LoadSummary.of([exchanges], PROMISE, RungQualities(distance, frechet))


@pytest.mark.anyio
async def test_requests_leave_on_time_whatever_becomes_of_the_others() -> None:
    time, never = Time(), asyncio.Event()

    async def send(request: OfferedRequest) -> tuple[int, DrawnWith | None]:
        if request.seed == 0:
            await never.wait()  # the first is answered when all others have been
        elif request.seed == 2:
            never.set()
        return 200, FULL

    found = await generator.offer(at(0.0, 0.5, 2.0), send, clock=time.clock, sleep=time.sleep)
    assert [exchange.sent for exchange in found] == pytest.approx([0.0, 0.5, 2.0])
    assert found[0].latency == pytest.approx(2.0)


@pytest.mark.anyio
async def test_lateness_does_not_add_up_and_counts_as_latency() -> None:
    time = Time(late=0.3)

    async def send(request: OfferedRequest) -> tuple[int, DrawnWith | None]:
        return 200, FULL

    found = await generator.offer(at(0.0, 1.0, 1.1, 3.0), send, clock=time.clock, sleep=time.sleep)
    assert [exchange.lag for exchange in found] == pytest.approx([0.3, 0.3, 0.2, 0.3])
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
    found = summary(exchange(1.0), exchange(1.0, drawn_with=CUT))
    assert (found.steps, found.degraded) == pytest.approx((15.0, 0.5))
    assert found.distance == pytest.approx(0.05)
    assert found.frechet == pytest.approx(34.0)
    assert summary(exchange(9.0)).distance is None


def test_a_workload_is_the_same_for_everyone_and_as_mixed_as_it_says() -> None:
    workload = Workload(10)
    requests = workload.draw(4000, 2.0, 7)
    assert requests == workload.draw(4000, 2.0, 7)
    assert sum(workload.kinds.values()) == pytest.approx(1.0)
    for kind, share in workload.kinds.items():
        assert np.mean([request.kind == kind for request in requests]) == pytest.approx(share, abs=0.03)
    counts = np.bincount([request.label for request in requests], minlength=10)
    assert counts[0] / counts[4] == pytest.approx(5.0, rel=0.25)  # Zipf
    assert len({request.seed for request in requests}) == 4000


@pytest.fixture
def answers() -> dict[str, Any]:
    """Return the record of the fake server: the requests it got, and its answer to all of them."""
    return {"heard": [], "status": 200, "headers": {}}


@pytest.fixture
async def url(answers: dict[str, Any]) -> Any:
    """Run a server on a socket that takes one request a connection."""

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
DRAWING = Drawing("dpmpp-2m", "trailing", 2.0, tuple({"label": k} for k in range(9)))
WISH = {"condition": {"label": 3}, "steps": 20, "guidance": 2.0, "seed": 8}
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
    adapter, ours = ADAPTERS[name](DRAWING), name.startswith("service")
    answers["headers"] = OURS if ours else {}
    request = OfferedRequest(0.0, SHORT, 3, 8)
    async with generator.connect(url) as http:
        status, drawn_with = await generator.sender(http, adapter, PROMISE)(request)
        answers["status"] = 503
        refused = await generator.sender(http, adapter, PROMISE)(request)
    assert answers["heard"][0] == (adapter.path, HEARD[name])
    assert (status, drawn_with) == (200, DrawnWith(12, "dpmpp-2m-12", True) if ours else FULL)
    assert refused == (503, None)


@pytest.mark.anyio
async def test_a_server_that_is_gone_is_an_answer_too(unused: str) -> None:
    async with generator.connect(unused) as http:
        assert await generator.sender(http, ADAPTERS["peer"](DRAWING), None)(at(0.0)[0]) == (0, None)


@pytest.fixture
def unused() -> str:
    return f"http://127.0.0.1:{free_port()}"


def test_a_run_whose_requests_left_late_is_void(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bundle(tmp_path, weights=False)

    async def alone(workload: Workload, send: generator.Send) -> dict[RequestKind, float]:
        return dict.fromkeys(workload.kinds, 1.0)

    def offering(lag: float) -> Callable[..., Awaitable[list[Exchange]]]:
        async def offer(requests: list[OfferedRequest], send: generator.Send) -> list[Exchange]:
            return [Exchange(request, request.at + lag, request.at + 1.0, 200, FULL) for request in requests]

        return offer

    async def counted(http: Any, adapter: Any) -> tuple[float, float]:
        counters.append(counters[-1] + 10.0)
        return 3 * counters[-1], counters[-1]

    counters = [0.0]
    monkeypatch.setattr(generator, "unloaded", alone)
    monkeypatch.setattr(generator, "_counters", counted)
    for lag, status in ((0.004, 0), (0.006, 1)):
        monkeypatch.setattr(generator, "offer", offering(lag))
        out = tmp_path / "out.json"
        words = ["http://nowhere", "--rate=5", "--requests=50", f"--bundle={tmp_path}", f"--out={out}"]
        assert command.main([*words, f"--pid={os.getpid()}"]) == status
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
    assert command.main([unused, "--rate=5", f"--bundle={tmp_path}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.anyio
async def test_a_process_tree_is_counted_whole_and_passes_are_read() -> None:
    child = await asyncio.create_subprocess_exec("sleep", "60")
    try:
        assert {os.getpid(), child.pid} <= set(process_tree(os.getpid()))
        assert Consumption.of(os.getpid()).resident_mib > Consumption.of(child.pid).resident_mib > 0
    finally:
        child.kill()
        await child.wait()
    text = 'dit_batch_rows_sum{stop_reason="cap"} 30.0\ndit_batch_rows_count{stop_reason="cap"} 10.0\n'
    assert batch_counters(text + 'dit_batch_rows_sum{stop_reason="idle"} 6.0\n') == (36.0, 10.0)

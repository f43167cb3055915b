"""The whole service as processes: it comes up, heals, and goes without leaving anything behind."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from ditserve.service.jobs import Job
from ditserve.service.queue.broker import Broker

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).resolve().parents[3]
WaitUntil = Callable[..., Awaitable[Any]]


def service(
    *arguments: str,
    log: Path | None = None,
    command: Sequence[str] = ("-m", "service"),
    **environment: str,
) -> subprocess.Popen[str]:
    """Start `python -m service` in a clean environment; its stderr is appended to `log`, or can be read."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("REDIS_URL",)}
    with ExitStack() as stack:
        return subprocess.Popen(
            [sys.executable, *command, *arguments],
            cwd=ROOT,
            env={**inherited, "DIT_LOG_LEVEL": "warning", "DIT_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if log is None else stack.enter_context(log.open("a")),
            text=True,
        )


def processes() -> dict[int, tuple[int, str]]:
    """Return every process that is not a zombie: pid → (parent, command)."""
    listing = subprocess.run(
        ["ps", "-axwwo", "pid=,ppid=,stat=,command="], capture_output=True, text=True, check=True
    )
    rows = (line.split(None, 3) for line in listing.stdout.splitlines())
    return {
        int(pid): (int(parent), command) for pid, parent, stat, command in rows if not stat.startswith("Z")
    }


def offspring(pid: int) -> dict[int, str]:
    """Return all descendants of a process: pid → command."""
    running = processes()
    descendants: dict[int, str] = {}
    generation = {pid}
    while generation:
        generation = {child for child, (parent, _) in running.items() if parent in generation}
        descendants |= {child: running[child][1] for child in generation}
    return descendants


@contextmanager
def killed(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Kill a process and all that it started when the block ends."""
    try:
        yield
    finally:
        left = set(offspring(process.pid))
        process.kill()
        process.communicate()
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def one(family: dict[int, str], command: str) -> int:
    """Return the pid of the only child that runs a command; shells that guard it do not count."""
    (pid,) = (pid for pid, line in family.items() if line.endswith(command) and "/bin/sh" not in line)
    return pid


class Running:
    """A service that has said it is ready."""

    def __init__(self, process: subprocess.Popen[str], greeting: str) -> None:
        self.process, self.greeting = process, greeting
        self.curl = shlex.split(greeting.partition("try: ")[2])
        self.url = next(word for word in self.curl if word.startswith("http"))

    @property
    def family(self) -> dict[int, str]:
        return offspring(self.process.pid)

    def generate(self) -> httpx.Response:
        """Send the request that the greeting suggests, in few steps."""
        body = httpx.Response(200, content=self.curl[self.curl.index("-d") + 1]).json()
        return httpx.post(
            self.url, json={**body, "steps": 2}, headers={"accept": "image/png"}, timeout=120, trust_env=False
        )


@asynccontextmanager
async def serving(*arguments: str, log: Path | None = None, **environment: str) -> AsyncIterator[Running]:
    process = service("--port=0", *arguments, log=log, **environment)
    assert process.stdout is not None
    with killed(process):
        greeting = process.stdout.readline()
        assert " ready on http://127.0.0.1:" in greeting, process.stderr and process.stderr.read()
        yield Running(process, greeting)


async def gone(wait_until: WaitUntil, pids: set[int]) -> None:
    await wait_until(lambda: not pids & set(processes()), timeout=120, every=0.05)


async def test_it_serves_heals_and_stops_in_order(wait_until: WaitUntil) -> None:
    async with serving() as running:
        family = running.family
        assert any("valkey-server" in line for line in family.values()), "no REDIS_URL: a private Valkey"
        answer = running.generate()
        assert answer.status_code == 200
        assert Image.open(BytesIO(answer.content)).format == "PNG"
        worker = one(family, "-m ditserve.service worker")
        os.kill(worker, signal.SIGKILL)
        await wait_until(lambda: worker_other_than(running, worker), timeout=120, every=0.05)
        assert running.generate().status_code == 200
        everyone = set(running.family) | set(family)
        running.process.send_signal(signal.SIGINT)
        output, errors = running.process.communicate()
        assert running.process.returncode == 0
        assert output == "", "one line, printed once"
        assert "Traceback" not in errors
        await gone(wait_until, everyone)


def worker_other_than(running: Running, pid: int) -> bool:
    workers = [
        p
        for p, line in running.family.items()
        if line.endswith("-m ditserve.service worker") and "/bin/sh" not in line
    ]
    return bool(workers) and pid not in workers


async def test_nothing_outlives_a_supervisor_that_is_killed(wait_until: WaitUntil) -> None:
    async with serving("--drain-s=1") as running:
        family = set(running.family)
        assert len(family) >= 3
        running.process.kill()
        await gone(wait_until, family)


async def test_the_end_of_the_api_is_the_end_of_the_service(
    wait_until: WaitUntil, connect: Callable[..., Awaitable[Broker]], redis_url: str, namespace: str
) -> None:
    async with serving(f"--namespace={namespace}", REDIS_URL=redis_url) as running:
        family = running.family
        assert not any("valkey-server" in line for line in family.values())
        os.kill(one(family, "-m ditserve.service api"), signal.SIGKILL)
        _, errors = running.process.communicate()
        assert running.process.returncode == 1
        assert "ended unexpectedly" in errors
        await gone(wait_until, set(family))
    broker = await connect()
    assert (await broker.load()).workers == ()


@pytest.fixture
def taken_port() -> Any:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


async def test_what_cannot_work_is_one_sentence(tmp_path: Path, taken_port: int) -> None:
    (tmp_path / "manifest.json").write_text("{")
    attempts = [
        (service("--bundle=nowhere", "--port=0"), "nowhere is not a bundle"),
        (service(f"--bundle={tmp_path}", "--port=0"), "is not valid JSON"),
        (
            service(f"--port={taken_port}"),
            f"cannot listen on 127.0.0.1:{taken_port} (Address already in use)",
        ),
        (service("--port=0", REDIS_URL="http://127.0.0.1:1"), "must specify one of the following schemes"),
        (service("--port=0", "--ready-workers=2"), "--ready-workers 2 is above --workers 1"),
        (service("worker"), "REDIS_URL is not set"),
        (service("sing"), "unknown command 'sing'"),
        (service("dead", "list"), "REDIS_URL is not set"),
    ]
    for process, sentence in attempts:
        output, errors = process.communicate()
        assert process.returncode == 2, errors
        assert errors.startswith("error: ")
        assert sentence in errors
        assert errors.count("\n") == 1
        assert "secret" not in errors
        assert output == ""


async def test_a_port_that_another_took_is_one_sentence(taken_port: int, redis_url: str) -> None:
    """Also when it is taken after the supervisor has looked, which `race` plays."""
    race = "import sys; from ditserve.service.launch import supervisor as s; "
    race += "s.free_port = lambda host, port: port; "
    race += "sys.exit(s.run(s.Settings.load(sys.argv[1:])))"
    attempts = [
        (service(f"--port={taken_port}", command=("-c", race)), f"cannot listen on 127.0.0.1:{taken_port}"),
        (
            service("api", f"--port={taken_port}", REDIS_URL=redis_url),
            f"cannot listen on 127.0.0.1:{taken_port}",
        ),
        (
            service("worker", f"--worker-metrics-port={taken_port}", REDIS_URL=redis_url),
            f"cannot serve metrics on 0.0.0.0:{taken_port}",
        ),
    ]
    for process, sentence in attempts:
        output, errors = process.communicate()
        assert process.returncode == 2, errors
        assert errors.startswith(f"error: {sentence} (Address already in use); choose another with --")
        assert errors.count("\n") == 1
        assert output == ""


async def test_paths_may_hold_any_letter_and_workers_share_no_port(tmp_path: Path, taken_port: int) -> None:
    """TMPDIR holds the socket of Valkey and the metrics. The port is for the metrics of a lone worker."""
    folder = tmp_path / "a, b #%41 [x]*'\"ü"
    folder.mkdir()
    bundle = shutil.copytree(ROOT / "model/zoo/tiny", folder / "tiny")
    variables = {"TMPDIR": str(folder), "DIT_WORKER_METRICS_PORT": str(taken_port)}
    async with serving(f"--bundle={bundle}", "--workers=2", log=None, **variables) as running:
        assert running.generate().status_code == 200
        async with httpx.AsyncClient(trust_env=False) as client:
            page = (await client.get(running.url.replace("/generate", "/metrics"))).text
        assert 'dit_step_seconds_count{backend="onnx"}' in page, "the workers'"


async def test_dead_jobs_can_be_listed_and_requeued(
    connect: Callable[..., Awaitable[Broker]],
    make_job: Callable[..., Job],
    clock: Any,
    redis_url: str,
    namespace: str,
) -> None:
    broker = await connect(clock=clock, max_attempts=1)
    job = make_job()
    await broker.submit(job)
    await broker.claim("w1", models=["emoji"], max_samples=1)
    clock.advance(60)
    await broker.sweep()

    def dead(*words: str) -> tuple[int, str]:
        process = service("dead", *words, f"--namespace={namespace}", REDIS_URL=redis_url)
        output, errors = process.communicate()
        return process.returncode, output + errors

    status, listing = dead("list")
    assert status == 0
    assert listing.startswith(job.id)
    assert "worker=w1" in listing
    assert dead("requeue", job.id) == (0, f"{job.id} is queued again\n")
    assert dead("requeue", job.id) == (1, f"error: {job.id} is not a dead job\n")
    assert await broker.cancel(job.id)

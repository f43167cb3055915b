"""The table of exit statuses: what each process ends with, as started by a supervisor or by a person."""

from __future__ import annotations

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from ditserve.service import exit_statuses
from tests.service.launch.test_supervisor import one, service, serving

ROOT = Path(__file__).resolve().parents[2]
WaitUntil = Callable[..., Awaitable[Any]]
TINY = "--bundle=model/zoo/tiny"


def test_the_table_of_the_documentation_has_them_all() -> None:
    section = (ROOT / "docs/operations.md").read_text().partition("## Exit statuses")[2]
    listed = set(re.findall(r"^\| ([0-9]+) \|", section, re.MULTILINE))
    assert listed == {
        str(exit_statuses.DONE),
        str(exit_statuses.FAILED),
        str(exit_statuses.MISCONFIGURED),
    }


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (["--prot=1"], 2, "unknown flag --prot;"),
        (["api", "--bundle=nowhere"], 2, "nowhere is not a bundle"),
        (["worker", TINY, "--precision=int8"], 2, "backbone.int8.onnx is not part of this bundle"),
        (["worker", TINY, "--backend=tensorrt", "--device=cuda"], 2, "--device is for the torch backend"),
        (["dead", "list"], 1, "Redis cannot be reached."),
        (["keys", "--keys-file=keys.json", "revoke", "x"], 1, "no key"),
        (["generate", "x", "-o", "x.tiff"], 2, "end it in"),
    ],
)
def test_mistakes_and_failures_differ(
    words: list[str], status: int, sentence: str, embedded_url: str, tmp_path: Path
) -> None:
    url = "redis://127.0.0.1:1" if words[0] == "dead" else embedded_url
    words = [word.replace("=keys.json", f"={tmp_path}/keys.json") for word in words]
    process = service(*words, REDIS_URL=url, DIT_NAMESPACE="exits")
    _, errors = process.communicate()
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    told = errors.splitlines()[-1]
    assert told.startswith("error: ")
    assert sentence in told
    if status == exit_statuses.MISCONFIGURED and words[0] != "generate":
        assert told.endswith("starting this again does not help before it is mended)"), "a loop says so"


def test_a_person_at_a_terminal_is_told_the_mistake_alone() -> None:
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "service", "--prot=1"]
    ended = subprocess.run(words, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, timeout=120)
    os.close(theirs)
    told = os.read(ours, 4096).decode()
    os.close(ours)
    assert ended.returncode == 2
    assert told.startswith("error: unknown flag --prot;")
    assert "starting this again" not in told


def is_server(line: str) -> bool:
    """Return True for the command line of a Valkey, and not for that of a shell that starts one."""
    return Path(line.split()[0]).name == "valkey-server"


@pytest.mark.anyio
async def test_a_service_that_loses_a_part_it_needs_has_failed() -> None:
    async with serving(TINY) as running:
        (valkey,) = (pid for pid, line in running.family.items() if is_server(line))
        os.kill(valkey, signal.SIGKILL)
        _, errors = running.process.communicate()
        assert running.process.returncode == exit_statuses.FAILED
        assert "ended unexpectedly" in errors


@pytest.mark.anyio
async def test_a_worker_that_loops_on_its_configuration_says_so(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    """Its bundle is damaged while it serves, and the next start cannot help."""
    bundle, log = shutil.copytree(ROOT / "model/zoo/tiny", tmp_path / "tiny"), tmp_path / "log"
    log.touch()
    async with serving(f"--bundle={bundle}", log=log) as running:
        (bundle / "backbone.onnx").unlink()
        os.kill(one(running.family, "-m ditserve.service worker"), signal.SIGKILL)
        told = "no start of a worker helps before its configuration is mended"
        await wait_until(lambda: told in log.read_text(), timeout=120, every=0.1)

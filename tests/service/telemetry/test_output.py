"""Output that never stops a service, and a command that says when its product could not be written."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ditserve.service.telemetry.output import PENDING, LossyOutput

ROOT = Path(__file__).resolve().parents[3]
KEYS = [sys.executable, "-m", "service", "keys", "--keys-file"]
WaitUntil = Callable[..., Awaitable[Any]]


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    yield read, write
    for descriptor in (read, write):
        try:
            os.close(descriptor)
        except OSError:
            continue


def test_lines_are_written_in_order_before_the_end(pipe: tuple[int, int]) -> None:
    output = LossyOutput(pipe[1])
    for number in range(200):
        output.write(b"%d\n" % number)
    output.finish()
    assert os.read(pipe[0], 65536).split() == [b"%d" % number for number in range(200)]


@pytest.mark.anyio
async def test_a_reader_that_stands_still_costs_lines_and_no_time(
    pipe: tuple[int, int], wait_until: WaitUntil
) -> None:
    output = LossyOutput(pipe[1])
    line = b"x" * 999 + b"\n"
    began = time.monotonic()
    for _ in range(3 * PENDING):
        assert output.write(line) == len(line)
    assert time.monotonic() - began < 1.0
    # It reads again: what waited comes, and new lines after it.
    received = 0
    while received < PENDING * len(line):
        received += len(os.read(pipe[0], 1 << 20))
    assert received < 2 * PENDING * len(line), "the memory for a slow reader is bounded"
    await wait_until(lambda: output.write(b"last\n") and b"last" in os.read(pipe[0], 1 << 20))


def test_a_reader_that_leaves_costs_lines_only(pipe: tuple[int, int]) -> None:
    output = LossyOutput(pipe[1])
    os.close(pipe[0])
    assert output.write(b"lost\n") == 5
    output.finish()
    assert output.write(b"lost too\n") == 9


def test_a_pipe_that_another_process_made_non_blocking_is_written_whole(pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    output = LossyOutput(pipe[1])
    output.write(b"x" * 300_000)
    received = 0
    while received < 300_000:
        received += len(os.read(pipe[0], 65536))
    output.finish()


def test_a_command_says_that_its_product_was_not_written(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [*KEYS, str(tmp_path / "keys"), "add", "ada"]
        add = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert add.returncode == 1
    assert add.stderr.splitlines()[-1] == "error: [Errno 28] No space left on device"
    assert "Traceback" not in add.stderr


def test_a_command_whose_reader_left_is_quiet(tmp_path: Path, pipe: tuple[int, int]) -> None:
    os.close(pipe[0])
    command = [sys.executable, "-m", "service", "--help"]
    ended = subprocess.run(command, cwd=ROOT, stdout=pipe[1], stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_a_command_without_stderr_gives_its_product(tmp_path: Path) -> None:
    shell = ["/bin/sh", "-c", 'exec "$@" 2>&-', "keys", *KEYS, str(tmp_path / "keys"), "add", "ada"]
    ended = subprocess.run(shell, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 0
    assert ended.stdout.startswith("dit_")

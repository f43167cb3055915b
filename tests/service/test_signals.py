"""SIGHUP: a request to reload, or the end of the terminal that the process was started in."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_PROGRAM = """
import asyncio, sys
from ditserve.service.signals import on_hang_up

async def main():
    calls = asyncio.Queue()
    on_hang_up(lambda: calls.put_nowait("reload"), stop=lambda: calls.put_nowait("stop"))
    print("ready", file=sys.stderr, flush=True)
    while (word := await calls.get()) == "reload":
        print(word, file=sys.stderr, flush=True)
    print(word, file=sys.stderr, flush=True)

asyncio.run(main())
"""


@contextmanager
def listening(*command: str, terminal: int | None) -> Iterator[subprocess.Popen[str]]:
    """Start a process that writes to its stderr what SIGHUP meant; `terminal` is the one it controls."""

    def control() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever the tests were started with
        os.setsid()
        if terminal is not None:
            # The first terminal that the leader of a session opens becomes the session's own.
            os.open(os.ttyname(terminal), os.O_RDWR)

    process = subprocess.Popen(
        [*command, sys.executable, "-c", _PROGRAM],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=control,
    )
    with process:
        try:
            assert heard(process) == "ready"
            yield process
        finally:
            process.kill()


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    return process.stderr.readline().strip()


@pytest.mark.parametrize("attached", [True, False], ids=["terminal", "no-terminal"])
def test_a_signal_sent_is_the_wish_to_reload(attached: bool) -> None:
    ours, theirs = pty.openpty()
    with listening(terminal=theirs if attached else None) as process:
        for _ in range(2):
            process.send_signal(signal.SIGHUP)
            assert heard(process) == "reload"
    os.close(ours)
    os.close(theirs)


def test_closing_the_terminal_stops() -> None:
    ours, theirs = pty.openpty()
    with listening(terminal=theirs) as process:
        os.close(theirs)
        os.close(ours)
        assert heard(process) == "stop"


def test_what_nohup_started_survives_its_terminal_and_can_be_reloaded() -> None:
    ours, theirs = pty.openpty()
    with listening("nohup", terminal=theirs) as process:
        os.close(theirs)
        os.close(ours)
        assert process.stderr is not None
        # A signal that comes together with the terminal's own is lost, so send several.
        for _ in range(200):
            process.send_signal(signal.SIGHUP)
            if select.select([process.stderr], [], [], 0.05)[0]:
                break
        assert heard(process) == "reload"

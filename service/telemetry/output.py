"""Standard output and error that never stop a service: a log line that cannot be written is lost.

The disk of a log may be full, the reader of a pipe may go away, read slowly or not at all, a stream may be
closed from the start, and its encoding may lack a letter. None of this raises or blocks here.

Commands whose product is their output keep a strict standard output: see `run_command`.
"""

from __future__ import annotations

import atexit
import errno
import io
import os
import select
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, BinaryIO, Literal, cast

PENDING = 1000  # writes that may wait for a slow reader; later ones are lost
LAST_S = 1.0  # for what still waits when the process ends
FAILED = 1

_DESCRIPTORS = {"stdout": 1, "stderr": 2}


class LossyOutput(io.RawIOBase):
    """Writes to a file descriptor in a thread of its own. `write` returns at once and never raises."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        # `SimpleQueue` may be entered anew by a finaliser or signal handler that logs in the middle of a put.
        self._pending: SimpleQueue[bytes | None] = SimpleQueue()
        self._writer = threading.Thread(target=self._write_pending, name=f"output {descriptor}", daemon=True)
        self._writer.start()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any, /) -> int:
        if self._pending.qsize() < PENDING:
            self._pending.put(bytes(data))
        return len(data)

    def finish(self) -> None:
        """Wait a moment for what is still to be written."""
        self._pending.put(None)
        self._writer.join(LAST_S)

    def _write_pending(self) -> None:
        for data in iter(self._pending.get, None):
            with suppress(OSError):
                self._write_all(data)

    def _write_all(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:
                # Another process that has the same file made it non-blocking.
                select.select([], [self._descriptor], [])


def make_lossy(name: Literal["stdout", "stderr"]) -> None:
    """Replace `sys.stdout` or `sys.stderr` by one that never stops the process."""
    _open_closed()
    output = LossyOutput(_DESCRIPTORS[name])
    encoding = getattr(getattr(sys, name), "encoding", None) or "utf-8"
    text = io.TextIOWrapper(cast(BinaryIO, output), encoding, errors="backslashreplace", line_buffering=True)
    setattr(sys, name, text)
    atexit.register(output.finish)


def run_command(work: Callable[[], int]) -> int:
    """Run a command with a lossy stderr, and return its exit status.

    It is 1 if standard output could not be written: with one sentence, or without where the reader left
    early, as `head` does. `work` may make standard output lossy too.
    """
    make_lossy("stderr")
    output: Any = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (it lives as long as the process)
    output.reconfigure(errors="backslashreplace")
    sys.stdout = output
    try:
        try:
            return work()
        finally:
            sys.stdout.flush()
    except OSError as error:
        if sys.stdout is not output:
            # A lossy one does not raise: this is another error.
            raise
        if error.errno != errno.EPIPE:
            print(f"error: {error}", file=sys.stderr)
        # Python would write the rest when it ends, and fail again.
        sys.stdout = None
        return FAILED


def _open_closed() -> None:
    """Open the null device in the place of each standard stream that is closed.

    Else the next file or socket would get its number, and what a library prints.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest free number is taken, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)

"""Child processes that do not outlive this one.

Each child is started through a shell that first starts a watcher and then becomes the child. The watcher
reads a pipe whose other end only this process holds. When this process ends, even by SIGKILL, the pipe ends,
and the watcher sends the child SIGTERM, and SIGKILL a few seconds later.

Each child has a session of its own, so that a Ctrl-C in the terminal reaches this process alone, which then
stops its children in order.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

GRACE_S = 5  # from SIGTERM to SIGKILL for an orphan
_GUARD = f"""
exec 3<&0 </dev/null
(
  cat <&3 >/dev/null 2>&1
  kill -TERM $$ 2>/dev/null || exit 0
  sleep {GRACE_S}
  kill -KILL $$ 2>/dev/null
) >/dev/null 2>&1 &
exec 3<&-
exec "$@"
"""


@dataclass(slots=True)
class Child:
    """A child process; its pid is that of the command itself."""

    name: str
    process: asyncio.subprocess.Process
    lifeline: int  # this process' end of the pipe; -1 once it is closed

    @classmethod
    async def start(
        cls,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        folder: Path | None = None,
        log: Path | None = None,
    ) -> Child:
        """Start a command in `folder`; what it prints is appended to `log`, or goes where ours goes.

        Raise `OSError` if it cannot be started.
        """
        read, write = os.pipe()
        with ExitStack() as stack:
            stack.callback(os.close, read)
            on_failure = stack.enter_context(ExitStack())
            on_failure.callback(os.close, write)
            output = stack.enter_context(log.open("ab")) if log else None
            process = await asyncio.create_subprocess_exec(
                *("/bin/sh", "-c", _GUARD, name, *command),
                stdin=read,
                stdout=output,
                stderr=output,
                env=environment,
                cwd=folder,
                start_new_session=True,
            )
            on_failure.pop_all()
        return cls(name, process, write)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.returncode is None

    async def wait(self) -> int:
        """Return the exit status when the child has ended; it is negative for a signal."""
        status = await self.process.wait()
        self.release()
        return status

    def signal(self, number: signal.Signals) -> None:
        if self.running:
            self.process.send_signal(number)

    async def stop(self, timeout_s: float) -> int:
        """Send SIGTERM, and SIGKILL after the timeout; return the exit status."""
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(timeout_s):
                return await self.wait()
        except TimeoutError:
            self.signal(signal.SIGKILL)
            return await self.wait()

    def release(self) -> None:
        """Close the pipe of a child that has ended, so that its watcher ends."""
        if self.lifeline >= 0:
            os.close(self.lifeline)
            self.lifeline = -1

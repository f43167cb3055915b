"""Signals as events of the running loop, and waiting for the first of several events."""

import asyncio
import os
import signal
from collections.abc import Callable


def stop_signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Return the events of the first and the second SIGTERM or SIGINT: stop in order, and force the stop."""
    stop, force_stop = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (force_stop if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stop, force_stop


def on_hang_up(reload: Callable[[], None], *, stop: Callable[[], None]) -> None:
    """Call `reload` on SIGHUP, unless the signal comes because the terminal was closed: then call `stop`.

    A process that nohup started ignores the closing of its terminal.
    """
    ignores_close = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    has_terminal = _has_terminal()

    def on_signal() -> None:
        nonlocal has_terminal
        had_terminal, has_terminal = has_terminal, _has_terminal()
        closed = had_terminal and not has_terminal
        if not closed:
            reload()
        elif not ignores_close:
            stop()

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, on_signal)


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return False
    return True


async def first(*events: asyncio.Event, timeout_s: float | None = None) -> bool:
    """Return True once one of the events is set, False after the timeout."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        done, _ = await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        return bool(done)
    finally:
        for wait in waits:
            wait.cancel()

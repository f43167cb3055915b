"""Signals as events of the running loop, and waiting for the first of several events."""

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT)


def stop_signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Return the events of the first and the second SIGTERM or SIGINT: stop in order, and force the stop."""
    stop, force_stop = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (force_stop if stop.is_set() else stop).set()

    for number in STOPPING:
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    return stop, force_stop


def hold_signals() -> None:
    """Keep signals for the process that this one becomes by `execv`: it hears them once it listens."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {*STOPPING, signal.SIGHUP})


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
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return False
    return True


async def unless(stop: asyncio.Event, work: Coroutine[Any, Any, object]) -> bool:
    """Return True once the work is done, or False once `stop` is set: then the work is cancelled."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
        return working.done()
    finally:
        working.cancel()
        stopping.cancel()
        await asyncio.wait((working, stopping))


async def first(*events: asyncio.Event, timeout_s: float | None = None) -> bool:
    """Return True once one of the events is set, False after the timeout."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        done, _ = await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        return bool(done)
    finally:
        for wait in waits:
            wait.cancel()

"""Signals as events of the running loop, and waiting for the first of several events."""

import asyncio
import os
import signal
from collections.abc import Callable


def stop_signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Events of the first and the second SIGTERM or SIGINT: stop, and hurry."""
    stop, hurry = asyncio.Event(), asyncio.Event()

    def signalled() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, signalled)
    return stop, hurry


def on_hang_up(reload: Callable[[], None], *, stop: Callable[[], None]) -> None:
    """SIGHUP is the wish to reload. When it comes because the terminal was closed it still means to stop, or nothing to what
    nohup started.
    """
    immune, attached = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, _has_terminal()

    def signalled() -> None:
        nonlocal attached
        before, attached = attached, _has_terminal()
        if attached or not before:
            reload()
        elif not immune:
            stop()

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, signalled)


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return False
    return True


async def first(*events: asyncio.Event, timeout_s: float | None = None) -> bool:
    """Until one of the events is set. False after the timeout."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        done, _ = await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        return bool(done)
    finally:
        for wait in waits:
            wait.cancel()

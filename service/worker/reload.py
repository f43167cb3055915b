"""SIGHUP of a worker that runs by itself: its process begins anew with what the bundle's folder holds now.

The new bundle is opened first. If it cannot be used, or is the old one, the worker works on.
"""

from __future__ import annotations

import asyncio
import os
import sys

import structlog

from ditserve.model.spec.errors import BundleError
from ditserve.service.served_models import ServedModel
from ditserve.service.signals import on_hang_up

log = structlog.get_logger()


class Reload:
    """Watches for SIGHUP. `wanted` is True once a new bundle is there and the worker was told to drain."""

    def __init__(self, model: ServedModel, *, verify: bool) -> None:
        self.wanted = False
        self._model, self._verify = model, verify

    async def watch(self, stop: asyncio.Event) -> None:
        """Set `stop` once there is a new bundle, or when the terminal was closed."""
        hang_up = asyncio.Event()
        on_hang_up(hang_up.set, stop=stop.set)
        while not self.wanted:
            await hang_up.wait()
            hang_up.clear()
            self.wanted = not stop.is_set() and await asyncio.to_thread(self._changed)
        log.info("reloading", model=self._model.name, folder=str(self._model.folder))
        stop.set()

    def _changed(self) -> bool:
        """Return whether the folder holds another bundle that can be used."""
        fields = {"model": self._model.name, "folder": str(self._model.folder)}
        try:
            changed = self._model.reopened(verify=self._verify).digest != self._model.digest
        except (BundleError, OSError) as error:
            log.error("bundle not reloaded, the old one serves on", **fields, reason=str(error))
            return False
        if not changed:
            log.info("bundle unchanged", **fields)
        return changed


def begin_anew() -> None:
    """Run this process' command again in its place, under the same process id. Does not return."""
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

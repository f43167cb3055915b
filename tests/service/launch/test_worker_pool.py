"""The pool of workers: a fault in keeping one running does not end the keeping."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from ditserve.model.spec.bundle import Bundle
from ditserve.service.launch import worker_pool
from ditserve.service.launch.child_process import Child
from ditserve.service.launch.worker_pool import WorkerPool
from ditserve.service.served_models import ServedModel
from ditserve.service.settings import Settings
from tests.service.tiny_bundle import MANIFEST

pytestmark = pytest.mark.anyio


async def test_an_unforeseen_error_is_logged_and_the_worker_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., Awaitable[Any]]
) -> None:
    started: list[Child] = []
    attempts = 0

    async def start(command: str, settings: Settings) -> Child:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise RuntimeError("nobody foresaw this")
        started.append(await Child.start(command, ["sleep", "60"]))
        return started[-1]

    monkeypatch.setattr(worker_pool, "start_child", start)
    model = ServedModel(tmp_path, Bundle(tmp_path, MANIFEST), "dit")
    pool = WorkerPool(model, Settings.parse(["--workers=1"]), metrics_folder=tmp_path)
    pool.start()
    await wait_until(lambda: started, timeout=10)
    await pool.stop(5.0)
    assert not started[0].running

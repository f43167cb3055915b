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
from ditserve.service.telemetry.gpus import Gpu
from tests.service.tiny_bundle import MANIFEST

pytestmark = pytest.mark.anyio

ON_GPU = ("--backend=torch", "--device=cuda")


async def test_an_unforeseen_error_is_logged_and_the_worker_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., Awaitable[Any]]
) -> None:
    started: list[Child] = []
    attempts = 0

    async def start(command: str, settings: Settings, gpu: str | None) -> Child:
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


async def test_the_workers_of_a_gpu_keep_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., Awaitable[Any]]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = [Gpu(number, 0, 1, f"GPU-{number}") for number in range(2)]
    monkeypatch.setattr(worker_pool, "gpus", lambda: iter(found))
    log = tmp_path / "seen"
    script = f"echo $CUDA_VISIBLE_DEVICES >> {log}; exec sleep 60"
    monkeypatch.setattr(worker_pool, "process_words", lambda *words: ["/bin/sh", "-c", script])
    model = ServedModel(tmp_path, Bundle(tmp_path, MANIFEST), "dit")
    pool = WorkerPool(model, Settings.parse([*ON_GPU, "--workers=per-gpu=2"]), metrics_folder=tmp_path)
    pool.start()
    seen = ["GPU-0", "GPU-0", "GPU-1", "GPU-1"]
    await wait_until(lambda: log.is_file() and len(log.read_text().split()) == 4, timeout=30)
    await pool.stop(5.0)
    assert sorted(log.read_text().split()) == seen


def test_gpus_that_are_named_are_those_that_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-a")
    assert worker_pool.worker_gpus(Settings.parse([*ON_GPU, "--workers=per-gpu=2"])) == (
        "3",
        "3",
        "GPU-a",
        "GPU-a",
    )
    assert worker_pool.worker_gpus(Settings.parse(["--workers=3"])) == (None, None, None)


def test_workers_for_each_gpu_need_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(worker_pool, "gpus", lambda: iter(()))
    with pytest.raises(ValueError, match="--workers per-gpu=1 finds no GPU: pip install nvidia-ml-py"):
        worker_pool.worker_gpus(Settings.parse([*ON_GPU, "--workers=per-gpu=1"]))

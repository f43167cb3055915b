"""The memory of GPUs: NVML reports it where there is one, and nothing is reported elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY

from ditserve.service.telemetry import gpus, metrics


class Nvml:
    """Two GPUs, as nvidia-ml-py shows them; those numbered in `lost` do not answer."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, driver: bool = True, lost: tuple[int, ...] = ()) -> None:
        self._driver, self._lost = driver, lost

    def nvmlInit(self) -> None:
        if not self._driver:
            raise self.NVMLError("NVML Shared Library Not Found")

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        if handle in self._lost:
            raise self.NVMLError("GPU is lost")
        return SimpleNamespace(used=handle * 1000 + 7, total=80_000)

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    gpus._open_nvml.cache_clear()
    yield
    gpus._open_nvml.cache_clear()


def test_every_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, gpus.PACKAGE, Nvml())
    assert list(gpus.gpus()) == [gpus.Gpu(0, 7, 80_000, "GPU-0"), gpus.Gpu(1, 1007, 80_000, "GPU-1")]


def test_one_that_is_lost_does_not_hide_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, gpus.PACKAGE, Nvml(lost=(1,)))
    assert [gpu.index for gpu in gpus.gpus()] == [0]


@pytest.mark.parametrize("package", [None, Nvml(driver=False)], ids=["no-package", "no-driver"])
def test_without_a_gpu_there_is_nothing(monkeypatch: pytest.MonkeyPatch, package: object) -> None:
    monkeypatch.setitem(sys.modules, gpus.PACKAGE, package)
    assert list(gpus.gpus()) == []


def test_workers_show_it_in_their_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, gpus.PACKAGE, Nvml())
    metrics.observe_memory("api")
    assert REGISTRY.get_sample_value("dit_gpu_memory_used_bytes", {"gpu": "1"}) is None
    metrics.observe_memory("worker")
    assert REGISTRY.get_sample_value("dit_gpu_memory_used_bytes", {"gpu": "1"}) == 1007
    assert REGISTRY.get_sample_value("dit_gpu_memory_total_bytes", {"gpu": "0"}) == 80_000


@pytest.mark.gpu
def test_a_real_gpu_tells_its_memory() -> None:
    pytest.importorskip(gpus.PACKAGE, reason="nvidia-ml-py is not installed")
    first, *_ = gpus.gpus()
    assert 0 < first.used < first.total

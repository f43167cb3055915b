"""A cold start of the service, with the times and the memory that it reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditserve.bench import startup
from ditserve.model.spec.bundle import Bundle
from tests.service.tiny_bundle import write_bundle

pytestmark = pytest.mark.anyio


async def test_a_start_ends_with_an_image_and_tells_what_each_process_holds(tmp_path: Path) -> None:
    write_bundle(tmp_path, weights=False)
    request = startup.image_request(Bundle.open(tmp_path).manifest, steps=2)
    times, memory = await startup.cold_start(tmp_path, request, images=3)
    assert 0 < times.ready_s < times.image_s
    assert list(memory) == ["idle", "after 3 images"]
    for processes in memory.values():
        assert set(processes) == {"API", "worker", "Valkey", "supervisor"}
        assert all(mib > 0 for mib in processes.values())


async def test_a_service_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="did not come up"):
        await startup.cold_start(tmp_path / "missing", b"")

"""The private Valkey starts in any folder, and says why where it cannot."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from ditserve.service.launch import valkey
from ditserve.service.launch.valkey import LONGEST_SOCKET, ValkeyFailed, scratch_folder, start_valkey
from ditserve.service.queue.broker import Broker

pytestmark = pytest.mark.anyio
ODD = ["with space", "h#sh", "q\"uote's", "ünï☃", "new\nline", "[x]*?", "%41$HOME;&", "-dash"]


@pytest.mark.parametrize("name", ODD)
async def test_its_folder_may_have_any_name(name: str) -> None:
    with tempfile.TemporaryDirectory(suffix=name) as folder:
        server, url = await start_valkey(Path(folder))
        try:
            broker = await Broker.connect(url)
            await broker.aclose()
        finally:
            await server.stop(5.0)
        assert url.isascii()


async def test_its_data_is_found_at_the_next_start(tmp_path: Path) -> None:
    for _ in range(2):
        server, _ = await start_valkey(tmp_path, durable=True)
        await server.stop(5.0)
    assert os.listdir(tmp_path / "appendonlydir")


@pytest.mark.parametrize("name", ["long" * 40, os.fsdecode(b"\xff\xfe")])
def test_scratch_is_elsewhere_where_a_socket_cannot_be(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, name)
        folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        with scratch_folder() as scratch:
            assert Path(scratch).parent == Path("/tmp")
            assert len(scratch) < LONGEST_SOCKET
        monkeypatch.setattr(tempfile, "tempdir", parent)
        with scratch_folder() as scratch:
            assert Path(scratch).parent == Path(parent)


async def test_it_says_why_it_did_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "valkey.sock").mkdir()
    with pytest.raises(
        ValkeyFailed, match=r"did not start \(.*Failed opening Unix socket.*\); set REDIS_URL"
    ):
        await start_valkey(tmp_path)
    with pytest.raises(ValkeyFailed, match=r"no queue server can be started .*No such file"):
        await start_valkey(tmp_path / "absent")
    with pytest.raises(ValkeyFailed, match="too long for a socket"):
        await start_valkey(tmp_path / ("long" * 30))
    monkeypatch.setitem(valkey._OPTIONS, "save", "nonsense")
    with pytest.raises(ValkeyFailed, match="Invalid save parameters"):
        await start_valkey(tmp_path)

"""API keys: adding, listing, revoking and finding them, the file that holds them, and open APIs."""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from ditserve.service.api_keys import (
    RETRY_S,
    ApiKey,
    Keyring,
    KeyringError,
    add,
    open_keyring,
    read,
    revoke,
    run,
)
from ditserve.service.settings import Settings


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_a_key_is_found_by_its_text_alone(path: Path) -> None:
    key, text = add(path, "shop", scopes=("generate", "admin"), rate=60, concurrency=2)
    by_text = Keyring(path).find(text)
    assert by_text == key
    assert (by_text.name, by_text.scopes, by_text.rate, by_text.concurrency) == (
        "shop",
        frozenset({"generate", "admin"}),
        60,
        2,
    )


@pytest.mark.parametrize(
    "change",
    [lambda t: t[:-1], lambda t: t[:-1] + "_", lambda t: "", lambda t: t.upper(), lambda t: t + "\n"],
)
def test_another_text_finds_nothing(path: Path, change: object) -> None:
    _, text = add(path, "shop")
    assert callable(change)
    assert Keyring(path).find(change(text)) is None


def test_a_secret_of_one_key_does_not_open_another(path: Path) -> None:
    (_, first), (_, second) = add(path, "a"), add(path, "b")
    mixed = first[:13] + second[13:]
    assert Keyring(path).find(mixed) is None


def test_the_file_holds_hashes_for_its_owner_only(path: Path) -> None:
    _, text = add(path, "shop")
    assert text.split("_", 2)[2] not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_revoked_key_is_gone_and_a_new_one_comes_while_running(path: Path) -> None:
    key, text = add(path, "shop")
    ring = Keyring(path)
    assert ring.find(text)
    assert revoke(path, key.id).name == "shop"
    assert ring.find(text) is None
    other, other_text = add(path, "other")
    assert ring.find(other_text) == other


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def lose_parent(path: Path) -> None:
    path.unlink()
    path.parent.rmdir()
    path.parent.write_text("a file where a folder was")


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        truncate,
        lambda path: path.write_text(""),
        lambda path: path.write_bytes(b"\0" * 99),
        replace_by_folder,
        replace_by_pipe,
        loop,
        lose_parent,
    ],
)
def test_a_file_damaged_while_running_keeps_the_known_keys(
    damage: Callable[[Path], object], path: Path
) -> None:
    key, text = add(path, "shop")
    ring = Keyring(path)
    path.with_name(f".{path.name}.lock").unlink()
    damage(path)
    with capture_logs() as events:
        for _ in range(3):
            assert ring.find(text) == key
            assert ring.holds(key.id)
    assert [str(path) in event["reason"] for event in events] == [True], "logged once"
    if path.parent.is_dir():
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        add(path, "other")
        assert ring.find(text) is None, "it is read again once it can be"


def test_a_file_that_its_reader_may_not_open_keeps_the_known_keys(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may read everything, so the refusal is played; so is the process that has no descriptor left."""
    _, text = add(path, "shop")
    ring = Keyring(path)
    revoke(path, ring.find(text).id)  # type: ignore[union-attr]
    for number in (errno.EACCES, errno.EMFILE, errno.EIO):
        with monkeypatch.context() as refusing:
            refusing.setattr(Path, "read_bytes", partialmethod(_fail, number))
            assert ring.find(text)
    later = time.monotonic() + RETRY_S
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert ring.find(text) is None, "a passing fault is not remembered"


def test_a_damaged_file_is_read_again_when_it_changed_or_after_a_while(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, text = add(path, "shop")
    ring = Keyring(path)
    whole = path.read_text()
    path.write_text("damaged")
    now, reads = time.monotonic(), 0

    def count(read: Path) -> bytes:
        nonlocal reads
        reads += read == path
        return read.read_text().encode()

    monkeypatch.setattr(Path, "read_bytes", count)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with capture_logs() as events:
        for _ in range(20):
            assert ring.find(text) == key
        assert reads == 1
        now += RETRY_S
        assert ring.holds(key.id)
        assert ring.holds(key.id)
        assert (reads, len(events)) == (2, 1)
        path.write_text("damaged in another way")
        assert ring.find(text) == key
        assert reads == 3
        path.write_text(whole.replace(key.id, "00000000"))
        assert ring.find(text) is None
        assert reads == 4
    assert len(events) == 1, "the reason is the same"


def _fail(path: Path, number: int) -> bytes:
    raise OSError(number, os.strerror(number))


def test_a_file_that_is_made_after_the_start_is_read(path: Path) -> None:
    ring = Keyring(path)
    with capture_logs() as events:
        assert ring.find("dit_") is None
    assert events == []
    _, text = add(path, "shop")
    assert ring.find(text)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"version": 2}', '{"keys": [{"id": "1"}]}', '{"keys": [], "more": 1}']
)
def test_a_broken_file_is_refused_by_name(path: Path, content: str) -> None:
    path.write_text(content)
    with pytest.raises(KeyringError, match=r"keys\.json is not a key file"):
        Keyring(path)


@pytest.mark.parametrize("time", ["NaN", "Infinity", "1e300", "-1e12"])
def test_a_time_that_cannot_be_is_refused_by_name(path: Path, time: str) -> None:
    add(path, "alice")
    path.write_text(re.sub(r'("created_at": ?)[0-9.]+', rf"\g<1>{time}", path.read_text()))
    with pytest.raises(KeyringError, match=r"keys\.json is not a key file: keys\.0\.created_at"):
        Keyring(path)


def test_commands(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = ["--keys-file", str(path)]
    assert run([*file, "add", "shop", "--rate", "60"]) == 0
    text = capsys.readouterr().out.strip()
    (key,) = read(path)
    assert Keyring(path).find(text) == key
    assert run([*file, "list"]) == 0
    listed = capsys.readouterr().out
    assert "shop" in listed
    assert "rate=60/min" in listed
    assert text not in listed
    assert run([*file, "revoke", key.id]) == 0
    assert run([*file, "revoke", key.id]) == 1
    assert key.id in capsys.readouterr().err
    assert run([*file, "add", "shop", "--rate", "0"]) == 1
    assert "greater than or equal to 1" in capsys.readouterr().err
    assert read(path) == ()


def test_commands_need_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list"]) == 2
    assert "--keys-file" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.8.8.8"])
def test_this_machine_alone_may_be_let_in_without_keys(host: str) -> None:
    assert open_keyring(Settings.parse([f"--host={host}"])) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org"])
def test_others_are_let_in_only_when_told(host: str, path: Path) -> None:
    with pytest.raises(KeyringError, match=r"--keys-file .* or --open"):
        open_keyring(Settings.parse([f"--host={host}"]))
    assert open_keyring(Settings.parse([f"--host={host}", "--open"])) is None
    assert isinstance(open_keyring(Settings.parse([f"--host={host}", f"--keys-file={path}"])), Keyring)


def test_no_key_is_equal_to_another(path: Path) -> None:
    keys = [add(path, "same")[0] for _ in range(20)]
    assert len({key.id for key in keys}) == len({key.sha256 for key in keys}) == 20
    assert all(isinstance(key, ApiKey) for key in read(path))

"""API keys: a file that holds their hashes, and the commands that change it.

    python -m service keys --keys-file FILE add NAME [--scopes generate,admin] [--rate 60] [--concurrency 4]
    python -m service keys --keys-file FILE list
    python -m service keys --keys-file FILE revoke ID

A key reads `dit_<id>_<secret>`. The file keeps the SHA-256 of the secret; a slow hash would not protect 32
random bytes better. A running API sees a change of the file at its next request.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from fcntl import LOCK_EX, flock
from pathlib import Path
from typing import Annotated, Literal

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ditserve.commands import command_line
from ditserve.model.spec.bundle import write_atomic
from ditserve.service.addresses import is_loopback
from ditserve.service.settings import Settings

Scope = Literal["generate", "admin"]
SCOPES: tuple[Scope, ...] = ("generate", "admin")
RETRY_S = 1.0  # between two reads of a file that cannot be used and has not changed
LAST_SECOND = 253402300800.0  # of the year 9999, since the epoch: a date beyond cannot be shown
log = structlog.get_logger()
_KEY = re.compile(r"dit_([0-9a-f]{8})_([A-Za-z0-9_-]{43})")


class KeyringError(Exception):
    """A key file cannot be used, or a command cannot be done; the message is one sentence."""


class ApiKey(BaseModel):
    """One key, without its secret.

    `rate` is requests a minute, `concurrency` jobs at a time; None sets no limit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
    name: Annotated[str, Field(min_length=1, max_length=100)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scopes: frozenset[Scope] = Field(strict=False)
    rate: Annotated[int, Field(ge=1)] | None = None
    concurrency: Annotated[int, Field(ge=1)] | None = None
    created_at: Annotated[float, Field(ge=0, lt=LAST_SECOND, allow_inf_nan=False)]

    @property
    def caller(self) -> str:
        """The caller of the jobs that this key submits."""
        return f"key:{self.id}"

    def may_see(self, caller: str) -> bool:
        """Return True if the jobs of `caller` are its own, or it may see everybody's."""
        return caller == self.caller or "admin" in self.scopes


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    keys: tuple[ApiKey, ...] = ()


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """A file of this stamp that could not be read, and is not read again before `retry_at` (monotonic)."""

    stamp: tuple[int, int, int]
    retry_at: float
    sentence: str


class Keyring:
    """The keys of a file, read again when it changes.

    A file that does not exist when this begins holds no keys. While a file is gone later, or cannot be read,
    the keys read last stay valid. Requests do not wait for a file that cannot be used to be read again: that
    is tried when it has changed, and otherwise every `RETRY_S` seconds.
    """

    def __init__(self, path: Path) -> None:
        """Read the file. Raises `KeyringError` if it exists and cannot be read."""
        self._path = path
        # Inode, modification time (ns) and size (bytes) of the file that was read, None if there was none.
        self._stamp: tuple[int, int, int] | None = None
        self._keys: Mapping[str, ApiKey] = {}
        self._unreadable: _Unreadable | None = None
        self._complaint = ""
        with suppress(FileNotFoundError):
            self._read_changes()

    def find(self, text: str) -> ApiKey | None:
        """Return the key of that text, None if there is none. The secret is compared in constant time."""
        self._refresh()
        match = _KEY.fullmatch(text)
        key = self._keys.get(match[1]) if match else None
        expected = key.sha256 if key else "0" * 64
        digest = hashlib.sha256(match[2].encode() if match else b"").hexdigest()
        return key if hmac.compare_digest(expected, digest) else None

    def holds(self, key_id: str) -> bool:
        """Return True if the key of that id is valid still."""
        self._refresh()
        return key_id in self._keys

    def _refresh(self) -> None:
        """Read the file if it changed. An error is logged once, and must not lock everybody out."""
        complaint = ""
        try:
            self._read_changes()
        except FileNotFoundError:
            complaint = f"{self._path} is gone" if self._stamp else ""
        except KeyringError as error:
            complaint = str(error)
        if complaint and complaint != self._complaint:
            log.error("the key file cannot be read, the known keys stay valid", reason=complaint)
        self._complaint = complaint

    def _read_changes(self) -> None:
        """Raise `FileNotFoundError`, and `KeyringError` for a file that cannot be read."""
        with _sentences(self._path):
            status = self._path.stat()
        stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
        if stamp == self._stamp:
            return
        known = self._unreadable
        if known is not None and known.stamp == stamp and time.monotonic() < known.retry_at:
            raise KeyringError(known.sentence)
        try:
            self._keys = {key.id: key for key in _read_file(self._path)}
        except KeyringError as error:
            self._unreadable = _Unreadable(stamp, time.monotonic() + RETRY_S, str(error))
            raise
        self._stamp, self._unreadable = stamp, None


def read(path: Path) -> tuple[ApiKey, ...]:
    """Return the keys in `path`, none if there is no such file. Raises `KeyringError`."""
    try:
        return _read_file(path)
    except FileNotFoundError:
        return ()


def _read_file(path: Path) -> tuple[ApiKey, ...]:
    with _sentences(path):
        if not path.is_file() and path.exists():
            # Reading a pipe would wait for its writer.
            raise KeyringError(f"{path} is not a key file: it is no regular file")
        return _File.model_validate_json(path.read_bytes()).keys


@contextmanager
def _sentences(path: Path) -> Iterator[None]:
    """Raise `KeyringError` for what goes wrong with a file, except that there is none."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise KeyringError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(map(str, first["loc"])) or "the file"
        raise KeyringError(f"{path} is not a key file: {location}: {first['msg']}") from None


def add(
    path: Path,
    name: str,
    *,
    scopes: Sequence[Scope] = ("generate",),
    rate: int | None = None,
    concurrency: int | None = None,
) -> tuple[ApiKey, str]:
    """Add a key to the file. Return it with its text, which is stored nowhere. Raises `KeyringError`."""
    secret = secrets.token_urlsafe(32)
    with _changing(path) as keys:
        key = ApiKey(
            id=secrets.token_hex(4),
            name=name,
            sha256=hashlib.sha256(secret.encode()).hexdigest(),
            scopes=frozenset(scopes),
            rate=rate,
            concurrency=concurrency,
            created_at=round(time.time(), 3),
        )
        keys.append(key)
    return key, f"dit_{key.id}_{secret}"


def revoke(path: Path, key_id: str) -> ApiKey:
    """Remove a key from the file. Raises `KeyringError`."""
    with _changing(path) as keys:
        for key in keys:
            if key.id == key_id:
                keys.remove(key)
                return key
        raise KeyringError(f"{path} has no key {key_id}; {command_line('service keys')} list shows them")


@contextmanager
def _changing(path: Path) -> Iterator[list[ApiKey]]:
    """Yield the keys of the file to change, then write them back.

    One process at a time; only the owner may read the file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f".{path.name}.lock").open("w") as lock:
            flock(lock, LOCK_EX)
            keys = list(read(path))
            yield keys
            mask = os.umask(0o077)
            try:
                write_atomic(path, (_File(keys=tuple(keys)).model_dump_json(indent=1) + "\n").encode())
            finally:
                os.umask(mask)
    except OSError as error:
        raise KeyringError(f"{path} cannot be changed: {error.strerror}") from None


def open_keyring(settings: Settings) -> Keyring | None:
    """Return the keys that open this API, None if everybody may use it.

    Raises:
        KeyringError: the key file cannot be read; or there is none, other machines can reach the API, and
            --open is not set.
    """
    if settings.keys_file is not None:
        return Keyring(settings.keys_file)
    if not settings.open and not is_loopback(settings.host):
        raise KeyringError(
            f"--host {settings.host} lets other machines in and no key is asked: "
            f"set --keys-file ({command_line('service keys')} add), or --open to let everybody in"
        )
    return None


def run(arguments: Sequence[str]) -> int:
    """Run `keys add|list|revoke` on the file of the setting `keys_file`. Return the exit status."""
    options = _parser().parse_args(arguments)
    path: Path | None = options.keys_file or Settings.load(program=command_line("service keys")).keys_file
    if path is None:
        print("error: --keys-file (or DIT_KEYS_FILE) names no file to keep keys in", file=sys.stderr)
        return 2
    try:
        if options.command == "add":
            key, text = add(
                path, options.name, scopes=options.scopes, rate=options.rate, concurrency=options.concurrency
            )
            print(f"key {key.id} for {key.name}; its text is shown this once:", file=sys.stderr)
            print(text)
        elif options.command == "revoke":
            print(f"revoked {options.id} ({revoke(path, options.id).name})")
        else:
            for key in read(path):
                print(_line(key))
    except (KeyringError, ValidationError) as error:
        sentence = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        print(f"error: {sentence}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=command_line("service keys"),
        description="API keys: hashes in a file, which --keys-file of the API names too.",
    )
    parser.add_argument("--keys-file", type=Path, help="the file; by default DIT_KEYS_FILE")
    commands = parser.add_subparsers(dest="command", required=True)
    add_command = commands.add_parser("add", help="make a key and show it once")
    add_command.add_argument("name", help="whose it is")
    add_command.add_argument(
        "--scopes", type=_scopes, default=("generate",), help="generate, admin, or both by comma"
    )
    add_command.add_argument("--rate", type=int, help="requests a minute")
    add_command.add_argument("--concurrency", type=int, help="jobs at a time")
    commands.add_parser("list", help="show the keys, never their text")
    revoke_command = commands.add_parser("revoke", help="take a key's power")
    revoke_command.add_argument("id", help="as `list` shows it")
    return parser


def _scopes(text: str) -> tuple[Scope, ...]:
    names = set(text.split(","))
    scopes = tuple(scope for scope in SCOPES if scope in names)
    if len(scopes) != len(names):
        raise argparse.ArgumentTypeError(f"{text!r}: choose among {', '.join(SCOPES)}")
    return scopes


def _line(key: ApiKey) -> str:
    created = datetime.fromtimestamp(key.created_at, UTC).isoformat(timespec="seconds")
    limits = f"rate={key.rate or '-'}/min  concurrency={key.concurrency or '-'}"
    return f"{key.id}  {created}  {','.join(sorted(key.scopes))}  {limits}  {key.name}"

"""The event streams that clients hold open: how many one caller may have, and when they end early."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import TracebackType

from ditserve.service.api_keys import ApiKey, Keyring
from ditserve.service.errors import QuotaExceeded

CHECK_S = 1.0  # between two looks whether the keys of open streams were revoked


class Stream:
    """One open stream of one caller. `ended` is set when it has to end; closing it makes room for another."""

    def __init__(self, streams: set[Stream], caller: str, key: ApiKey | None, *, lasting: bool) -> None:
        self.ended = asyncio.Event()
        self.caller, self.key, self.lasting = caller, key, lasting
        self._streams = streams
        streams.add(self)

    def close(self) -> None:
        self._streams.discard(self)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Streams:
    """The open streams of one process, at most `limit` of each caller."""

    def __init__(self, *, limit: int, keyring: Keyring | None, draining: asyncio.Event) -> None:
        self._limit, self._keyring, self._draining = limit, keyring, draining
        self._open: set[Stream] = set()

    def open(self, caller: str, key: ApiKey | None, *, lasting: bool = False) -> Stream:
        """Count a stream of `caller` until it is closed. A `lasting` one goes on while the process drains.

        Raises `QuotaExceeded`.
        """
        if sum(stream.caller == caller for stream in self._open) >= self._limit:
            raise QuotaExceeded(f"At most {self._limit} event streams at a time.", retry_after=1)
        stream = Stream(self._open, caller, key, lasting=lasting)
        if self._draining.is_set() and not lasting:
            stream.ended.set()
        return stream

    async def watch(self) -> None:
        """End the streams of a key soon after it is revoked, and all but lasting ones once it drains."""
        while not self._draining.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._draining.wait(), CHECK_S)
            for stream in self._open:
                if self._is_revoked(stream.key) or (self._draining.is_set() and not stream.lasting):
                    stream.ended.set()

    def _is_revoked(self, key: ApiKey | None) -> bool:
        return key is not None and self._keyring is not None and not self._keyring.holds(key.id)

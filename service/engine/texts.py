"""Encodings of sentences, which are worth keeping: in process the most recent ones, behind them a cache that all workers share.

A sentence is encoded by itself, so its encoding does not depend on who encodes it, when, or beside what.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ditserve.service.backends import SentenceEncoder
from ditserve.service.telemetry.counters import CacheCounters

Floats = npt.NDArray[np.float32]


class SharedCache(Protocol):
    """Bytes by key, where every worker finds them. What it cannot tell at once it does not know; it never raises."""

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]: ...

    def put_many(self, entries: Mapping[str, bytes]) -> None: ...


class TextEncodings(CacheCounters):
    """Sentence → encoding; at most `capacity` bytes in process, the least recently used leaving first."""

    def __init__(self, encoder: SentenceEncoder, shared: SharedCache | None, *, capacity: int) -> None:
        super().__init__()
        self.size = encoder.size
        self._encoder, self._shared = encoder, shared
        self._entries = max(1, capacity // (4 * encoder.size))
        self._held: OrderedDict[str, Floats] = OrderedDict()

    def get_many(self, sentences: Sequence[str]) -> Floats:
        """(N, size); an empty sentence, which stands for no text, is all zeros."""
        told = list(dict.fromkeys(filter(None, sentences)))
        unknown = [sentence for sentence in told if sentence not in self._held]
        fresh = self._find(unknown)
        self.hits += len(told) - len(unknown)
        found = {
            sentence: fresh[sentence] if sentence in fresh else self._held[sentence] for sentence in told
        }
        for sentence, encoding in found.items():
            self._held[sentence] = encoding
            self._held.move_to_end(sentence)
        while len(self._held) > self._entries:
            self._held.popitem(last=False)
            self.evictions += 1
        self.bytes = 4 * self.size * len(self._held)
        blank = np.zeros(self.size, np.float32)
        return np.stack([found.get(sentence, blank) for sentence in sentences])

    def _find(self, sentences: Sequence[str]) -> dict[str, Floats]:
        """Encodings that another worker has made, and those that nobody has."""
        keys = {sentence: self._key(sentence) for sentence in sentences}
        answers = self._shared.get_many(list(keys.values())) if self._shared and keys else [None] * len(keys)
        found = {
            sentence: np.frombuffer(answer, "<f4").astype(np.float32)
            for sentence, answer in zip(sentences, answers, strict=True)
            if answer is not None and len(answer) == 4 * self.size
        }
        missing = [sentence for sentence in sentences if sentence not in found]
        made = {sentence: self._encoder.encode(sentence) for sentence in missing}
        self.hits += len(found)
        self.misses += len(made)
        if self._shared and made:
            self._shared.put_many({keys[each]: made[each].astype("<f4").tobytes() for each in made})
        return found | made

    def _key(self, sentence: str) -> str:
        return f"{self._encoder.key}:{blake2b(sentence.encode(), digest_size=16).hexdigest()}"

"""The cache of sentence encodings: the most recent ones in process, behind them one that workers share.

A sentence is encoded by itself, so its encoding does not depend on the worker, the time, or the sentences
beside it.
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
    """Bytes by key, for every worker. It never raises: a value it cannot give at once counts as missing."""

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]: ...

    def put_many(self, entries: Mapping[str, bytes]) -> None: ...


class TextCache(CacheCounters):
    """Sentence → encoding, at most `capacity` bytes in process; the least recently used leaves first.

    With `encodes_nothing` the empty sentence has an encoding, as of an imported pipeline. Else it is zeros.
    `negative` is put before the sentences that guidance subtracts, for an encoder that tells them apart.
    """

    def __init__(
        self,
        encoder: SentenceEncoder,
        shared: SharedCache | None,
        *,
        capacity: int,
        encodes_nothing: bool = False,
        negative: str = "",
    ) -> None:
        super().__init__()
        self._encodes_nothing, self.negative = encodes_nothing, negative
        self.size = encoder.size
        self._encoder, self._shared = encoder, shared
        self._max_entries = max(1, capacity // (4 * encoder.size))
        self._encodings: OrderedDict[str, Floats] = OrderedDict()

    def get_many(self, sentences: Sequence[str]) -> Floats:
        """Return the encodings (N, size) of sentences; an empty one, no text, is all zeros if not encoded."""
        wanted = sentences if self._encodes_nothing else filter(None, sentences)
        distinct = list(dict.fromkeys(wanted))
        unknown = [sentence for sentence in distinct if sentence not in self._encodings]
        fresh = self._load(unknown)
        self.hits += len(distinct) - len(unknown)
        encodings = {
            sentence: fresh[sentence] if sentence in fresh else self._encodings[sentence]
            for sentence in distinct
        }
        for sentence, encoding in encodings.items():
            self._encodings[sentence] = encoding
            self._encodings.move_to_end(sentence)
        while len(self._encodings) > self._max_entries:
            self._encodings.popitem(last=False)
            self.evictions += 1
        self.bytes = 4 * self.size * len(self._encodings)
        blank = np.zeros(self.size, np.float32)
        return np.stack([encodings.get(sentence, blank) for sentence in sentences])

    def _load(self, sentences: Sequence[str]) -> dict[str, Floats]:
        """Return the encodings of sentences from the shared cache; encode the missing ones and share them."""
        keys = {sentence: self._key(sentence) for sentence in sentences}
        values = self._shared.get_many(list(keys.values())) if self._shared and keys else [None] * len(keys)
        shared = {
            sentence: encoding
            for sentence, value in zip(sentences, values, strict=True)
            if value is not None and (encoding := unpacked(value, self.size)) is not None
        }
        missing = [sentence for sentence in sentences if sentence not in shared]
        encoded = {sentence: self._encoder.encode(sentence) for sentence in missing}
        self.hits += len(shared)
        self.misses += len(encoded)
        if self._shared and encoded:
            self._shared.put_many(
                {keys[sentence]: packed(encoding) for sentence, encoding in encoded.items()}
            )
        return shared | encoded

    def _key(self, sentence: str) -> str:
        return f"{self._encoder.key}:{blake2b(sentence.encode(), digest_size=16).hexdigest()}"


def packed(encoding: Floats) -> bytes:
    """Return an encoding as bytes: two a number where none loses by it, as of an encoder in half precision.

    Their first byte names the format: "h" half precision, "b" the upper half of a float32, "f" float32.
    """
    with np.errstate(over="ignore"):
        half = encoding.astype("<f2")
    if np.array_equal(half.astype(np.float32), encoding):
        return b"h" + half.tobytes()
    bits = encoding.astype("<f4").view("<u4")
    if not (bits & 0xFFFF).any():
        return b"b" + (bits >> 16).astype("<u2").tobytes()
    return b"f" + bits.tobytes()


def unpacked(value: bytes, size: int) -> Floats | None:
    """Return the encoding (size,) that `packed` wrote; None if it is of another size or form."""
    width = {b"h": 2, b"b": 2, b"f": 4}.get(value[:1])
    if width is None or len(value) != 1 + width * size:
        return None
    if value[:1] == b"b":
        upper = np.frombuffer(value, "<u2", offset=1).astype(np.uint32) << 16
        return upper.view(np.float32)
    return np.frombuffer(value, f"<f{width}", offset=1).astype(np.float32)

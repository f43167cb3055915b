"""The condition, computed once: two exact caches in front of the conditioner.

`EmbeddingCache` maps a condition (classes, a text, mixes of them) to its embedding; `ModulationCache` maps (timestep,
condition) to the state the backbone is modulated by. Both call the backend at one fixed batch size, whatever they need:
a value then does not depend on what it is computed with, so images are equal to the last bit with the caches on, off,
cold or warm.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

import numpy as np
import numpy.typing as npt

from ditserve.model.spec.mixing import Mix, mix_embeddings
from ditserve.service.backends import Backend
from ditserve.service.engine.texts import TextEncodings
from ditserve.service.errors import InvalidRequest
from ditserve.service.jobs import ConditionTerm
from ditserve.service.telemetry.counters import CacheCounters

Floats = npt.NDArray[np.float32]
Given = tuple[tuple[int | None, ...], str]  # classes and a text, "" for none

CHUNK: Final = 8  # rows of every call of the embedder


@dataclass(frozen=True, slots=True, eq=False)
class Condition:
    """A condition ready for the conditioner; equal conditions have equal keys, in every process."""

    key: bytes
    embedding: Floats  # (E,)


Want = tuple[int, Condition]  # a timestep and a condition


class EmbeddingCache(CacheCounters):
    """Condition → embedding, the least recently used leaving first when they exceed `capacity` bytes.

    `texts` encodes sentences; without it the model takes none.
    """

    def __init__(self, backend: Backend, texts: TextEncodings | None, *, capacity: int) -> None:
        super().__init__()
        self._backend, self._texts = backend, texts
        self._null_labels = [len(factor.classes) for factor in backend.manifest.factors]
        self._entries = max(1, capacity // (4 * backend.manifest.embedding_size))
        self._held: OrderedDict[Given, Floats] = OrderedDict()

    def get(self, terms: Sequence[ConditionTerm], mix: Mix = "linear") -> Condition:
        """The condition of `terms`, whose weights count relative to their sum and whose order does not matter.

        Raises:
            InvalidRequest: the weights do not sum to something positive, or there is a text and the model takes none.
        """
        weights: dict[Given, float] = {}
        for term in terms:
            if term.text and self._texts is None:
                raise InvalidRequest("This model takes no text.")
            given = (term.labels, term.text)
            weights[given] = weights.get(given, 0.0) + term.weight
        total = sum(weights.values())
        if not total > 0.0:
            raise InvalidRequest("the weights of a condition must sum to more than 0")
        parts = sorted(
            ((given, weight / total) for given, weight in weights.items() if weight != 0.0),
            key=lambda part: ([-1 if label is None else label for label in part[0][0]], part[0][1]),
        )
        embeddings = self._embeddings([given for given, _ in parts])
        key = blake2b(repr((parts, mix if len(parts) > 1 else "")).encode(), digest_size=16).digest()
        embedding = mix_embeddings(embeddings, [weight for _, weight in parts], mix)
        return Condition(key, np.asarray(embedding, np.float32))

    def null(self) -> Condition:
        """The unconditional one: every factor at its null class."""
        return self.get([ConditionTerm(labels=(None,) * len(self._null_labels))])

    def _embeddings(self, wanted: Sequence[Given]) -> list[Floats]:
        missing = [given for given in wanted if given not in self._held]
        self.hits += len(wanted) - len(missing)
        self.misses += len(missing)
        fresh: dict[Given, Floats] = {}
        for start in range(0, len(missing), CHUNK):
            part = missing[start : start + CHUNK]
            indices = np.tile(np.array(self._null_labels, np.int64), (CHUNK, 1))  # (CHUNK, F)
            for row, (labels, _) in zip(indices, part, strict=False):
                row[:] = [n if k is None else k for k, n in zip(labels, self._null_labels, strict=True)]
            embeddings = self._backend.embed(indices, self._encodings([text for _, text in part]))
            fresh.update((given, row.copy()) for given, row in zip(part, embeddings, strict=False))
        found = [fresh[given] if given in fresh else self._held[given] for given in wanted]
        for given, embedding in zip(wanted, found, strict=True):
            self._held[given] = embedding
            self._held.move_to_end(given)
        while len(self._held) > self._entries:
            self._held.popitem(last=False)
            self.evictions += 1
        self.bytes = len(self._held) * found[0].nbytes
        return found

    def _encodings(self, texts: Sequence[str]) -> Floats | None:
        """(CHUNK, text size), zeros for no text; None for a model that takes none."""
        return None if self._texts is None else self._texts.get_many([*texts, *[""] * (CHUNK - len(texts))])


class ModulationCache(CacheCounters):
    """(timestep, condition) → condition state, exact, in one preallocated block of at most `capacity` bytes.

    Entries of `pinned` (the null class, wanted by every guided request) stay as long as they fit in half of it; the
    least recently used of the others leave first. What a batch misses is computed in one go, and the rows left over in a
    conditioner call are spent on what its samples want next. With a capacity too small for a batch, or 0, it computes
    and keeps nothing.
    """

    def __init__(self, backend: Backend, *, capacity: int, pinned: bytes) -> None:
        super().__init__()
        self._backend, self._chunk = backend, backend.conditioner_rows
        self._pinned_key = pinned
        shapes = [entry.shape for entry in backend.manifest.state]
        self.entry_bytes = 4 * sum(int(np.prod(shape)) for shape in shapes)
        count = capacity // self.entry_bytes
        self._blocks: tuple[Floats, ...] = tuple(np.empty((count, *shape), np.float32) for shape in shapes)
        self._count = count
        self._recent: OrderedDict[tuple[int, bytes], int] = OrderedDict()  # → place in the blocks
        self._pinned: dict[tuple[int, bytes], int] = {}

    def gather(self, wanted: Sequence[Want], upcoming: Iterable[Want], out: tuple[Floats, ...]) -> None:
        """Write the state of `wanted` to the first rows of `out` (one array per state tensor, in the manifest's order).

        `upcoming` is what these samples want next, soonest first; it is read only as far as there are rows to spare.
        """
        keys = [(timestep, condition.key) for timestep, condition in wanted]
        if len(set(keys)) + self._chunk > self._count - self._count // 2:
            self._bypass(wanted, out)
            return
        missing = {key: want for key, want in zip(keys, wanted, strict=True) if not self._touch(key)}
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        if missing:
            self._load(missing, upcoming)
        places = np.array([self._place(key) for key in keys], np.intp)
        for block, rows in zip(self._blocks, out, strict=True):
            np.take(block, places, axis=0, out=rows[: len(keys)], mode="clip")

    def _bypass(self, wanted: Sequence[Want], out: tuple[Floats, ...]) -> None:
        self.bypasses += len(wanted)
        for start in range(0, len(wanted), self._chunk):
            part = wanted[start : start + self._chunk]
            for rows, values in zip(out, self._compute(part), strict=True):
                rows[start : start + len(part)] = values[: len(part)]

    def _load(self, missing: dict[tuple[int, bytes], Want], upcoming: Iterable[Want]) -> None:
        ahead: dict[tuple[int, bytes], Want] = {}
        spare = -len(missing) % self._chunk
        for timestep, condition in upcoming if spare else ():
            key = (timestep, condition.key)
            if key not in missing and not self._holds(key):
                ahead[key] = (timestep, condition)
            if len(ahead) == spare:
                break
        self.prefetches += len(ahead)
        todo = list((missing | ahead).items())
        for start in range(0, len(todo), self._chunk):
            part = todo[start : start + self._chunk]
            places = [self._reserve(key) for key, _ in part]
            for block, values in zip(self._blocks, self._compute([want for _, want in part]), strict=True):
                block[places] = values[: len(part)]
        self.bytes = (len(self._recent) + len(self._pinned)) * self.entry_bytes

    def _compute(self, wanted: Sequence[Want]) -> tuple[Floats, ...]:
        """The conditioner's answer for up to a call's wants, the rest of the rows repeating the first."""
        padded = [*wanted, *[wanted[0]] * (self._chunk - len(wanted))]
        timesteps = np.array([timestep for timestep, _ in padded], np.float32)
        return self._backend.modulate(timesteps, np.stack([condition.embedding for _, condition in padded]))

    def _holds(self, key: tuple[int, bytes]) -> bool:
        return key in self._recent or key in self._pinned

    def _touch(self, key: tuple[int, bytes]) -> bool:
        if key in self._recent:
            self._recent.move_to_end(key)
            return True
        return key in self._pinned

    def _place(self, key: tuple[int, bytes]) -> int:
        place = self._recent.get(key)
        return self._pinned[key] if place is None else place

    def _reserve(self, key: tuple[int, bytes]) -> int:
        place = len(self._recent) + len(
            self._pinned
        )  # entries only ever replace each other: places fill in order
        if place == self._count:
            _, place = self._recent.popitem(last=False)
            self.evictions += 1
        if key[1] == self._pinned_key and len(self._pinned) < self._count // 2:
            self._pinned[key] = place
        else:
            self._recent[key] = place
        return place


class Conditions:
    """Both caches of a worker.

    Args:
        modulation_bytes: the most memory of the modulation cache; 0 turns it off.
        embedding_bytes: the most memory of the embedding cache.
        texts: encodings of sentences, for a model that takes text.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        modulation_bytes: int = 256 << 20,
        embedding_bytes: int = 64 << 20,
        texts: TextEncodings | None = None,
    ) -> None:
        self.texts = texts
        self.embeddings = EmbeddingCache(backend, texts, capacity=embedding_bytes)
        self.null = self.embeddings.null()
        self.modulations = ModulationCache(backend, capacity=modulation_bytes, pinned=self.null.key)

    def get(self, terms: Sequence[ConditionTerm], mix: Mix = "linear") -> Condition:
        return self.embeddings.get(terms, mix)

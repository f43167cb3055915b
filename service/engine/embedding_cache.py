"""Conditions and the cache of their embeddings: classes and a text, mixes or a layer for each depth."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Final

import numpy as np
import numpy.typing as npt

from ditserve.model.spec.mixing import Mix, mix_embeddings
from ditserve.service.backends import Backend
from ditserve.service.backends.adapters import RowUses, adapted
from ditserve.service.engine.text_cache import TextCache
from ditserve.service.errors import InvalidRequest
from ditserve.service.jobs import ConditionTerm
from ditserve.service.telemetry.counters import CacheCounters

Floats = npt.NDArray[np.float32]
# Classes, a text ("" for none), and the adapters that change the conditioner.
Term = tuple[tuple[int | None, ...], str, RowUses]


EMBED_ROWS: Final = 8  # of every call of the embedder


@dataclass(frozen=True, slots=True, eq=False)
class Condition:
    """A condition ready for the conditioner. Equal conditions have equal keys, in every process.

    `embeddings` are those of its layers, shallow to deep: one, unless each depth has a condition of its own.
    `adapters` are those of its rows that change the conditioner, which the key holds too.
    """

    key: bytes
    embeddings: Floats  # (layers, E)
    adapters: RowUses = ()


class EmbeddingCache(CacheCounters):
    """Condition → embedding, at most `capacity` bytes; the least recently used entry leaves first.

    `texts` encodes sentences; without it the model takes none.
    """

    def __init__(self, backend: Backend, texts: TextCache | None, *, capacity: int) -> None:
        super().__init__()
        self._backend, self._texts = backend, texts
        self._null_labels = [len(factor.classes) for factor in backend.manifest.factors]
        self._max_entries = max(1, capacity // (4 * backend.manifest.embedding_size))
        self._embeddings: OrderedDict[Term, Floats] = OrderedDict()

    def get(self, terms: Sequence[ConditionTerm], mix: Mix = "linear", adapters: RowUses = ()) -> Condition:
        """Return the condition of `terms`; weights count relative to their sum, the order of terms does not.

        `adapters` are those of its rows that change the conditioner.

        Raises:
            InvalidRequest: the weights do not sum to more than 0, or there is text and the model takes none.
        """
        weights: dict[Term, float] = {}
        for term in terms:
            if term.text and self._texts is None:
                raise InvalidRequest("This model takes no text.")
            key = (term.labels, term.text, adapters)
            weights[key] = weights.get(key, 0.0) + term.weight
        total = sum(weights.values())
        if not total > 0.0:
            raise InvalidRequest("the weights of a condition must sum to more than 0")
        parts = sorted(
            ((key, weight / total) for key, weight in weights.items() if weight != 0.0),
            key=lambda part: ([-1 if label is None else label for label in part[0][0]], part[0][1]),
        )
        embeddings = self._get_many([key for key, _ in parts])
        digest = blake2b(repr((parts, mix if len(parts) > 1 else "")).encode(), digest_size=16).digest()
        embedding = mix_embeddings(embeddings, [weight for _, weight in parts], mix)
        return Condition(digest, np.asarray(embedding, np.float32)[None], adapters)

    def null(self, text: str = "", adapters: RowUses = ()) -> Condition:
        """Return the unconditional condition, every factor at its null class, with a text if one is given."""
        marked = text if self._texts is None else self._texts.negative + text
        terms = [ConditionTerm((None,) * len(self._null_labels), text=marked)]
        return self.get(terms, adapters=adapters)

    def alone(self, term: ConditionTerm, adapters: RowUses = ()) -> Condition:
        """Return the condition of one term, whatever its weight is. Raises as `get`."""
        return self.get([replace(term, weight=1.0)], adapters=adapters)

    def layered(self, terms: Sequence[ConditionTerm], adapters: RowUses = ()) -> Condition:
        """Return the condition in which each of `terms` steers the blocks of one depth, shallow to deep.

        Raises:
            InvalidRequest: there is text and the model takes none.
        """
        layers = [self.alone(term, adapters) for term in terms]
        if len({layer.key for layer in layers}) == 1:
            return layers[0]
        digest = blake2b(b"".join(layer.key for layer in layers), digest_size=16, person=b"layers").digest()
        return Condition(digest, np.concatenate([layer.embeddings for layer in layers]), adapters)

    def _get_many(self, terms: Sequence[Term]) -> list[Floats]:
        """Return the embeddings (E,) of distinct terms; embed the missing ones."""
        missing = [term for term in terms if term not in self._embeddings]
        self.hits += len(terms) - len(missing)
        self.misses += len(missing)
        fresh: dict[Term, Floats] = {}
        for start in range(0, len(missing), EMBED_ROWS):
            chunk = missing[start : start + EMBED_ROWS]
            fresh.update(zip(chunk, self._embed(chunk), strict=True))
        embeddings = [fresh[term] if term in fresh else self._embeddings[term] for term in terms]
        for term, embedding in zip(terms, embeddings, strict=True):
            self._embeddings[term] = embedding
            self._embeddings.move_to_end(term)
        while len(self._embeddings) > self._max_entries:
            self._embeddings.popitem(last=False)
            self.evictions += 1
        self.bytes = len(self._embeddings) * embeddings[0].nbytes
        return embeddings

    def _embed(self, terms: Sequence[Term]) -> list[Floats]:
        """Return the embeddings of at most `EMBED_ROWS` terms, from one call of the backend."""
        labels = np.tile(np.array(self._null_labels, np.int64), (EMBED_ROWS, 1))  # (EMBED_ROWS, F)
        for row, (classes, _, _) in zip(labels, terms, strict=False):
            row[:] = [n if k is None else k for k, n in zip(classes, self._null_labels, strict=True)]
        left = EMBED_ROWS - len(terms)
        texts = [text for _, text, _ in terms] + [""] * left
        encodings = None if self._texts is None else self._texts.get_many(texts)  # (EMBED_ROWS, text size)
        with adapted(self._backend, [*(adapters for _, _, adapters in terms), *[()] * left]):
            embeddings = self._backend.embed(labels, encodings)
        return [row.copy() for row in embeddings[: len(terms)]]

"""The two exact caches in front of the conditioner, so that a condition is computed once.

`EmbeddingCache` maps a condition (classes, a text, mixes of them) to its embedding. `ModulationCache` maps
(noise level, condition) to the condition state that modulates the backbone. Both call the backend at one
fixed batch size, however few rows they need: a value then does not depend on the rows beside it, so images
are equal to the last bit with the caches on, off, cold or warm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from ditserve.model.spec.mixing import Combine, normalised_weights
from ditserve.model.spec.network_config import frame_shape
from ditserve.service.backends import Backend
from ditserve.service.backends.adapters import RowUses
from ditserve.service.engine.embedding_cache import Condition, EmbeddingCache, Floats
from ditserve.service.engine.modulation_cache import ModulationCache
from ditserve.service.engine.text_cache import TextCache
from ditserve.service.errors import InvalidRequest
from ditserve.service.jobs import ConditionTerm


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """The conditions of one sample: those whose outputs are composed by `weights`, which sum to 1, and the
    one that guidance subtracts from them.
    """

    conditions: tuple[Condition, ...]
    weights: tuple[float, ...]
    unconditional: Condition

    @property
    def can_be_guided(self) -> bool:
        """False where guidance would subtract from a condition the same one."""
        return any(condition.key != self.unconditional.key for condition in self.conditions)


class ConditionCaches:
    """The caches of one worker, and its null condition.

    Args:
        modulation_bytes: the most memory of the modulation cache; 0 turns it off.
        embedding_bytes: the most memory of the embedding cache.
        texts: the encodings of sentences, for a model that takes text.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        modulation_bytes: int = 256 << 20,
        embedding_bytes: int = 64 << 20,
        texts: TextCache | None = None,
    ) -> None:
        self.texts, self._backend = texts, backend
        self._frame_shape = frame_shape(backend.manifest.config)
        self.embeddings = EmbeddingCache(backend, texts, capacity=embedding_bytes)
        self.null = self.embeddings.null()
        self.modulations = ModulationCache(backend, capacity=modulation_bytes, pinned=self.null.key)

    def conditioning(
        self,
        terms: Sequence[ConditionTerm],
        how: Combine = "linear",
        *,
        negative_prompt: str = "",
        guidance_embedded: float | None = None,
        adapters: RowUses = (),
        first_frame: Floats | None = None,
    ) -> Conditioning:
        """Return the conditions of a sample of these terms, combined as `how` says.

        `guidance_embedded` is the scale that the network is told, the last number of each condition. Of the
        sample's `adapters` a condition holds those that change the conditioner. A network that can be told a
        `first_frame` (C, H, W) is told it, if it has the shape of its frames, in the unconditional rows too.

        Raises:
            InvalidRequest: as `EmbeddingCache.get`, or the network cannot follow so many layers.
        """
        if adapters:
            adapters = self._backend.adapters.of_conditioner(adapters) if self._backend.adapters else ()
        special = negative_prompt or adapters
        unconditional = self.embeddings.null(negative_prompt, adapters) if special else self.null
        conditions: tuple[Condition, ...]
        weights: tuple[float, ...] = (1.0,)
        if how == "compose":
            conditions = tuple(self.embeddings.alone(term, adapters) for term in terms)
            weights = _composition_weights(terms)
        elif how == "layers":
            conditions = (self.embeddings.layered(terms, adapters),)
            self.modulations.sources(len(conditions[0].embeddings))  # a network that cannot is refused here
        else:
            conditions = (self.embeddings.get(terms, how, adapters),)
        if guidance_embedded is not None:
            conditions = tuple(told_guidance(one, guidance_embedded) for one in conditions)
        if first_frame is not None and first_frame.shape == self._frame_shape:
            conditions = tuple(told_first_frame(one, first_frame) for one in conditions)
            unconditional = told_first_frame(unconditional, first_frame)
        return Conditioning(conditions, weights, unconditional)


def told_guidance(condition: Condition, scale: float) -> Condition:
    """Return a condition in which the network is told a guidance scale, the last number of its embeddings."""
    embeddings = condition.embeddings.copy()
    embeddings[:, -1] = scale
    told = np.float32(scale).tobytes()
    key = blake2b(condition.key + told, digest_size=16, person=b"guidance").digest()
    return Condition(key, embeddings, condition.adapters)


def told_first_frame(condition: Condition, frame: Floats) -> Condition:
    """Return a condition of clips that begin with a frame (C, H, W): the last numbers of its embeddings."""
    embeddings, told = condition.embeddings.copy(), np.ascontiguousarray(frame, np.float32)
    embeddings[:, -told.size :] = told.ravel()
    # The whole frame is in the key, so that no two pictures share a state.
    key = blake2b(condition.key + told.tobytes(), digest_size=16, person=b"first frame").digest()
    return Condition(key, embeddings, condition.adapters)


def _composition_weights(terms: Sequence[ConditionTerm]) -> tuple[float, ...]:
    try:
        return tuple(normalised_weights([term.weight for term in terms], len(terms)))
    except ValueError as error:
        raise InvalidRequest(str(error)) from None

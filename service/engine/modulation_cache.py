"""The cache of condition states: what the conditioner makes of a noise level and a condition, once.

It calls the backend at one fixed batch size, however few rows it needs; see `service.engine.conditions`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from math import prod
from typing import Generic, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from ditserve.model.spec.manifest import Follows, StateTensor
from ditserve.model.spec.mixing import assign_blocks, state_sources
from ditserve.service.backends import Backend
from ditserve.service.backends.adapters import RowUses, adapted
from ditserve.service.backends.resident import KeepsRows, Slab
from ditserve.service.backends.state import Floats, StateArray, StateMemory
from ditserve.service.engine.embedding_cache import Condition
from ditserve.service.errors import InvalidRequest
from ditserve.service.telemetry.counters import CacheCounters

K = TypeVar("K", bound=Hashable)
# What the network is told of a noise level, as the bits of a float32, and a condition.
ConditionerInput = tuple[int, Condition]
SMALLEST_SHARE = 1 / 64  # of the memory of the cache, for the tensors that follow the same
StateKey = tuple[int, bytes]  # the same, with the condition's key


class SlotLru(Generic[K]):
    """The assignment of keys to `slots` numbered slots; the least recently used key leaves first.

    A pinned key never leaves. Pinned keys take at most half of the slots, and at most `pinned`, so
    `evictable` slots stay for the others.
    """

    def __init__(self, slots: int, pinned: int | None = None) -> None:
        self._slots = slots
        self._max_pinned = slots // 2 if pinned is None else min(pinned, slots // 2)
        self.evictable = slots - self._max_pinned
        self.evictions = 0
        self._recent: OrderedDict[K, int] = OrderedDict()  # the least recently used key first
        self._pinned: dict[K, int] = {}

    def __len__(self) -> int:
        return len(self._recent) + len(self._pinned)

    def __contains__(self, key: K) -> bool:
        return key in self._recent or key in self._pinned

    def touch(self, key: K) -> bool:
        """Mark a key as used now; return whether it has a slot."""
        if key in self._recent:
            self._recent.move_to_end(key)
            return True
        return key in self._pinned

    def slot(self, key: K) -> int:
        """Return the slot of a key. Raises `KeyError` if it has none."""
        slot = self._recent.get(key)
        return self._pinned[key] if slot is None else slot

    def find(self, keys: Iterable[K]) -> list[int]:
        """Return the slots of keys, -1 for those that have none, and mark them as used now."""
        recent, pinned, slots = self._recent, self._pinned, list[int]()
        for key in keys:
            slot = recent.get(key)
            if slot is None:
                slot = pinned.get(key, -1)
            else:
                recent.move_to_end(key)
            slots.append(slot)
        return slots

    def reserve(self, key: K, *, pin: bool) -> int:
        """Return a slot for a new key: the next unused one, else that of the least recently used key.

        With `pin` the key stays for good, as long as the half for pinned keys is not full.
        """
        # A slot is never given back, only handed on: the count of keys is the next one that is unused.
        slot = len(self)
        if slot == self._slots:
            _, slot = self._recent.popitem(last=False)
            self.evictions += 1
        if pin and len(self._pinned) < self._max_pinned:
            self._pinned[key] = slot
        else:
            self._recent[key] = slot
        return slot


class _Table:
    """The tensors of the state that follow the same, in `slots` slots: noise level, condition, or both.

    `positions` are those of its tensors in the state.
    """

    def __init__(
        self, follows: Follows, state: Sequence[StateTensor], slots: int, memory: StateMemory
    ) -> None:
        self.follows = follows
        self.positions = [k for k, entry in enumerate(state) if entry.follows == follows]
        shapes = [state[k].shape for k in self.positions]
        self.entry_bytes = _bytes(state, follows)
        self.blocks = [memory.zeros(slots, shape) for shape in shapes]
        # There is one condition to pin, at many levels.
        self.lru: SlotLru[StateKey] = SlotLru(slots, {"condition": 1, "level": 0}.get(follows))

    def key(self, key: StateKey) -> StateKey:
        """Return the part of a key that these tensors follow."""
        told, condition = key
        if self.follows == "level":
            return told, b""
        return (0, condition) if self.follows == "condition" else key


def _bytes(state: Sequence[StateTensor], follows: Follows | None = None) -> int:
    """Return the bytes of the tensors of a state, of all or of those that follow the same."""
    shapes = [entry.shape for entry in state if follows in (None, entry.follows)]
    return 4 * sum(prod(shape) for shape in shapes)


class ModulationCache(CacheCounters):
    """(noise level, condition) → condition state, exact, in at most `capacity` bytes.

    A tensor that follows only the condition is held once a condition, and one that follows only the noise
    level once a level. The states of the condition with the key `pinned` stay, within half of the slots: it
    is the null class, which every guided request needs. The states that a batch misses are computed together,
    and the rows left over in a conditioner call are spent on what its samples need next. A batch too large
    for the slots, or any with a capacity of 0, bypasses the cache: its states are computed and not kept.
    """

    def __init__(self, backend: Backend, *, capacity: int, pinned: bytes) -> None:
        super().__init__()
        self._backend, self._call_rows = backend, backend.conditioner_rows
        self._memory = backend.state_memory
        self.loads = 0
        # Where rows live on the device their states are made there as well.
        there = backend.modulate_there if isinstance(backend, KeepsRows) else backend.modulate
        self._modulate_there: Callable[[Floats, Floats], tuple[StateArray, ...]] = there
        self._pinned_key = pinned
        self._config = backend.manifest.config
        state = backend.manifest.state
        self.entry_bytes = _bytes(state)
        kinds = [kind for kind in get_args(Follows) if _bytes(state, kind)]
        # What is small beside the rest gets many slots for a share of the capacity that is not missed.
        shares = {kind: max(_bytes(state, kind) / self.entry_bytes, SMALLEST_SHARE) for kind in kinds}
        self._tables = [
            _Table(
                kind,
                state,
                int(capacity * share / sum(shares.values())) // _bytes(state, kind),
                self._memory,
            )
            for kind, share in shares.items()
        ]
        # A batch and the prefetch of one call must fit beside each other in the evictable slots. Then
        # loading the states of a batch never evicts one that the same batch needs.
        self.most_states = min(table.lru.evictable for table in self._tables) - self._call_rows

    def gather(
        self,
        inputs: Sequence[ConditionerInput],
        upcoming: Iterable[ConditionerInput],
        out: tuple[StateArray, ...],
    ) -> None:
        """Write the states of `inputs` to the first rows of `out`.

        `out` has one array of the backend's state memory a state tensor, in the manifest's order.

        `upcoming` is what these samples need next, soonest first. It is read only as far as a call has rows
        to spare.
        """
        keys = [(told, condition.key) for told, condition in inputs]
        if len(set(keys)) > self.most_states:
            self._bypass(inputs, out)
            return
        self._load_missing(keys, inputs, upcoming)
        for table in self._tables:
            slots = [table.lru.slot(table.key(key)) for key in keys]
            for position, block in zip(table.positions, table.blocks, strict=True):
                self._memory.take(block, slots, out[position])

    def places(self, inputs: Sequence[ConditionerInput]) -> npt.NDArray[np.int64]:
        """Return where the states of `inputs` lie in the slabs: (tables, inputs), -1 for those not cached.

        It holds for as long as `loads` stays what it is.
        """
        places = np.empty((len(self._tables), len(inputs)), np.int64)
        for line, table in enumerate(self._tables):
            places[line] = table.lru.find([table.key((told, condition.key)) for told, condition in inputs])
        return places

    def load(self, inputs: Sequence[ConditionerInput], upcoming: Iterable[ConditionerInput]) -> None:
        """See that the states of `inputs` are cached, at most `most_states` different ones; see `gather`."""
        different = {(told, condition.key): (told, condition) for told, condition in inputs}
        self._load_missing(list(different), list(different.values()), upcoming)

    def slabs(self) -> list[Slab]:
        """Return the tensors of the condition state, with the line of each in what `places` returns."""
        slabs = {
            position: Slab(block, line)
            for line, table in enumerate(self._tables)
            for position, block in zip(table.positions, table.blocks, strict=True)
        }
        return [slabs[position] for position in sorted(slabs)]

    @property
    def tables(self) -> int:
        """The lines of what `places` returns."""
        return len(self._tables)

    def _load_missing(
        self,
        keys: Sequence[StateKey],
        inputs: Sequence[ConditionerInput],
        upcoming: Iterable[ConditionerInput],
    ) -> None:
        """See that the states of all keys are cached."""
        missing = {key: state for key, state in zip(keys, inputs, strict=True) if not self._touch(key)}
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        if missing:
            self._load(missing | self._prefetch(missing, upcoming))

    def _touch(self, key: StateKey) -> bool:
        """Mark the state of a key as used now; return whether all of it is cached."""
        cached = [table.lru.touch(table.key(key)) for table in self._tables]
        return all(cached)

    def _has(self, key: StateKey) -> bool:
        return all(table.key(key) in table.lru for table in self._tables)

    def _bypass(self, inputs: Sequence[ConditionerInput], out: tuple[StateArray, ...]) -> None:
        self.bypasses += len(inputs)
        for start in range(0, len(inputs), self._call_rows):
            chunk = inputs[start : start + self._call_rows]
            for array, values in zip(out, self._compute(chunk), strict=True):
                self._memory.write(array, slice(start, start + len(chunk)), values[: len(chunk)])

    def _prefetch(
        self, missing: dict[StateKey, ConditionerInput], upcoming: Iterable[ConditionerInput]
    ) -> dict[StateKey, ConditionerInput]:
        """Return the upcoming inputs that are not cached, as many as fill up the last call for `missing`."""
        prefetched: dict[StateKey, ConditionerInput] = {}
        spare = -len(missing) % self._call_rows
        for told, condition in upcoming if spare else ():
            key = (told, condition.key)
            if key not in missing and not self._has(key):
                prefetched[key] = (told, condition)
            if len(prefetched) == spare:
                break
        self.prefetches += len(prefetched)
        return prefetched

    def _load(self, inputs: dict[StateKey, ConditionerInput]) -> None:
        """Compute the states of inputs that are not cached, and keep them."""
        self.loads += 1
        items = list(inputs.items())
        for start in range(0, len(items), self._call_rows):
            chunk = items[start : start + self._call_rows]
            values = self._compute([conditioner_input for _, conditioner_input in chunk])
            for table in self._tables:
                self._keep(table, [key for key, _ in chunk], values)
        self.evictions = sum(table.lru.evictions for table in self._tables)
        self.bytes = sum(len(table.lru) * table.entry_bytes for table in self._tables)

    def _keep(self, table: _Table, keys: Sequence[StateKey], values: tuple[StateArray, ...]) -> None:
        """Keep the tensors of a table, from the rows of `values` for `keys`, that it does not hold yet."""
        rows: dict[StateKey, int] = {}
        for row, key in enumerate(keys):
            if table.key(key) not in table.lru:
                rows.setdefault(table.key(key), row)
        slots = [table.lru.reserve(key, pin=key[1] == self._pinned_key) for key in rows]
        for position, block in zip(table.positions, table.blocks, strict=True):
            self._memory.write(block, slots, values[position][list(rows.values())])

    def _compute(self, inputs: Sequence[ConditionerInput]) -> tuple[StateArray, ...]:
        """Return the states of inputs, as many as one call has rows; a layer of one takes a row as well."""
        flat = [
            (told, embedding, condition.adapters)
            for told, condition in inputs
            for embedding in condition.embeddings
        ]
        if len(flat) == len(inputs):
            return self._modulate(flat, self._modulate_there)
        starts = range(0, len(flat), self._call_rows)
        modulate = self._backend.modulate
        calls = [self._modulate(flat[start : start + self._call_rows], modulate) for start in starts]
        # The row that each tensor of each state is taken from.
        picks: list[list[int]] = []
        first = 0
        for _, condition in inputs:
            picks.append([first + layer for layer in self.sources(len(condition.embeddings))])
            first += len(condition.embeddings)
        tensors = map(np.concatenate, zip(*calls, strict=True))
        return tuple(
            tensor[list(rows)] for tensor, rows in zip(tensors, zip(*picks, strict=True), strict=True)
        )

    def sources(self, layers: int) -> tuple[int, ...]:
        """Return for each tensor of the state which of so many layers it follows.

        Raises:
            InvalidRequest: the network cannot follow so many.
        """
        try:
            return state_sources(self._config, assign_blocks(self._config.depth, layers))
        except ValueError as error:
            raise InvalidRequest(str(error)) from None

    def _modulate(
        self,
        inputs: Sequence[tuple[int, Floats, RowUses]],
        modulate: Callable[[Floats, Floats], tuple[StateArray, ...]],
    ) -> tuple[StateArray, ...]:
        """Return the states of noise levels, embeddings (E,) and adapters, from one call of the backend.

        The rows that are left over repeat the first.
        """
        padded = [*inputs, *[inputs[0]] * (self._call_rows - len(inputs))]
        told = np.array([bits for bits, _, _ in padded], np.uint32).view(np.float32)
        with adapted(self._backend, [adapters for _, _, adapters in padded]):
            return modulate(told, np.stack([embedding for _, embedding, _ in padded]))

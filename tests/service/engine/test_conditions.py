"""The condition caches: exact, bounded, and never asked twice for one thing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ditserve.model.spec.manifest import StateTensor
from ditserve.service.backends import CONDITIONER_ROWS as CHUNK
from ditserve.service.backends.adapters import BackendAdapters
from ditserve.service.backends.state import HostMemory, StateMemory
from ditserve.service.engine.conditions import ConditionCaches
from ditserve.service.engine.embedding_cache import Condition
from ditserve.service.engine.modulation_cache import ConditionerInput, SlotLru
from ditserve.service.errors import InvalidRequest
from ditserve.service.jobs import ConditionTerm

Floats = npt.NDArray[np.float32]
Make = Callable[..., Any]

ENTRY = 4 * (3 + 6)  # bytes of one entry of the fake backend


@pytest.fixture
def backend(make_backend: Make) -> Any:
    return make_backend()


def colour(conditions: ConditionCaches, index: int | None) -> Condition:
    return conditions.embeddings.get([ConditionTerm((index,))])


def gather(
    conditions: ConditionCaches, wanted: Sequence[ConditionerInput], upcoming: Sequence[ConditionerInput] = ()
) -> tuple[Floats, Floats]:
    out = (np.empty((len(wanted), 3), np.float32), np.empty((len(wanted), 2, 3), np.float32))
    conditions.modulations.gather(wanted, upcoming, out)
    return out


def at(told: float) -> int:
    """Return the bits of the float32 that a network is told."""
    return int(np.float32(told).view(np.uint32))


def direct(backend: Any, wanted: Sequence[ConditionerInput]) -> tuple[Floats, ...]:
    told = np.array([bits for bits, _ in wanted], np.uint32).view(np.float32)
    state: tuple[Floats, ...] = backend.modulate(
        told, np.stack([condition.embeddings[0] for _, condition in wanted])
    )
    return state


def assert_same(states: Sequence[Floats], expected: Sequence[Floats]) -> None:
    for one, other in zip(states, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("capacity", [0, 40 * ENTRY, 1 << 20])
def test_a_state_is_what_the_backend_says_with_the_cache_on_off_or_small(backend: Any, capacity: int) -> None:
    conditions = ConditionCaches(backend, modulation_bytes=capacity)
    rng = np.random.default_rng(0)
    for _ in range(30):
        picks = rng.integers(0, [50, 4], (10, 2))
        wanted = [(at(20.0 * t), colour(conditions, int(c) if c < 3 else None)) for t, c in picks]
        upcoming = [
            (at(20.0 * t - 20), condition) for (t, _), (_, condition) in zip(picks, wanted, strict=True) if t
        ]
        assert_same(gather(conditions, wanted, upcoming), direct(backend, wanted))
        assert conditions.modulations.bytes <= capacity


def test_what_a_batch_misses_is_computed_in_one_call_and_only_once(backend: Any) -> None:
    conditions = ConditionCaches(backend)
    red, null = colour(conditions, 0), conditions.null
    wanted = [(at(999), red), (at(500), red), (at(999), null), (at(500), null), (at(999), null)]
    gather(conditions, wanted)
    gather(conditions, wanted)
    assert backend.conditioned == [CHUNK]
    counters = conditions.modulations
    assert (counters.misses, counters.hits, counters.bypasses) == (4, 1 + 5, 0)
    assert counters.bytes == 4 * ENTRY


def test_rows_left_over_in_a_call_fetch_what_comes_next(backend: Any) -> None:
    conditions = ConditionCaches(backend)
    red = colour(conditions, 0)
    ahead = [(at(t), red) for t in range(900, 0, -100)]
    gather(conditions, [(at(1000 - 1), red)], ahead)
    assert conditions.modulations.prefetches == CHUNK - 1
    for want in ahead[: CHUNK - 1]:
        gather(conditions, [want], ahead)
    assert backend.conditioned == [CHUNK]
    assert conditions.modulations.hits == CHUNK - 1


def test_the_null_class_stays_and_the_least_recently_used_leaves(backend: Any) -> None:
    conditions = ConditionCaches(backend, modulation_bytes=40 * ENTRY)
    red = colour(conditions, 0)
    gather(conditions, [(at(t), conditions.null) for t in range(10)])
    for t in range(50):
        gather(conditions, [(at(7), red), (at(100 + t), red)])
    assert conditions.modulations.evictions > 0
    assert conditions.modulations.bytes <= 40 * ENTRY
    before = conditions.modulations.misses
    gather(conditions, [(at(t), conditions.null) for t in range(10)])
    gather(conditions, [(at(7), red), (at(149), red)])
    assert conditions.modulations.misses == before


def test_pinned_entries_leave_room_for_others(backend: Any) -> None:
    conditions = ConditionCaches(backend, modulation_bytes=40 * ENTRY)
    for t in range(200):
        gather(conditions, [(at(t), conditions.null)])
    wanted = [(at(t), colour(conditions, 0)) for t in range(10)]
    assert_same(gather(conditions, wanted), direct(backend, wanted))
    before = conditions.modulations.misses
    gather(conditions, wanted)
    assert conditions.modulations.misses == before


def test_a_batch_larger_than_the_cache_goes_past_it(backend: Any) -> None:
    conditions = ConditionCaches(backend, modulation_bytes=20 * ENTRY)
    wanted = [(at(t), colour(conditions, 0)) for t in range(15)]
    assert_same(gather(conditions, wanted), direct(backend, wanted))
    assert conditions.modulations.bypasses == 15
    assert conditions.modulations.bytes == 0


def test_composition_keeps_conditions_apart_and_layers_must_fit_the_network(backend: Any) -> None:
    caches = ConditionCaches(backend)
    terms = [ConditionTerm((1,), 2.0), ConditionTerm((0,), -0.5)]
    made = caches.conditioning(terms, "compose")
    assert made.conditions[0].key == caches.embeddings.get([ConditionTerm((1,))]).key
    assert made.weights == pytest.approx((4 / 3, -1 / 3))
    with pytest.raises(InvalidRequest, match="must sum to more than 0"):
        caches.conditioning([ConditionTerm((1,), -1.0), ConditionTerm((0,), 1.0)], "compose")
    # The network of the tests has one block.
    with pytest.raises(InvalidRequest, match="1 blocks can follow 1 to 1 conditions, not 2"):
        caches.conditioning(terms, "layers")
    alike = caches.conditioning([ConditionTerm((None,))] * 3, "layers")
    assert (alike.conditions[0].key, alike.can_be_guided) == (caches.null.key, False)


def test_a_single_condition_has_no_weight(backend: Any) -> None:
    conditions = ConditionCaches(backend)
    plain = colour(conditions, 1)
    heavy = conditions.embeddings.get([ConditionTerm((1,), 5.0)], "spherical")
    beside_nothing = conditions.embeddings.get([ConditionTerm((1,), 1.0), ConditionTerm((2,), 0.0)])
    assert plain.key == heavy.key == beside_nothing.key
    np.testing.assert_array_equal(plain.embeddings[0], heavy.embeddings[0])


def test_a_mix_is_weighted_and_knows_no_order(backend: Any) -> None:
    conditions = ConditionCaches(backend)
    red, blue = colour(conditions, 0).embeddings[0], colour(conditions, 2).embeddings[0]
    mixed = conditions.embeddings.get([ConditionTerm((0,), 3.0), ConditionTerm((2,), 1.0)])
    np.testing.assert_allclose(mixed.embeddings[0], 0.75 * red + 0.25 * blue, rtol=1e-5, atol=1e-6)
    assert mixed.key == conditions.embeddings.get([ConditionTerm((2,), 0.25), ConditionTerm((0,), 0.75)]).key
    assert mixed.key != conditions.embeddings.get([ConditionTerm((2,), 0.75), ConditionTerm((0,), 0.25)]).key
    assert (
        mixed.key
        != conditions.embeddings.get([ConditionTerm((0,), 3.0), ConditionTerm((2,), 1.0)], "spherical").key
    )


def test_a_spherical_mix_turns_from_one_direction_to_the_other(backend: Any) -> None:
    backend.table /= np.linalg.norm(backend.table, axis=1, keepdims=True)
    conditions = ConditionCaches(backend)
    red, blue = (colour(conditions, k).embeddings[0] for k in (0, 2))
    mixed = conditions.embeddings.get(
        [ConditionTerm((0,), 0.7), ConditionTerm((2,), 0.3)], "spherical"
    ).embeddings[0]
    assert np.linalg.norm(mixed) == pytest.approx(1.0, abs=1e-5)
    assert np.arccos(np.dot(red, mixed)) == pytest.approx(0.3 * np.arccos(np.dot(red, blue)), abs=1e-3)


def test_weights_that_cancel_are_refused(backend: Any) -> None:
    with pytest.raises(InvalidRequest, match="more than 0"):
        ConditionCaches(backend).embeddings.get([ConditionTerm((0,), 1.0), ConditionTerm((1,), -1.0)])


def test_embeddings_are_computed_once_and_bounded(backend: Any) -> None:
    conditions = ConditionCaches(backend, embedding_bytes=2 * 4 * 6)
    for index in (0, 0, 1, 2, 0):
        colour(conditions, index)
    counters = conditions.embeddings
    assert (counters.hits, counters.misses, counters.evictions) == (1, 5, 3)
    assert counters.bytes == 2 * 4 * 6


def test_slots_go_from_the_least_recently_used_key_to_the_next_and_pinned_keys_keep_theirs() -> None:
    lru: SlotLru[str] = SlotLru(4)
    pinned = [lru.reserve(key, pin=True) for key in ("p", "q")]
    assert pinned == [0, 1]
    assert [lru.reserve(key, pin=True) for key in ("r", "s")] == [2, 3]  # no half left to pin them in
    assert lru.touch("r")
    assert lru.reserve("t", pin=False) == 3
    assert "s" not in lru
    assert not lru.touch("s")
    assert [lru.slot(key) for key in ("p", "q", "r", "t")] == [0, 1, 2, 3]
    assert (len(lru), lru.evictable, lru.evictions) == (4, 2, 1)


def test_two_levels_of_one_float32_share_a_state_and_neighbouring_floats_do_not(backend: Any) -> None:
    conditions = ConditionCaches(backend)
    red = colour(conditions, 0)
    gather(conditions, [(at(0.7), red), (at(0.7 + 1e-12), red)])
    assert conditions.modulations.misses == 1
    beside = float(np.nextafter(np.float32(0.7), np.float32(1)))
    wanted = [(at(0.7), red), (at(beside), red)]
    assert_same(gather(conditions, wanted), direct(backend, wanted))
    assert conditions.modulations.misses == 2


class Apart:
    """A backend whose state is what it is given: the noise level, the condition, and both."""

    conditioner_rows = CHUNK
    state_memory: StateMemory = HostMemory()
    adapters: BackendAdapters | None = None

    def __init__(self, whole: Any) -> None:
        parts = (("noise", (), "level"), ("text", (6,), "condition"), ("both", (2,), "both"))
        named = ({"name": name, "shape": shape, "follows": follows} for name, shape, follows in parts)
        state = tuple(map(StateTensor.model_validate, named))
        self.manifest = whole.manifest.model_copy(update={"state": state})
        self.embed = whole.embed
        self.calls = 0

    def modulate(self, timesteps: Floats, embeddings: Floats) -> tuple[Floats, ...]:
        self.calls += 1
        return timesteps, embeddings, np.stack([timesteps, embeddings[:, 0]], axis=1)


@pytest.mark.parametrize("capacity", [0, 3000, 1 << 20])
def test_what_follows_the_condition_alone_is_held_once_a_condition(backend: Any, capacity: int) -> None:
    apart: Any = Apart(backend)
    conditions = ConditionCaches(apart, modulation_bytes=capacity)
    rng = np.random.default_rng(0)
    for _ in range(20):
        picks = rng.integers(0, [40, 4], (10, 2))
        wanted = [(at(20.0 * t), colour(conditions, int(c) if c < 3 else None)) for t, c in picks]
        out = tuple(np.empty((10, *entry.shape), np.float32) for entry in apart.manifest.state)
        conditions.modulations.gather(wanted, (), out)
        assert_same(out, direct(apart, wanted))
        assert conditions.modulations.bytes <= capacity
    if capacity == 1 << 20:
        states = {(bits, condition.key) for bits, condition in wanted}
        assert conditions.modulations.bytes <= 4 * (40 + 4 * 6 + 40 * 4 * 2)
        assert conditions.modulations.bytes < len(states) * 40 * conditions.modulations.entry_bytes


def test_a_guidance_scale_that_the_network_is_told_is_part_of_the_condition(backend: Any) -> None:
    conditions = ConditionCaches(backend)
    terms = [ConditionTerm((0,))]
    plain, weak, strong = (
        conditions.conditioning(terms, guidance_embedded=scale).conditions[0] for scale in (None, 1.0, 3.5)
    )
    assert len({plain.key, weak.key, strong.key}) == 3
    assert (weak.embeddings[0, -1], strong.embeddings[0, -1]) == (1.0, 3.5)
    np.testing.assert_array_equal(weak.embeddings[:, :-1], plain.embeddings[:, :-1])
    again = conditions.conditioning(terms, guidance_embedded=3.5).conditions[0]
    assert again.key == strong.key

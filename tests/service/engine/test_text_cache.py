"""Encodings of sentences: looked up in process, then among all workers, and only then computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ditserve.service.engine.conditions import ConditionCaches
from ditserve.service.engine.text_cache import TextCache, packed, unpacked
from ditserve.service.errors import InvalidRequest
from ditserve.service.jobs import ConditionTerm

Floats = npt.NDArray[np.float32]
Make = Callable[..., Any]
SIZE = 6


class Letters:
    """Counts letters; remembers what it was asked."""

    size, key = SIZE, "letters"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, sentence: str) -> Floats:
        self.asked.append(sentence)
        return np.array([1 + sentence.count(letter) for letter in "abcdef"], np.float32)


class Shelf:
    """A shared cache in a dictionary."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        return [self.held.get(key) for key in keys]

    def put_many(self, entries: Mapping[str, bytes]) -> None:
        self.held.update(entries)


def test_a_sentence_is_encoded_once_by_one_worker_for_all() -> None:
    shelf, one, other = Shelf(), Letters(), Letters()
    first = TextCache(one, shelf, capacity=1 << 20)
    second = TextCache(other, shelf, capacity=1 << 20)
    expected = first.get_many(["a bad cab", "", "fed"])
    np.testing.assert_array_equal(second.get_many(["a bad cab", "", "fed"]), expected)
    np.testing.assert_array_equal(expected[1], np.zeros(SIZE))
    assert (one.asked, other.asked) == (["a bad cab", "fed"], [])
    assert (first.misses, second.hits, second.misses) == (2, 2, 0)
    shelf.held.clear()
    second.get_many(["fed"])
    assert other.asked == []


def test_what_is_shared_by_another_encoder_or_damaged_is_not_taken() -> None:
    shelf, encoder = Shelf(), Letters()
    TextCache(encoder, shelf, capacity=1 << 20).get_many(["abc"])
    shelf.held = {key: value[:-1] for key, value in shelf.held.items()}
    again = Letters()
    TextCache(again, shelf, capacity=1 << 20).get_many(["abc"])
    assert again.asked == ["abc"]
    foreign = Letters()
    foreign.key = "another"
    TextCache(foreign, shelf, capacity=1 << 20).get_many(["abc"])
    assert foreign.asked == ["abc"]


def test_the_least_recently_used_leaves() -> None:
    encoder = Letters()
    texts = TextCache(encoder, None, capacity=2 * 4 * SIZE)
    for sentence in ("a", "b", "a", "c", "a", "b"):
        texts.get_many([sentence])
    assert encoder.asked == ["a", "b", "c", "b"]
    assert (texts.evictions, texts.bytes) == (2, 2 * 4 * SIZE)


def test_text_and_classes_make_one_condition_and_mix(make_backend: Make) -> None:
    conditions = ConditionCaches(make_backend(), texts=TextCache(Letters(), None, capacity=1 << 20))
    plain = conditions.embeddings.get([ConditionTerm((0,))])
    worded = conditions.embeddings.get([ConditionTerm((0,), text="abc")])
    np.testing.assert_allclose(worded.embeddings[0] - plain.embeddings[0], [2, 2, 2, 1, 1, 1], atol=1e-6)
    assert worded.key != plain.key
    assert worded.key == conditions.embeddings.get([ConditionTerm((0,), 3.0, "abc")]).key
    mixed = conditions.embeddings.get([ConditionTerm((0,), 1.0, "abc"), ConditionTerm((0,), 1.0)])
    np.testing.assert_allclose(
        mixed.embeddings[0], (worded.embeddings[0] + plain.embeddings[0]) / 2, atol=1e-6
    )
    assert conditions.null.key == conditions.embeddings.get([ConditionTerm((None,))]).key


def test_a_model_without_text_refuses_one(make_backend: Make) -> None:
    with pytest.raises(InvalidRequest, match="takes no text"):
        ConditionCaches(make_backend()).embeddings.get([ConditionTerm((0,), text="abc")])


@pytest.mark.parametrize(
    ("numbers", "bytes_each"),
    [
        ([1.0, -2.5, 0.0, 65504.0], 2),  # half precision
        ([1e30, -1e-30, 3.0, 0.0], 2),  # bfloat16, made so below
        ([0.1, 1e30, 3.0, 0.0], 4),
    ],
)
def test_a_shared_encoding_loses_nothing_and_takes_two_bytes_where_it_can(
    numbers: list[float], bytes_each: int
) -> None:
    encoding = np.array(numbers, np.float32)
    if bytes_each == 2:
        encoding = (encoding.view(np.uint32) & 0xFFFF0000).view(np.float32)
    value = packed(encoding)
    assert len(value) == 1 + bytes_each * len(encoding)
    np.testing.assert_array_equal(unpacked(value, len(encoding)), encoding)
    for damaged in (b"", value[:-1], b"x" + value[1:], value + b"0"):
        assert unpacked(damaged, len(encoding)) is None


def test_the_empty_sentence_has_an_encoding_where_the_encoder_gives_one() -> None:
    encoder = Letters()
    cache = TextCache(encoder, None, capacity=1 << 20, encodes_nothing=True)
    np.testing.assert_array_equal(cache.get_many(["", "a"])[0], np.ones(SIZE))
    assert encoder.asked == ["", "a"]

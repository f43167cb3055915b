"""Captions as texts of a network: a wording a line, and those kept from training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ditserve.model.data.texts import Texts, wordings_of


class Lengths:
    """A text encoder whose numbers are the length of a sentence, and of its tokens' words."""

    size = 1

    def __init__(self, tokens: int = 0) -> None:
        self.tokens = tokens

    def encode(self, sentences: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        rows = [[len(s), *map(len, s.split()[: self.tokens])] for s in sentences]
        return np.array([row + [0] * (1 + self.tokens - len(row)) for row in rows], np.float32)


CAPTIONS = ("a cat\ncat\n\na feline", "a red fox", "owl\nowls\n\nan owl\nbird")
ENCODER = f"{__name__}:Lengths"


def test_wordings_after_an_empty_line_are_kept_from_training() -> None:
    assert wordings_of(CAPTIONS[0]) == (["a cat", "cat"], ["a feline"])
    assert wordings_of("a fox") == (["a fox"], [])
    assert wordings_of("") == ([""], [])
    assert wordings_of("\nfox\n \nvixen\n") == (["fox"], ["vixen"])


@pytest.mark.parametrize("tokens", [0, 3])
def test_a_draw_is_among_the_wordings_of_its_kind(tokens: int) -> None:
    texts = Texts(CAPTIONS, ENCODER, tokens)
    index = np.array([2, 0])
    assert texts.draw(index)[:, 0].tolist() == [3, 5]
    assert texts.draw(index, unseen=True)[:, 0].tolist() == [6, 8]
    drawn = {tuple(texts.draw(index, np.random.default_rng(k))[:, 0]) for k in range(40)}
    assert drawn == {(a, b) for a in (3, 4) for b in (3, 5)}
    with pytest.raises(IndexError):
        texts.draw(np.array([1]), unseen=True)


def test_the_states_of_tokens_follow() -> None:
    np.testing.assert_array_equal(Texts(CAPTIONS, ENCODER, 3).draw(np.array([1])), [[9, 1, 3, 3]])

"""From words to classes, and the suggestions where there is no such class."""

import pytest

from ditserve.model.spec.manifest import Factor
from ditserve.service.errors import UnknownCondition
from ditserve.service.jobs import ConditionTerm
from ditserve.service.vocabulary import Vocabulary

VOCABULARY = Vocabulary(
    [
        Factor(
            name="label", classes=("apple", "red apple", "T-Rex", "person: dark skin tone", "Åland", "rex")
        ),
        Factor(name="style", classes=("noto", "twemoji")),
    ]
)


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("apple", 0),
        ("Red_Apple", 1),
        ("t rex", 2),
        ("Person dark-skin tone", 3),
        ("åland", 4),
        (5, 5),
        (None, None),
    ],
)
def test_names_are_compared_by_their_words(name: str | int | None, index: int | None) -> None:
    assert VOCABULARY.term({"label": name}).labels == (index, None)


@pytest.mark.parametrize(
    ("prompt", "labels"),
    [
        ("an apple", (0, None)),
        ("a RED apple, please", (1, None)),
        ("apples in the noto style", (0, 0)),
        ("rex and a t-rex", (2, None)),
        ("twemoji person: dark skin tone", (3, 1)),
    ],
)
def test_the_longest_name_in_a_prompt_wins(prompt: str, labels: tuple[int | None, ...]) -> None:
    assert VOCABULARY.match(prompt).labels == labels


@pytest.mark.parametrize(
    ("prompt", "suggestion"), [("a shiny appel", "apple"), ("noto", "apple"), ("!!!", "apple")]
)
def test_a_prompt_without_a_class_gets_suggestions(prompt: str, suggestion: str) -> None:
    with pytest.raises(UnknownCondition) as caught:
        VOCABULARY.match(prompt)
    assert suggestion in caught.value.suggestions


def test_an_unknown_factor_is_told_which_there_are() -> None:
    with pytest.raises(UnknownCondition, match="label, style") as caught:
        VOCABULARY.term({"colour": "red"})
    assert set(caught.value.suggestions) <= {"label", "style"}


def test_a_very_long_name_is_not_echoed() -> None:
    with pytest.raises(UnknownCondition) as caught:
        VOCABULARY.term({"label": "x" * 10_000})
    assert len(caught.value.detail) < 200


def test_two_classes_with_the_same_words_are_told_apart_as_written_or_by_number() -> None:
    twice = Vocabulary([Factor(name="label", classes=("ice-cream", "Ice Cream", "crane", "crane"))])
    assert twice.term({"label": "Ice Cream"}).labels == (1,)
    assert twice.term({"label": 3}).labels == twice.match("3").labels == (3,)
    with pytest.raises(UnknownCondition, match=r"2 \('crane'\), 3 \('crane'\)"):
        twice.term({"label": "crane"})
    with pytest.raises(UnknownCondition, match=r"2 \('crane'\), 3 \('crane'\)"):
        twice.match("a crane")


def test_a_number_is_a_class_of_the_first_factor_only_as_the_whole_prompt() -> None:
    numbered = Vocabulary(
        [Factor(name="label", classes=("0", "1", "2", "3")), Factor(name="style", classes=("3", "oil"))]
    )
    assert numbered.match("3").labels == (3, None)
    with pytest.raises(UnknownCondition, match="names no label"):
        numbered.match("3 dogs in oil")


def test_a_model_without_factors_matches_every_prompt() -> None:
    assert Vocabulary([]).match("anything").labels == ()


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("an apple", (0, None)),
        ("Red apple in noto style", (1, 0)),
        ("twemoji red apples", (1, 1)),
        ("noto", (None, 0)),
        # What else a text says changes what is drawn, and the style of it stays.
        ("a red apple with eyes", (None, None)),
        ("a red apple with eyes in noto style", (None, 0)),
        ("two apples", (None, None)),
        ("", (None, None)),
    ],
)
def test_a_text_tells_a_class_where_it_says_nothing_else(text: str, labels: tuple[int | None, ...]) -> None:
    term = VOCABULARY.told(text)
    assert term.labels == labels
    assert term.text == ("" if labels[0] is not None else text)


def test_a_factor_that_is_left_out_is_its_default() -> None:
    style = Factor(name="style", classes=("noto", "twemoji"), default="twemoji")
    usual = Vocabulary([Factor(name="label", classes=("apple", "ox")), style])
    assert usual.term({"label": "ox"}).labels == (1, 1)
    assert usual.term({"label": "ox", "style": None}).labels == (1, None)
    assert usual.told("an ox, noto").labels == (1, 0)
    assert usual.told("an ox with a hat") == ConditionTerm((None, 1), text="an ox with a hat")
    assert usual.match("an ox").labels == (1, 1)


@pytest.mark.parametrize("read", ["told", "match"])
def test_classes_beside_a_prompt_are_certain(read: str) -> None:
    reader = getattr(VOCABULARY, read)
    assert reader("a red apple in noto style", {"style": "twemoji"}).labels == (1, 1)
    assert reader("a red apple", {"label": "apple"}).labels == (0, None)
    with pytest.raises(UnknownCondition):
        reader("a red apple", {"size": "large"})


def test_a_text_is_read_where_no_class_is_to_be() -> None:
    assert VOCABULARY.told("a red apple", {"label": None}) == ConditionTerm((None, None), text="a red apple")
    assert VOCABULARY.told("a red apple", {"label": "apple"}).text == ""
    assert VOCABULARY.match("anything at all", {"label": "apple"}).labels == (0, None)


def test_a_text_tells_no_class_by_a_name_of_two() -> None:
    cranes = Vocabulary([Factor(name="label", classes=("crane", "ox", "crane"))])
    assert [cranes.told(text).labels for text in ("a crane", "an ox")] == [(None,), (1,)]
    assert Vocabulary([]).told("a crane").labels == ()

"""Class names as ImageNet has them: synonyms by comma, names of two classes, and numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditserve.model.spec.class_names import ClassNames, UnknownClassError, class_reference
from ditserve.model.spec.manifest import Factor

IMAGENET = Factor(
    name="label",
    classes=(
        "tench, Tinca tinca",
        "goldfish, Carassius auratus",
        "great white shark, white shark, man-eater, Carcharodon carcharias",
        "crane",
        "maillot",
        "maillot, tank suit",
        "crane",
        "C++",
        "C#",
        "1,000 dollars",
    ),
)
NAMES = ClassNames(IMAGENET)
NUMBERED = ClassNames(Factor(name="label", classes=tuple(map(str, range(12)))))
SORTED = ClassNames(Factor(name="label", classes=("0", "1", "10", "2")))


@pytest.mark.parametrize(
    ("ref", "index"),
    [
        ("goldfish", 1),
        ("Carassius_Auratus", 1),
        ("goldfish, Carassius auratus", 1),
        ("white shark", 2),
        ("MAN EATER", 2),
        ("maillot", 4),
        ("tank suit", 5),
        ("C++", 7),
        ("c#", 8),
        ("1,000 dollars", 9),
        ("6", 6),
        ("1", 1),
        (6, 6),
    ],
)
def test_a_class_is_named_by_its_name_a_synonym_or_its_number(ref: str | int, index: int) -> None:
    assert NAMES.index(ref) == index


@pytest.mark.parametrize("ref", ["crane", "Crane", "c"])
def test_a_name_of_two_classes_is_refused_with_their_numbers(ref: str) -> None:
    first, second = (3, 6) if ref.lower() == "crane" else (7, 8)
    with pytest.raises(UnknownClassError, match=rf"several classes of label: {first} \(.*\), {second} \("):
        NAMES.index(ref)
    with pytest.raises(UnknownClassError, match="by its number"):
        NAMES.in_prompt(f"two {ref}s at dawn" if ref != "c" else "the C language")
    assert [class_reference(IMAGENET, index) for index in (1, 3)] == ["goldfish, Carassius auratus", 3]


@pytest.mark.parametrize("ref", [10, -1, "10", "99999", "gold", "", " ", ",", "000 dollars"])
def test_what_names_no_class_is_refused(ref: str | int) -> None:
    with pytest.raises(UnknownClassError):
        NAMES.index(ref)


@pytest.mark.parametrize(
    ("prompt", "index"),
    [
        ("a goldfish in a bowl", 1),
        ("two goldfishs, please", 1),
        ("a great white shark", 2),
        ("a man-eater", 2),
        ("goldfisher", None),
        ("marigoldfish", None),
        ("", None),
        ("!!", None),
        ("a maillot", 4),
    ],
)
def test_a_prompt_names_a_class_in_whole_words(prompt: str, index: int | None) -> None:
    assert NAMES.in_prompt(prompt) == index


def test_a_number_in_a_prompt_is_a_class_only_if_it_is_all_of_it() -> None:
    assert NUMBERED.in_prompt("3 dogs") is None
    assert NUMBERED.in_prompt("one of 10, or 2") is None
    assert NUMBERED.in_prompt(" 3 ") == 3
    # A name comes before a number.
    assert (SORTED.index("10"), SORTED.index("2"), SORTED.index("3"), SORTED.index(2)) == (2, 3, 3, 2)


@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=8), st.integers(0, 7))
def test_a_class_reference_leads_back_to_its_class(classes: list[str], number: int) -> None:
    factor, index = Factor(name="label", classes=tuple(classes)), number % len(classes)
    assert ClassNames(factor).index(class_reference(factor, index)) == index

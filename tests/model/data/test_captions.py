"""Wordings of emoji: names, keywords and styles."""

from __future__ import annotations

from ditserve.model.data.captions import SHARED, Wordings, clean

NAMES = {f"face-{k}": f"face {k}" for k in range(SHARED + 1)} | {"sleepy-cat": "Sleepy Cat"}
KEYWORDS = {name: ["face", ":D"] for name in NAMES} | {"sleepy-cat": ["tired_cat", "face 3", "nap"]}


def test_words_are_cleaned_and_smileys_are_none() -> None:
    assert clean("Tired_Cat") == "tired cat"
    assert clean(":D") == clean(":(") == clean("!") == ""


def test_a_name_is_said_in_many_ways() -> None:
    lines = Wordings(NAMES, KEYWORDS)("sleepy-cat", "noto-v1")
    # What an evaluation asks for tells all that the labels tell.
    assert lines[0] == "sleepy cat in noto v1 style"
    assert {"sleepy cat", "a sleepy cat", "sleepy cat in noto v1 style", "tired cat", "nap"} & {*lines}
    assert not [line for line in lines if "noto v1 a " in line]


def test_a_keyword_of_many_names_or_the_name_of_another_does_not_stand_alone() -> None:
    wordings = Wordings(NAMES, KEYWORDS)
    assert wordings.keywords["face-1"] == []
    assert wordings.keywords["sleepy-cat"] == ["tired cat", "nap"]


def test_wordings_kept_from_training_are_in_no_caption() -> None:
    wordings = Wordings(NAMES, KEYWORDS)
    for name in NAMES:
        trained, unseen = {*wordings(name, "noto")}, {*wordings.unseen(name, "noto")}
        assert not trained & unseen
        assert {wordings.names[name], f"{wordings.names[name]} in noto style"} <= trained
    assert any(wordings.unseen(name, "noto") for name in NAMES)

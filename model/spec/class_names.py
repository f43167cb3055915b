"""The class names of a factor: from a name, a number or a prompt to a class. One rule, offline and over HTTP.

    names = ClassNames(Factor(name="label", classes=("goldfish, Carassius auratus", "crane", "ox", "crane")))
    names.index("Goldfish")             # 0: parts between commas are synonyms; case does not matter
    names.index(3)                      # 3
    names.index("crane")                # refused: 1 and 3 have that name
    names.in_prompt("two oxen, an ox")  # 2: names are matched as whole words

Pure: no torch, no I/O.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from rapidfuzz import fuzz, process

from ditserve.model.spec.errors import ModelError

SUGGESTIONS = 5
# Similarity of 0 to 100 below which a suggestion is noise.
CUTOFF = 60
LISTED = 8  # classes of one name that a message lists
# The words of a text beside names that change nothing of what is drawn.
GLUE = frozenset(("a", "an", "the", "of", "in", "style", "emoji"))
_WORD = re.compile(r"[^\W_]+")
# A comma within a number, as in "1,000", parts no synonyms.
_COMMA = re.compile(r"(?<!\d),|,(?!\d)")
_NUMBER = re.compile(r"\s*([0-9]{1,9})\s*")

Words = tuple[str, ...]


class UnknownClassError(ModelError):
    """A name that means no class, or several; `suggestions` are the closest class names."""

    def __init__(self, message: str, suggestions: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.suggestions = tuple(suggestions)


class NamedFactor(Protocol):
    """A factor of a bundle: its name and class names, in index order, and that of the default class."""

    @property
    def name(self) -> str: ...
    @property
    def classes(self) -> Sequence[str]: ...
    @property
    def default(self) -> str | None: ...


def same_classes(ours: Sequence[NamedFactor], theirs: Sequence[NamedFactor]) -> bool:
    """Return whether factors have the same names and classes, whatever their defaults."""
    named = ([(factor.name, tuple(factor.classes)) for factor in factors] for factors in (ours, theirs))
    return next(named) == next(named)


def words(text: str) -> Words:
    """Return the words of a name or a prompt, casefolded: "Red-Apple" → ("red", "apple")."""
    return tuple(_WORD.findall(text.casefold()))


class ClassNames:
    """The names of one factor's classes.

    A name is looked up as it is written, then without regard to case, then by its words, and at last among
    the synonyms: the parts of a class name between commas. So "maillot" is the class of just that name, and
    not "maillot, tank suit".
    """

    def __init__(self, factor: NamedFactor) -> None:
        self.factor, self.classes = factor.name, tuple(factor.classes)
        exact, folded, whole, synonyms = (defaultdict[object, list[int]](list) for _ in range(4))
        for index, name in enumerate(self.classes):
            exact[name].append(index)
            folded[name.strip().casefold()].append(index)
            whole[words(name)].append(index)
            for synonym in {words(part) for part in _COMMA.split(name)}:
                synonyms[synonym].append(index)
        for table in (whole, synonyms):
            table.pop((), None)
        self._exact, self._folded = dict(exact), dict(folded)
        # A class's whole name comes before a synonym of another class.
        self._words: Mapping[object, list[int]] = {**synonyms, **whole}
        self.default = None if factor.default is None else self.index(factor.default)
        self._longest = max((len(key) for key in self._words if isinstance(key, tuple)), default=0)

    def index(self, ref: str | int) -> int:
        """Return the class that a name or a number means; a text that is a number and no name is that number.

        Raises:
            UnknownClassError: it means no class, or several.
        """
        if isinstance(ref, int):
            return self._numbered(ref)
        classes = self._named(ref)
        if classes:
            return self._only(ref, classes)
        if number := _NUMBER.fullmatch(ref):
            return self._numbered(int(number[1]))
        raise UnknownClassError(f"This model has no {self.factor} {quoted(ref)}.", closest(ref, self.classes))

    def in_prompt(self, prompt: str) -> int | None:
        """Return the class that a prompt names; None if it names none: see `found_in`.

        Raises:
            UnknownClassError: the name that it has is that of several classes.
        """
        found = self.found_in(prompt)
        return None if found is None else self._only(*found)

    def found_in(self, prompt: str) -> tuple[str, Sequence[int]] | None:
        """Return the name that a prompt has, as it is written there, and the classes of that name.

        It is the class whose words occur in the prompt side by side. The class with the most words wins, and
        among those the earliest in the prompt. A plural "s" on the last word is ignored. A name that is a
        number must be the whole prompt: "3 dogs" does not name class "3".
        """
        classes = self._named(prompt)
        if classes:
            return prompt, classes
        for window in _windows(words(prompt), self._longest):
            for key in (window, (*window[:-1], window[-1].removesuffix("s"))):
                if key in self._words and not all(word.isdigit() for word in key):
                    return " ".join(window), self._words[key]
        return None

    def suggest(self, prompt: str) -> list[str]:
        """Return the names closest to any word of a prompt, best first; the first names if none is close."""
        scores: dict[str, float] = {}
        for token in words(prompt)[:50]:
            if len(token) < 3:
                continue
            for name, score, _ in process.extract(
                token, self.classes, scorer=fuzz.ratio, score_cutoff=CUTOFF, limit=SUGGESTIONS
            ):
                scores[name] = max(score, scores.get(name, 0.0))
        ranked = sorted(scores, key=lambda name: -scores[name])
        return ranked[:SUGGESTIONS] or list(self.classes[:SUGGESTIONS])

    def _named(self, name: str) -> Sequence[int]:
        return (
            self._exact.get(name)
            or self._folded.get(name.strip().casefold())
            or self._words.get(words(name))
            or ()
        )

    def _numbered(self, number: int) -> int:
        if 0 <= number < len(self.classes):
            return number
        raise UnknownClassError(
            f"There is no {self.factor} {number}; this model has {self.factor} 0 to {len(self.classes) - 1}."
        )

    def _only(self, name: str, classes: Sequence[int]) -> int:
        if len(classes) == 1:
            return classes[0]
        listed = ", ".join(f"{index} ({quoted(self.classes[index])})" for index in classes[:LISTED])
        more = f" and {len(classes) - LISTED} more" if len(classes) > LISTED else ""
        raise UnknownClassError(
            f"{quoted(name)} is the name of several classes of {self.factor}: {listed}{more}; "
            "name one by its number."
        )


def classes_told(prompt: str, factors: Sequence[ClassNames]) -> tuple[tuple[int | None, ...], str]:
    """Return the class of each factor that a text tells, else its default or None, and the text to be read.

    The class of the first factor counts only where the text has no other words than names and `GLUE`, because
    the others change what is drawn; then nothing is left to be read. "A cat in noto style" is the class "cat"
    in the style "noto", "a cat with sunglasses in noto style" is this text in the style "noto". A name of
    several classes tells none.
    """
    left, told = list(words(prompt)), list[int | None]()
    for factor in factors:
        found = factor.found_in(prompt)
        only = found is not None and len(found[1]) == 1
        told.append(found[1][0] if found and only else factor.default)
        named = words(found[0]) if found and only else ()
        left = [word for word in left if word not in named]
    if told and not GLUE.issuperset(left):
        told[0] = None
    return tuple(told), "" if told and told[0] is not None else prompt


def _windows(tokens: Words, longest: int) -> Iterator[Words]:
    """Yield the runs of at most `longest` tokens side by side, the longest first."""
    for length in range(min(longest, len(tokens)), 0, -1):
        for start in range(len(tokens) - length + 1):
            yield tokens[start : start + length]


def closest(name: str, names: Sequence[str]) -> list[str]:
    """Return the names most similar to `name`, best first; empty if none is similar."""
    matches = process.extract(
        name[:100], names, scorer=fuzz.WRatio, processor=str.casefold, score_cutoff=CUTOFF, limit=SUGGESTIONS
    )
    return [match for match, _, _ in matches]


def class_reference(factor: NamedFactor, index: int) -> str | int:
    """Return what `ClassNames.index` reads as the class: its name, or its number if another has that name."""
    name = factor.classes[index]
    return name if factor.classes.count(name) == 1 else index


def quoted(name: str) -> str:
    """Return `name` as a message quotes it: on one line, cut after 60 characters."""
    return repr(name if len(name) <= 60 else f"{name[:60]}…")

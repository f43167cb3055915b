"""The class names of a model: from names and prompts to class indices.

Works for any number of factors of any names, and knows no HTTP. Names are compared by their words: case,
hyphens and underscores do not matter.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from rapidfuzz import fuzz, process

from ditserve.service.errors import UnknownCondition
from ditserve.service.jobs import ConditionTerm

SUGGESTIONS = 5
# Similarity of 0 to 100 below which a suggestion is noise.
_CUTOFF = 60
_WORD = re.compile(r"[^\W_]+")

ClassRef = str | int | None


class NamedFactor(Protocol):
    """A factor of a bundle: its name and class names, in index order."""

    @property
    def name(self) -> str: ...
    @property
    def classes(self) -> Sequence[str]: ...


def words(text: str) -> tuple[str, ...]:
    """Return the words of a name or a prompt, casefolded: "Red-Apple" → ("red", "apple")."""
    return tuple(_WORD.findall(text.casefold()))


class Vocabulary:
    """The factors of one model, indexed by the words of their class names."""

    def __init__(self, factors: Sequence[NamedFactor]) -> None:
        self._factors = tuple(factors)
        self._index = tuple(
            {words(name): index for index, name in reversed(list(enumerate(factor.classes)))}
            for factor in factors
        )

    def term(self, condition: Mapping[str, ClassRef], weight: float = 1.0) -> ConditionTerm:
        """Return the class indices of a condition, in factor order.

        A factor left out, or None, is the null class.

        Raises:
            UnknownCondition: there is no such factor or class; carries the closest names.
        """
        names = [factor.name for factor in self._factors]
        for key in condition:
            if key not in names:
                raise UnknownCondition(
                    f"This model has no factor {_quoted(key)}; it has {', '.join(names) or 'none'}.",
                    suggestions=_closest(key, names) or names,
                    extra={"factor": key[:100]},
                )
        labels = tuple(self._class(position, condition.get(name)) for position, name in enumerate(names))
        return ConditionTerm(labels, weight)

    def match(self, prompt: str) -> ConditionTerm:
        """Return the classes that a prompt names.

        For each factor it is the class whose words occur in the prompt side by side. The class with the most
        words wins, and among those the earliest in the prompt. A plural "s" on the last word is ignored. The
        first factor must be named, the others may be left out. Example: "two red apples, noto" names "red
        apple", not "apple", and "noto".

        Raises:
            UnknownCondition: the prompt names no class of the first factor; carries the closest names.
        """
        tokens = words(prompt)
        labels = tuple(_longest(index, tokens) for index in self._index)
        if labels and labels[0] is None:
            factor = self._factors[0]
            raise UnknownCondition(
                f"The prompt names no {factor.name} this model knows; "
                f"name one of its {len(factor.classes)} classes.",
                suggestions=self._suggest(factor.classes, tokens),
                extra={"factor": factor.name},
            )
        return ConditionTerm(labels)

    def _class(self, position: int, ref: ClassRef) -> int | None:
        factor, index = self._factors[position], self._index[position]
        if ref is None:
            return None
        if isinstance(ref, int):
            if 0 <= ref < len(factor.classes):
                return ref
            raise UnknownCondition(
                f"There is no {factor.name} {ref}; "
                f"this model has {factor.name} 0 to {len(factor.classes) - 1}.",
                extra={"factor": factor.name},
            )
        label = index.get(words(ref))
        if label is None:
            raise UnknownCondition(
                f"This model has no {factor.name} {_quoted(ref)}.",
                suggestions=_closest(ref, factor.classes),
                extra={"factor": factor.name},
            )
        return label

    def _suggest(self, names: Sequence[str], tokens: Sequence[str]) -> list[str]:
        """Return the names closest to any word of a prompt, best first; the first names if none is close."""
        scores: dict[str, float] = {}
        for token in tokens[:50]:
            if len(token) < 3:
                continue
            for name, score, _ in process.extract(
                token, names, scorer=fuzz.ratio, score_cutoff=_CUTOFF, limit=SUGGESTIONS
            ):
                scores[name] = max(score, scores.get(name, 0.0))
        ranked = sorted(scores, key=lambda name: -scores[name])
        return ranked[:SUGGESTIONS] or list(names[:SUGGESTIONS])


def _longest(index: Mapping[tuple[str, ...], int], tokens: tuple[str, ...]) -> int | None:
    """Return the class with the most words that occur side by side in `tokens`, None if there is none."""
    for length in range(max(map(len, index), default=0), 0, -1):
        for start in range(len(tokens) - length + 1):
            window = tokens[start : start + length]
            singular = (*window[:-1], window[-1].removesuffix("s"))
            label = index.get(window, index.get(singular))
            if label is not None:
                return label
    return None


def _closest(name: str, names: Sequence[str]) -> list[str]:
    matches = process.extract(
        name[:100], names, scorer=fuzz.WRatio, processor=str.casefold, score_cutoff=_CUTOFF, limit=SUGGESTIONS
    )
    return [match for match, _, _ in matches]


def _quoted(name: str) -> str:
    """Return `name` as a message quotes it: on one line, cut after 60 characters."""
    return repr(name if len(name) <= 60 else f"{name[:60]}…")

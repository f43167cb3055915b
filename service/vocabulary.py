"""The conditions of a model: from names and prompts to class indices, by `model.spec.class_names`.

Works for any number of factors of any names, and knows no HTTP.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from ditserve.model.spec.class_names import (
    ClassNames,
    NamedFactor,
    UnknownClassError,
    classes_told,
    closest,
    quoted,
)
from ditserve.service.errors import UnknownCondition
from ditserve.service.jobs import ConditionTerm

ClassRef = str | int | None


class Vocabulary:
    """The class names of all factors of one model."""

    def __init__(self, factors: Sequence[NamedFactor]) -> None:
        self._factors = tuple(ClassNames(factor) for factor in factors)

    def term(
        self,
        condition: Mapping[str, ClassRef],
        weight: float = 1.0,
        *,
        told: Sequence[int | None] | None = None,
    ) -> ConditionTerm:
        """Return the class indices of a condition, in factor order.

        A factor left out is the class that a prompt has `told`, or else its default class, if it has one.
        None is the null class.

        Raises:
            UnknownCondition: there is no such factor or class, or several of one name; carries the closest
                names.
        """
        names = [factor.factor for factor in self._factors]
        for key in condition:
            if key not in names:
                raise UnknownCondition(
                    f"This model has no factor {quoted(key)}; it has {', '.join(names) or 'none'}.",
                    suggestions=closest(key, names) or names,
                    extra={"factor": key[:100]},
                )
        labels = []
        for factor, of_prompt in zip(self._factors, told or [None] * len(names), strict=True):
            if factor.factor not in condition:
                labels.append(factor.default if of_prompt is None else of_prompt)
                continue
            ref = condition[factor.factor]
            with _refusals_of(factor):
                labels.append(None if ref is None else factor.index(ref))
        return ConditionTerm(tuple(labels), weight)

    def match(self, prompt: str, condition: Mapping[str, ClassRef] | None = None) -> ConditionTerm:
        """Return the classes that a prompt names, with those of a condition in their place.

        The first factor must be named, the others may be left out. Example: "two red apples, noto" names "red
        apple", not "apple", and "noto". A prompt that is a number is the number of a class of the first
        factor.

        Raises:
            UnknownCondition: the prompt names no class of the first factor, or a name of several classes;
                carries the closest names.
        """
        labels: list[int | None] = []
        given = condition or {}
        for factor in self._factors:
            if factor.factor in given:
                labels.append(None)
                continue
            with _refusals_of(factor):
                if prompt.strip().isdigit():
                    labels.append(None if labels else factor.index(prompt))
                else:
                    labels.append(factor.in_prompt(prompt))
        if labels and labels[0] is None and (first := self._factors[0]).factor not in given:
            raise UnknownCondition(
                f"The prompt names no {first.factor} this model knows; "
                f"name one of its {len(first.classes)} classes.",
                suggestions=first.suggest(prompt),
                extra={"factor": first.factor},
            )
        return self.term(given, told=labels)

    def told(self, text: str, condition: Mapping[str, ClassRef] | None = None) -> ConditionTerm:
        """Return the classes that a text tells, and the text where it says more: see `classes_told`.

        Those of a condition are in their place.
        """
        told, left = classes_told(text, self._factors)
        term = self.term(condition or {}, told=told)
        # A condition may leave out what the text has told.
        return replace(term, text=left if term.labels and term.labels[0] is not None else text)


@contextmanager
def _refusals_of(factor: ClassNames) -> Iterator[None]:
    """Raise a name that means no class, or several, as the service's own error."""
    try:
        yield
    except UnknownClassError as error:
        raise UnknownCondition(
            str(error), suggestions=list(error.suggestions), extra={"factor": factor.factor}
        ) from None

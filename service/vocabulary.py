"""The conditions of a model: from names and prompts to class indices, by `model.spec.class_names`.

Works for any number of factors of any names, and knows no HTTP.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

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

    def term(self, condition: Mapping[str, ClassRef], weight: float = 1.0) -> ConditionTerm:
        """Return the class indices of a condition, in factor order.

        A factor left out, or None, is the null class.

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
        for factor in self._factors:
            ref = condition.get(factor.factor)
            with _refusals_of(factor):
                labels.append(None if ref is None else factor.index(ref))
        return ConditionTerm(tuple(labels), weight)

    def match(self, prompt: str) -> ConditionTerm:
        """Return the classes that a prompt names.

        The first factor must be named, the others may be left out. Example: "two red apples, noto" names "red
        apple", not "apple", and "noto". A prompt that is a number is the number of a class of the first
        factor.

        Raises:
            UnknownCondition: the prompt names no class of the first factor, or a name of several classes;
                carries the closest names.
        """
        labels: list[int | None] = []
        for factor in self._factors:
            with _refusals_of(factor):
                if prompt.strip().isdigit():
                    labels.append(None if labels else factor.index(prompt))
                else:
                    labels.append(factor.in_prompt(prompt))
        if labels and labels[0] is None:
            first = self._factors[0]
            raise UnknownCondition(
                f"The prompt names no {first.factor} this model knows; "
                f"name one of its {len(first.classes)} classes.",
                suggestions=first.suggest(prompt),
                extra={"factor": first.factor},
            )
        return ConditionTerm(tuple(labels))

    def told(self, text: str) -> ConditionTerm:
        """Return the classes that a text tells, and the text where it says more: see `classes_told`."""
        labels, left = classes_told(text, self._factors)
        return ConditionTerm(labels, text=left)


@contextmanager
def _refusals_of(factor: ClassNames) -> Iterator[None]:
    """Raise a name that means no class, or several, as the service's own error."""
    try:
        yield
    except UnknownClassError as error:
        raise UnknownCondition(
            str(error), suggestions=list(error.suggestions), extra={"factor": factor.factor}
        ) from None

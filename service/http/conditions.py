"""The conditions that a request names, and how they are combined, as far as this model can follow. Pure.

A fault is the error of the field that it is in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.mixing import Combine, assign_blocks, normalised_weights, state_sources
from ditserve.model.spec.network_config import negative_mark
from ditserve.model.spec.pipeline_config import PipelineConfig
from ditserve.model.spec.text_encoder import spell_pictographs
from ditserve.service.http.operating_point import field_error, guidance_scale, sentence
from ditserve.service.http.schemas import MAX_TEXT, TEXT, GenerateRequest
from ditserve.service.jobs import ConditionTerm
from ditserve.service.vocabulary import ClassRef, Vocabulary

# The largest share, of either sign, that one condition of a composition may have. Weights that nearly cancel
# would multiply what the network says by thousands.
LARGEST_SHARE: Final = 100.0


@dataclass(frozen=True, slots=True)
class RequestedConditions:
    """The conditions of a request, how they are combined, and the text that guidance subtracts ("": none).

    `marks_negative` says that the model reads the same text otherwise where guidance subtracts it.
    """

    terms: tuple[ConditionTerm, ...]
    how: Combine
    negative_prompt: str
    marks_negative: bool = False

    @property
    def composed(self) -> int:
        """The number of conditions whose outputs are composed, each a row of a forward pass."""
        return len(self.terms) if self.how == "compose" else 1

    @property
    def can_be_guided(self) -> bool:
        """False where guidance would subtract from a condition the same one."""
        classes = (label for term in self.terms for label in term.labels)
        texts = {term.text for term in self.terms}
        same = texts == {self.negative_prompt} and not self.marks_negative
        return not same or any(label is not None for label in classes)


def requested_conditions(
    request: GenerateRequest, manifest: Manifest, vocabulary: Vocabulary
) -> RequestedConditions:
    """Return the conditions of a request.

    Raises:
        UnknownCondition: a factor or class that the model does not have.
        InvalidRequest: weights, a combination or a negative prompt that cannot be.
    """
    if request.prompt is not None:
        return _prompted(request, request.prompt, manifest, vocabulary)
    if isinstance(request.condition, dict):
        pairs: list[tuple[Mapping[str, ClassRef], float]] = [(request.condition, 1.0)]
    else:
        pairs = [(term.condition, term.weight) for term in request.condition]
    terms = tuple(_term(condition, weight, manifest, vocabulary) for condition, weight in pairs)
    _check_weights([term.weight for term in terms], request.mix)
    config = manifest.config
    if len(terms) > 1 and isinstance(config, PipelineConfig) and not _combines(request.mix, config):
        raise field_error("mix", 'The conditions of this model can only be composed: choose "compose".')
    if request.mix == "layers":
        try:
            state_sources(manifest.config, assign_blocks(manifest.config.depth, len(terms)))
        except ValueError as error:
            raise field_error("mix", sentence(error)) from None
    # One condition is the same, however it is combined.
    return _with_negative(terms, request.mix if len(terms) > 1 else "linear", request, manifest)


def _prompted(
    request: GenerateRequest, prompt: str, manifest: Manifest, vocabulary: Vocabulary
) -> RequestedConditions:
    """Return the condition of a prompt: the classes that it tells, and its text where it says more.

    Classes that the request names beside it are those in any case.
    """
    condition, reads = request.condition, manifest.config.text_size > 0
    if not isinstance(condition, dict):
        raise field_error("prompt", "Give a prompt or a list of conditions, not both.")
    if reads and TEXT in condition:
        raise field_error("prompt", "Give a prompt or the text of a condition, not both.")
    read = (
        vocabulary.told(_text(prompt, manifest), condition) if reads else vocabulary.match(prompt, condition)
    )
    return _with_negative((read,), "linear", request, manifest)


def _with_negative(
    terms: tuple[ConditionTerm, ...], how: Combine, request: GenerateRequest, manifest: Manifest
) -> RequestedConditions:
    marks = bool(negative_mark(manifest.config))
    return RequestedConditions(terms, how, _negative_prompt(request, manifest), marks)


def _combines(how: Combine, config: PipelineConfig) -> bool:
    """Return whether an imported pipeline can follow several conditions: masks of texts cannot be mixed."""
    return how == "compose" or (how != "layers" and not config.text_mask)


def _term(
    condition: Mapping[str, ClassRef], weight: float, manifest: Manifest, vocabulary: Vocabulary
) -> ConditionTerm:
    """Return one weighted condition. Its `text` is no factor where the model takes text."""
    classes = dict(condition)
    text = classes.pop(TEXT, None) if manifest.config.text_size else None
    if not isinstance(text, str | None):
        raise field_error("condition", "The text must be a string.")
    return replace(vocabulary.term(classes, weight), text=_text(text, manifest))


def _text(given: str | None, manifest: Manifest) -> str:
    """Return a text without spaces around it and with emoji by their names.

    An imported pipeline gets it as it is: its encoders may count spaces, and know emoji.
    """
    text = given or ""
    return text if isinstance(manifest.config, PipelineConfig) else spell_pictographs(text.strip())[:MAX_TEXT]


def _check_weights(weights: list[float], how: Combine) -> None:
    if how == "layers" and any(weight != 1.0 for weight in weights):
        raise field_error("condition", "Conditions in layers have no weights: leave weight out.")
    if how != "compose" and min(weights) < 0.0:
        raise field_error("condition", 'A negative weight needs "mix": "compose".')
    try:
        shares = normalised_weights(weights, len(weights))
    except ValueError as error:
        raise field_error("condition", sentence(error)) from None
    if max(map(abs, shares)) > LARGEST_SHARE:
        raise field_error(
            "condition",
            f"The weights nearly cancel: none may be more than {LARGEST_SHARE:g} times their sum.",
        )


def _negative_prompt(request: GenerateRequest, manifest: Manifest) -> str:
    text = _text(request.negative_prompt, manifest)
    if text and not manifest.config.text_size:
        raise field_error(
            "negative_prompt",
            'This model takes no text: give a condition of negative weight with "mix": "compose".',
        )
    if text and manifest.guidance != "classifier-free":
        raise field_error(
            "negative_prompt", "This model has no guidance that could subtract it: leave it out."
        )
    if text and guidance_scale(request, manifest) == 1.0:
        off = manifest.diffusion.unguided_scale
        raise field_error(
            "negative_prompt", f"Only guidance subtracts it: choose a guidance_scale above {off}."
        )
    return text

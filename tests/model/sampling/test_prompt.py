"""Conditions as a command line writes them: parsed, and embedded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch

from ditserve.model.nets.dit import DiT
from ditserve.model.sampling.prompt import (
    PromptTerm,
    SampleError,
    embed_terms,
    parse_condition,
    prompt_terms,
)
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.manifest import Factor

Tiny = Callable[..., DiTConfig]
Make = Callable[..., DiT]
FACTORS = (
    Factor(name="label", classes=("cat", "dog", "fox", "owl", "bee")),
    Factor(name="style", classes=("flat", "shaded", "line")),
)


class CountingEncoder:
    """A text encoder of three numbers per sentence, in place of a language model."""

    size = 3

    def encode(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        return np.array([[len(sentence), sentence.count(" ") + 1, 1] for sentence in sentences], np.float32)


def test_conditions_are_parsed() -> None:
    assert parse_condition("", FACTORS) == PromptTerm((None, None))
    assert parse_condition("style=line,label=fox,weight=0.5", FACTORS) == PromptTerm((2, 2), None, 0.5)
    assert parse_condition("text=a fox, in snow,label=fox", FACTORS) == PromptTerm(
        (2, None), "a fox, in snow"
    )
    synonyms = (Factor(name="label", classes=("goldfish, Carassius auratus", "crane", "crane")),)
    assert parse_condition("label=goldfish", synonyms).labels == (0,)
    assert parse_condition("label=goldfish, Carassius auratus,weight=2", synonyms).labels == (0,)
    assert parse_condition("label=2", synonyms).labels == (2,)
    with pytest.raises(SampleError, match=r"1 .*, 2 .*by its number"):
        parse_condition("label=crane", synonyms)
    for text, message in (
        ("colour=red", "no factor 'colour'; it has label, style"),
        ("label=caat", r"no label 'caat'; did you mean cat"),
        ("label=zzzzz", "no label 'zzzzz'$"),
        ("label=5", "label 0 to 4"),
        ("label=cat,weight=much", "not a number"),
    ):
        with pytest.raises(SampleError, match=message):
            parse_condition(text, FACTORS)


def test_text_goes_through_the_named_encoder(
    tiny: Tiny, network: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditserve.model.sampling.prompt.open_encoder", lambda name, tokens: CountingEncoder())
    dit = network(tiny(text_size=3))
    terms = [PromptTerm((1, None), "a fox"), PromptTerm((1, None))]
    with_text, without = embed_terms(dit, terms, "counting")
    labels = torch.tensor([[1, 3]])
    assert torch.allclose(with_text, dit.embed(labels, torch.tensor([[5.0, 2.0, 1.0]]))[0])
    assert torch.allclose(without, dit.embed(labels)[0])
    with pytest.raises(SampleError, match="gives 3 numbers, the model takes 7"):
        embed_terms(network(tiny(text_size=7)), terms, "counting")
    with pytest.raises(SampleError, match="takes no text"):
        embed_terms(network(), terms, "counting")


def test_a_prompt_is_the_classes_that_it_tells_or_its_text_as_it_is_written() -> None:
    factors = (Factor(name="label", classes=("cat face", "ox")), Factor(name="style", classes=("noto",)))
    terms = prompt_terms(("an ox in noto style", "🐱", "a 🐱 in the rain, noto"), factors)
    told, emoji, more = terms
    assert (told, emoji) == (PromptTerm((1, 0)), PromptTerm((0, None)))
    assert more == PromptTerm((None, 0), "a 🐱 in the rain, noto")
    noto = factors[1].model_copy(update={"default": "noto"})
    usual = (factors[0], noto)
    assert [term.labels for term in prompt_terms(("an ox", "rain"), usual)] == [(1, 0), (None, 0)]
    assert [parse_condition(text, usual).labels for text in ("label=ox", "label=ox,style=")] == [
        (1, 0),
        (1, None),
    ]
    assert prompt_terms(("a  🐱",), ()) == [PromptTerm((), "a  🐱")]

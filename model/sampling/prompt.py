"""Prompts: conditions as a command line writes them, parsed, embedded and combined."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ditserve.model.nets.factory import Network, NetworkConfig
from ditserve.model.nets.text import open_encoder
from ditserve.model.sampling.denoise import Conditions
from ditserve.model.spec.class_names import ClassNames, UnknownClassError, classes_told
from ditserve.model.spec.errors import ModelError
from ditserve.model.spec.manifest import Factor, Manifest
from ditserve.model.spec.mixing import Combine, mix_embeddings
from ditserve.model.spec.text_encoder import spell_pictographs, text_encoder_name


class SampleError(ModelError):
    """A request that cannot be sampled; the message is one sentence."""


@dataclass(frozen=True, slots=True)
class PromptTerm:
    """One condition of a picture: a class or None per factor, a sentence or None, and a relative weight."""

    labels: tuple[int | None, ...]
    text: str | None = None
    weight: float = 1.0


def read_prompts(file: Path) -> tuple[str, ...]:
    """Return the prompts of a text file, one a line.

    Raises:
        SampleError: it cannot be read, or has none.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise SampleError(f"--prompts {file} cannot be read: {error}") from None
    prompts = tuple(filter(None, map(str.strip, lines)))
    if not prompts:
        raise SampleError(f"--prompts {file} has no prompt: write one a line")
    return prompts


def parse_condition(text: str, factors: Sequence[Factor]) -> PromptTerm:
    """Parse `label=cat,style=noto` or `text=a red fox`, with an optional `weight=0.5`.

    Every part may be left out, and "style=" is no class where there is a default. Classes are named as in the
    service, or by their numbers.

    Raises:
        SampleError: an unknown factor or class, a name of several classes, or a weight that is no number.
    """
    given = dict(part.partition("=")[::2] for part in re.split(r",(?=\w+=)", text) if part)
    try:
        weight = float(given.pop("weight", "1"))
    except ValueError:
        raise SampleError(f"the weight in {text!r} is not a number") from None
    sentence = given.pop("text", None)
    names = [factor.name for factor in factors]
    unknown = sorted(given.keys() - set(names))
    if unknown:
        raise SampleError(f"the model has no factor {unknown[0]!r}; it has {', '.join(names) or 'none'}")
    labels = tuple(_class(factor, given.get(factor.name, factor.default)) for factor in factors)
    return PromptTerm(labels, sentence, weight)


def prompt_terms(prompts: Sequence[str], factors: Sequence[Factor]) -> list[PromptTerm]:
    """Return the conditions of prompts as the service reads them: classes told, and text if it says more."""
    names = [ClassNames(factor) for factor in factors]
    told = [classes_told(spell_pictographs(prompt), names) for prompt in prompts]
    return [
        PromptTerm(labels, prompt if left else None)
        for prompt, (labels, left) in zip(prompts, told, strict=True)
    ]


def _class(factor: Factor, name: str | None) -> int | None:
    if not name:
        return None
    try:
        return ClassNames(factor).index(name)
    except UnknownClassError as error:
        near = ", ".join(error.suggestions)
        hint = f"; did you mean {near}?" if near else ""
        raise SampleError(str(error).removesuffix(".") + hint) from None


def label_tensor(rows: Sequence[Sequence[int | None]], classes: Sequence[int]) -> Tensor:
    """Return labels int64 (N, F). None becomes the null class of its factor, its number of `classes`."""
    filled = [[null if k is None else k for k, null in zip(row, classes, strict=True)] for row in rows]
    return torch.tensor(filled, dtype=torch.int64).reshape(len(rows), len(classes))


def encoder_of(manifest: Manifest, terms: Sequence[PromptTerm], given: str | None) -> str:
    """Return the name of the encoder of the terms' texts, `given` or the model's; "" if there is no text.

    Raises:
        BundleError: the model's is a class, which must be given.
    """
    if not any(term.text for term in terms):
        return ""
    return text_encoder_name(manifest, given, "--encoder")


def embed_terms(model: Network, terms: Sequence[PromptTerm], encoder: str) -> list[Tensor]:
    """Return one embedding (E,) per term. Sentences are encoded by the named text encoder.

    Raises:
        SampleError: a sentence for a model that takes none, or an encoder of another width.
        TextError: an encoder that is not installed.
    """
    text = None
    if any(term.text for term in terms):
        if not model.config.text_size:
            raise SampleError("this model takes no text: it was trained on labels alone")
        opened = open_encoder(encoder, model.config.text_tokens)
        if opened.size != model.config.text_size:
            raise SampleError(
                f"encoder {encoder} gives {opened.size} numbers, the model takes {model.config.text_size}"
            )
        sentences = [spell_pictographs(term.text or "") for term in terms]
        text = torch.from_numpy(opened.encode(sentences))  # (N, text_width)
        text[[not term.text for term in terms]] = 0
    device = next(model.parameters()).device
    labels = label_tensor([term.labels for term in terms], model.config.classes)
    return list(model.embed(labels.to(device), None if text is None else text.to(device)))


def combine_conditions(
    embeddings: Sequence[Tensor],
    weights: Sequence[float],
    how: Combine,
    rows: int,
    *,
    negative: Tensor | None = None,
) -> Conditions:
    """Return the conditions of `rows` samples from one or more embeddings (E,) and their weights.

    "linear" and "spherical" mix the embeddings into one; "compose" and "layers" keep them apart, see
    `Conditions`. `negative` (E,) is what guidance subtracts.
    """
    subtracted = None if negative is None else negative.expand(rows, -1)
    if how == "linear" or how == "spherical":
        mixed = mix_embeddings(embeddings, weights, how).expand(rows, -1)
        return Conditions((mixed,), negative=subtracted)
    parts = tuple(embedding.expand(rows, -1) for embedding in embeddings)
    return Conditions(parts, tuple(weights), how, subtracted)


def random_conditions(
    config: NetworkConfig, count: int, random: np.random.Generator
) -> tuple[Tensor, Tensor | None]:
    """Draw labels (count, F), and texts (count, text_width); a model that takes no text has None.

    Their embeddings have length 1, as encoders give them, and their tokens a variance of 1.
    """
    columns = [random.integers(0, size, count) for size in config.classes]
    labels = torch.zeros(count, 0, dtype=torch.int64)
    if columns:
        labels = torch.from_numpy(np.stack(columns, axis=1))
    if not config.text_size:
        return labels, None
    text = torch.from_numpy(random.standard_normal((count, config.text_width), dtype=np.float32))
    embedding, tokens = text[:, : config.text_size], text[:, config.text_size :]
    return labels, torch.cat([embedding / embedding.norm(dim=1, keepdim=True), tokens], dim=1)

"""The prompts that the ladder of an imported pipeline is measured with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ditserve.model.evaluation.ladder import DRAWS, LadderInputs
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.errors import ModelError
from ditserve.model.train.imported_pipeline import encode_texts

# Ordinary ones: a thing, a person, a place, and text in a picture.
PROMPTS = (
    "a red bicycle leaning against a brick wall",
    "portrait of an old fisherman, soft light",
    "a mountain lake at sunrise with fog over the water",
    "a shop window with a sign that says OPEN",
)


def read_prompts(file: Path | None) -> tuple[str, ...]:
    """Return the prompts of a text file, one a line, or else `PROMPTS`.

    Raises:
        ModelError: it cannot be read, or has none.
    """
    if file is None:
        return PROMPTS
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ModelError(f"--prompts {file} cannot be read: {error}") from None
    prompts = tuple(filter(None, map(str.strip, lines)))
    if not prompts:
        raise ModelError(f"--prompts {file} has no prompt: write one a line")
    return prompts


def prompt_inputs(bundle: Bundle, prompts: Sequence[str], device: str) -> LadderInputs:
    """Return the encoded prompts, each `DRAWS` times.

    Raises:
        ModelError: the text encoders cannot be opened, or a prompt has more tokens than the model takes.
    """
    text, negative = (encoded.to(device) for encoded in encode_texts(bundle, prompts))
    labels = torch.zeros(DRAWS * len(prompts), 0, dtype=torch.int64, device=device)
    return LadderInputs(labels, text.repeat(DRAWS, 1), negative=negative)

"""The prompts that the ladder of an imported pipeline is measured with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ditserve.model.evaluation.ladder import LadderInputs
from ditserve.model.evaluation.ladder_plan import DRAWS
from ditserve.model.spec.bundle import Bundle
from ditserve.model.train.imported_pipeline import encode_texts

# Ordinary ones: a thing, a person, a place, and text in a picture.
PROMPTS = (
    "a red bicycle leaning against a brick wall",
    "portrait of an old fisherman, soft light",
    "a mountain lake at sunrise with fog over the water",
    "a shop window with a sign that says OPEN",
)


def prompt_inputs(bundle: Bundle, prompts: Sequence[str], device: str) -> LadderInputs:
    """Return the encoded prompts, each `DRAWS` times.

    Raises:
        ModelError: the text encoders cannot be opened, or a prompt has more tokens than the model takes.
    """
    text, negative = (encoded.to(device) for encoded in encode_texts(bundle, prompts))
    labels = torch.zeros(DRAWS * len(prompts), 0, dtype=torch.int64, device=device)
    return LadderInputs(labels, text.repeat(DRAWS, 1), negative=negative)

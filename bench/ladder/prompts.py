"""An imported pipeline as a model whose ladder can be measured, with the prompts that it draws."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ditserve.model.evaluation.ladder import DRAWS, LadderInputs
from ditserve.model.spec.bundle import PIPELINE, Bundle
from ditserve.model.spec.errors import ModelError
from ditserve.model.spec.pipeline_config import FAMILIES, NEGATIVE, PipelineConfig
from ditserve.model.train.loaded_model import LoadedModel
from ditserve.service.backends import load_pipeline_texts, opening_pipeline

PIPELINES = "ditserve.model.nets.pipelines"  # loads diffusers and transformers

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


def open_pipeline(bundle: Bundle, config: PipelineConfig, device: str) -> LoadedModel:
    """Open the transformer of an imported pipeline in fp32.

    Raises:
        ModelError: it cannot be opened.
    """
    with opening_pipeline(bundle.manifest):
        network = import_module(f"{PIPELINES}.network")
        folder = bundle.path / PIPELINE
        opened: Any = network.open_network(folder, config, dtype=torch.float32, device=device)
    # It has the methods of a network of ours that drawing calls.
    return LoadedModel(opened, bundle.manifest)


def prompt_inputs(
    bundle: Bundle, config: PipelineConfig, prompts: Sequence[str], device: str
) -> LadderInputs:
    """Return the encoded prompts, each `DRAWS` times; the text encoders are open only here.

    Raises:
        ModelError: they cannot be opened.
    """
    encoder = load_pipeline_texts(bundle)
    nothing = NEGATIVE if FAMILIES[config.family].plain_negatives else ""
    text = torch.stack([torch.from_numpy(encoder.encode(prompt)) for prompt in prompts]).to(device)
    negative = torch.from_numpy(encoder.encode(nothing)).to(device)[None]
    labels = torch.zeros(DRAWS * len(prompts), 0, dtype=torch.int64, device=device)
    return LadderInputs(labels, text.repeat(DRAWS, 1), negative=negative)

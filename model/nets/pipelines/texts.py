"""The text encoders of an imported pipeline, run by the pipeline's own code."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ditserve.model.nets.pipelines.network import PipelineError, quiet
from ditserve.model.spec.pipeline_config import FAMILIES, PipelineConfig

Floats = npt.NDArray[np.float32]
# Tokens (1, L, D), and what there is of mask (1, L) and pooled text (1, P).
Encoded = tuple[Tensor, Tensor | None, Tensor | None]


def _pixart(pipeline: Any, prompt: str, tokens: int) -> Encoded:
    text, mask, _, _ = pipeline.encode_prompt(
        prompt, do_classifier_free_guidance=False, max_sequence_length=tokens, device="cpu"
    )
    return text, mask, None


def _sd3(pipeline: Any, prompt: str, tokens: int) -> Encoded:
    text, _, pooled, _ = pipeline.encode_prompt(
        prompt,
        prompt_2=None,
        prompt_3=None,
        do_classifier_free_guidance=False,
        max_sequence_length=tokens - pipeline.tokenizer_max_length,
    )
    return text, None, pooled


def _flux(pipeline: Any, prompt: str, tokens: int) -> Encoded:
    text, pooled, _ = pipeline.encode_prompt(prompt, max_sequence_length=tokens)
    return text, None, pooled


ENCODERS: Mapping[str, Callable[[Any, str, int], Encoded]] = {
    "pixart": _pixart,
    "sd3": _sd3,
    "flux": _flux,
}


class PipelineTexts:
    """The encoder of prompts: `size` numbers each, tokens first, then their mask and the pooled text.

    Equal `key`s give equal encodings. The empty prompt has an encoding too: guidance subtracts it.

    Args:
        folder: that of the pipeline.
        config: the network that the texts are for.
        key: equal for equal text encoders and tokenizers.

    Raises:
        PipelineError: a text encoder or tokenizer is missing or cannot be read.
    """

    def __init__(self, folder: Path, config: PipelineConfig, key: str) -> None:
        self.size, self.key = config.text_width, key
        self._tokens, self._encode = config.text_tokens, ENCODERS[config.family]
        try:
            quiet()
            name = diffusers.DiffusionPipeline.load_config(str(folder))["_class_name"]
            with warnings.catch_warnings():
                # It is told nothing of the parts that texts do not need.
                warnings.simplefilter("ignore")
                self._pipeline: Any = getattr(diffusers, name).from_pretrained(
                    str(folder),
                    transformer=None,
                    vae=None,
                    scheduler=None,
                    local_files_only=True,
                    use_safetensors=True,
                    torch_dtype=torch.float32,
                )
        except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
            raise PipelineError(
                f"the text encoders of {folder} cannot be opened: {' '.join(str(error).split())}"
            ) from error
        # A pipeline without its largest encoder asks the transformer for the width of a token.
        self._pipeline.transformer = SimpleNamespace(
            config=SimpleNamespace(**{FAMILIES[config.family].text_size: config.text_size}),
            dtype=torch.float32,
        )

    @torch.no_grad()
    def encode(self, sentence: str) -> Floats:
        """Return the encoding (size,) of a prompt; what is beyond the last token is cut off."""
        text, mask, pooled = self._encode(self._pipeline, sentence, self._tokens)
        parts = [part.float().flatten() for part in (text, mask, pooled) if part is not None]
        encoding: Floats = torch.cat(parts).numpy()
        return encoding

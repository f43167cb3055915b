"""The text encoders of imported pipelines."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ditserve.model.nets.pipelines.texts import PipelineTexts
from ditserve.model.spec.pipeline_config import PipelineConfig
from ditserve.model.spec.pipeline_folder import read_pipeline
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

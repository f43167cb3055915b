"""Compiled pipelines beside eager ones: the numbers are the same, and all batches share what was compiled."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditserve.bench.compiled import compare
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.pipeline_bundle import write_pipeline_bundle
from ditserve.model.spec.pipeline_folder import read_pipeline
from tests.tiny_pipelines import save_pipeline, tokens


# Compilation imports a module of torch that uses a deprecated one, and this network has complex positions.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex operators")
def test_texts_of_other_lengths_are_not_compiled_again(tmp_path: Path) -> None:
    """This transformer takes its rows as lists, each of its own length."""
    save_pipeline("z_image", tmp_path / "pipeline")
    found = read_pipeline(
        tmp_path / "pipeline", name="tiny", licence="x", size=(8, 8), tokens=tokens("z_image")
    )
    write_pipeline_bundle(found, tmp_path / "bundle")
    compared = compare(Bundle.open(tmp_path / "bundle"))
    assert 0.0 < compared.difference <= 1e-5
    assert compared.graphs > 0
    assert compared.later == 0

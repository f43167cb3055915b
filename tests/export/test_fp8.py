"""The record of FP8: measured on the CPU, kept in the manifest, and replaced by the next."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ditserve.export.fp8 import main
from ditserve.export.verify import LIMITS
from ditserve.model.spec.bundle import Bundle
from ditserve.service.backends.measured_choice import quality_objection


def test_the_record_is_where_a_worker_looks(
    full_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shutil.copytree(full_bundle, tmp_path / "bundle")
    before = Bundle.open(path).manifest
    assert main([str(path)]) == 0
    assert "relative L2 at most" in capsys.readouterr().out
    after = Bundle.open(path).manifest
    assert 0 < after.metrics["fp8_relative_l2"] < LIMITS["fp8"].relative_l2
    assert after.metrics["fp8_pictures_psnr_db"] > 20
    assert before.metrics.items() <= after.metrics.items()
    # Without the training pictures nothing says what it costs in quality.
    assert quality_objection(after, "fp8") == "its cost in quality is not on record"
    within, beyond = (
        after.model_copy(update={"metrics": {"fp8_quality_loss": loss}}) for loss in (0.01, 0.02)
    )
    assert quality_objection(within, "fp8") is None
    assert quality_objection(beyond, "fp8") == "it costs 2.0% of quality"

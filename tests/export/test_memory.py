"""The memory of an export, measured on a process of its own."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ditserve.export.calibrate import TrajectorySettings
from ditserve.export.plan import LIBRARIES, peak_bytes
from ditserve.model.train.loaded_model import save_model
from tests.export.tiny import CONFIG, ROOT, tiny_source

# One block of 170 MB.
WIDE = replace(CONFIG, hidden_size=1536, depth=1, num_heads=8, layout_rank=0, head_channels=0, patch_size=8)
# Runs a command and prints its peak in KiB. A child begins with the peak of the process that forked it, so
# it must not be forked by pytest.
MEASURE = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


@pytest.mark.timeout(900)
def test_an_export_takes_no_more_memory_than_it_says(tmp_path: Path) -> None:
    model = tiny_source(WIDE)
    expected = peak_bytes(model, TrajectorySettings(samples=1, steps=2))
    save_model(tmp_path / "model", model)
    command = [sys.executable, "-m", "export.onnx", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    options = ["--samples", "1", "--steps", "2", "--golden", "none"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *command, *options], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"at most about {expected / 1e9:.1f} GB of memory" in done.stderr
    assert LIBRARIES / 2 < int(done.stdout) * 1024 < expected

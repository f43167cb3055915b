"""The memory of an export, measured on a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ditserve.export.plan import LIBRARIES, peak_bytes
from ditserve.model.train.loaded_model import save_model
from tests.export.tiny import CONFIG, ROOT, tiny_source

# One block of 170 MB.
WIDE = replace(CONFIG, hidden_size=1536, depth=1, num_heads=8, layout_rank=0, head_channels=0, patch_size=8)


@pytest.mark.timeout(900)
def test_an_export_takes_no_more_memory_than_it_says(tmp_path: Path) -> None:
    model = tiny_source(WIDE)
    expected = peak_bytes(model, half=True)
    save_model(tmp_path / "model", model)
    command = [sys.executable, "-m", "export.onnx", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        [*command, "--samples", "1", "--steps", "2", "--golden", "none"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    assert process.stderr is not None
    told = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, told
    assert f"about {expected / 1e9:.1f} GB of memory" in told
    assert LIBRARIES / 2 < usage.ru_maxrss * 1024 < expected

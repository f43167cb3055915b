"""Nothing phones home: ONNX Runtime's telemetry is off before its import, whatever is started first.

Its builds with telemetry keep a database in the user's cache, and look a host up some seconds after the
import. The database is there at once, and tells of it without a network.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What imports ONNX Runtime, as it is started.
STARTS = {
    "a worker": ["-c", "import ditserve.service.backends.onnx"],
    "export.int8": ["-m", "export.int8", "--help"],
    "bench.machine": ["-c", "import ditserve.bench.machine.operators"],
}


def traces(start: list[str], home: Path) -> list[str]:
    """Run Python as a user with an empty home; return the databases of telemetry that it left there."""
    home.mkdir()
    # Builds are silent by themselves where they see the variables of a CI.
    environment = {"PATH": os.environ["PATH"], "HOME": str(home)}
    subprocess.run([sys.executable, *start], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return [file.name for file in home.rglob("*onnxruntime*.db")]


def test_onnx_runtime_does_not_phone_home(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install onnxruntime")
    if not traces(["-c", "import onnxruntime"], tmp_path / "without us"):
        pytest.skip("this build of ONNX Runtime has no telemetry: pip install 'onnxruntime>=1.32' on Linux")
    left = {name: traces(start, tmp_path / name) for name, start in STARTS.items()}
    assert not any(left.values()), left

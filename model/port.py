"""The old name of `python -m model.convert`, kept for one release."""

from __future__ import annotations

import runpy
import sys

if __name__ == "__main__":
    print("model.port is now model.convert: run python -m model.convert", file=sys.stderr)
    runpy.run_module("ditserve.model.convert", run_name="__main__")

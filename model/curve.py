"""The old name of `python -m model.train.curve`, kept for one release."""

from __future__ import annotations

import runpy
import sys

if __name__ == "__main__":
    print("model.curve is now model.train.curve: run python -m model.train.curve", file=sys.stderr)
    runpy.run_module("ditserve.model.train.curve", run_name="__main__")

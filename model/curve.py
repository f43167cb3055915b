"""The old name of `python -m model.train.curve`, kept for one release."""

from __future__ import annotations

import runpy
import sys

from ditserve.commands import command_line

if __name__ == "__main__":
    print(f"model.curve is now model.train.curve: run {command_line('model.train.curve')}", file=sys.stderr)
    runpy.run_module("ditserve.model.train.curve", run_name="__main__")

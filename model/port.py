"""The old name of `python -m model.convert`, kept for one release."""

from __future__ import annotations

import runpy
import sys

from ditserve.commands import command_line

if __name__ == "__main__":
    print(f"model.port is now model.convert: run {command_line('model.convert')}", file=sys.stderr)
    runpy.run_module("ditserve.model.convert", run_name="__main__")

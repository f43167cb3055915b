"""The old name of `python -m model.evaluation.classifier`, kept for one release."""

from __future__ import annotations

import runpy
import sys

from ditserve.commands import command_line

if __name__ == "__main__":
    print(
        "model.classifier is now model.evaluation.classifier: "
        f"run {command_line('model.evaluation.classifier')}",
        file=sys.stderr,
    )
    runpy.run_module("ditserve.model.evaluation.classifier", run_name="__main__")

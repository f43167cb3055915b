"""`python -m bench`: list the benchmarks, or run one: `python -m bench NAME` is `python -m bench.NAME`."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from ditserve.commands import command_line

FOLDER = Path(__file__).parent


def benchmarks() -> dict[str, str]:
    """Return the first sentence of each benchmark by its name."""
    files = {file.parent.name: file for file in FOLDER.glob("*/__main__.py")}
    files |= {file.stem: file for file in FOLDER.glob("*.py") if not file.stem.startswith("__")}
    texts = {name: file.read_text() for name, file in sorted(files.items())}
    return {name: _summary(text) for name, text in texts.items() if "__main__" in text}


def _summary(text: str) -> str:
    words = " ".join((ast.get_docstring(ast.parse(text)) or "").split())
    return re.split(r"(?<=[.:]) ", words, maxsplit=1)[0].rstrip(".:")


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark that is named, or list all of them; return the exit status."""
    found = benchmarks()
    if arguments[:1] in ([], ["-h"], ["--help"]):
        width = max(map(len, found))
        lines = [f"  {name:{width}}  {summary}" for name, summary in found.items()]
        print("\n".join([f"usage: {command_line('bench')} NAME …\n", *lines]))
        return 0
    if arguments[0] not in found:
        print(f"error: there is no benchmark {arguments[0]}: {', '.join(found)}", file=sys.stderr)
        return 2
    sys.argv = [f"bench {arguments[0]}", *arguments[1:]]
    runpy.run_module(f"ditserve.bench.{arguments[0]}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

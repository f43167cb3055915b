"""A worker process of an imaginary next release: `lone_worker` with another codec.

It reads and writes schema version 3 beside 1 and 2, and adds a field to every message and to every dataclass
in it.
"""

import runpy
import sys
from importlib.util import find_spec, module_from_spec
from pathlib import Path

CHANGES = {
    "READABLE: Final = (1, 2)": "READABLE: Final = (1, 2, 3)",
    "return {name: getattr(value, name)": 'return {"surprise": b"\\xff"} | {name: getattr(value, name)',
}


def install_next_codec() -> None:
    """Let every later import of the codec give the changed one."""
    spec = find_spec("ditserve.service.wire")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text()
    for before, after in CHANGES.items():
        assert source.count(before) == 1, before
        source = source.replace(before, after)
    sys.modules[spec.name] = module = module_from_spec(spec)
    exec(compile(source, spec.origin, "exec"), module.__dict__)


if __name__ == "__main__":
    install_next_codec()
    runpy.run_module("tests.service.worker.lone_worker", run_name="__main__")

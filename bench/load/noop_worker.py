"""A worker whose network computes nothing, so that only the service itself costs time.

    python -m ditserve.bench.load.noop_worker [--pass-ms 0] [--row-ms 0] [flags]

It is the service's own worker with its own flags. Only the table of backends leads elsewhere, in this process
alone. A forward pass waits for `--pass-ms`, and for `--row-ms` a row: it takes time, but no processor.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from ditserve.bench.engine_overhead import NoopBackend
from ditserve.model.spec.bundle import Bundle
from ditserve.service.backends import BACKENDS
from ditserve.service.settings import Settings
from ditserve.service.worker.main import run


def open_backend(bundle: Bundle, **options: Any) -> NoopBackend:
    """Open the backend that `load_backend` asks for; no option matters."""
    return NoopBackend(bundle.manifest)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--pass-ms", type=float, default=0.0)
    parser.add_argument("--row-ms", type=float, default=0.0)
    pace, flags = parser.parse_known_args(arguments)
    NoopBackend.pass_s, NoopBackend.row_s = pace.pass_ms / 1e3, pace.row_ms / 1e3
    BACKENDS.update(dict.fromkeys(BACKENDS, "ditserve.bench.load.noop_worker:open_backend"))
    return run(Settings.load(flags, program="python -m ditserve.bench.load.noop_worker"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A worker whose network computes nothing, so that only the service itself costs time.

    python -m ditserve.bench.load.noop_worker [flags]

It is the service's own worker with its own flags. Only the table of backends leads elsewhere, in this process
alone.
"""

from __future__ import annotations

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
    BACKENDS.update(dict.fromkeys(BACKENDS, "ditserve.bench.load.noop_worker:open_backend"))
    return run(Settings.load(list(arguments), program="python -m ditserve.bench.load.noop_worker"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

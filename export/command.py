"""How the commands of this package end: done, or refused with one sentence on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable

from ditserve.export.errors import ExportError
from ditserve.model.nets.autoencoder import AutoencoderError
from ditserve.model.spec.bundle import BundleError
from ditserve.model.train.loaded_model import LoadError

DONE, REFUSED = 0, 2


def guarded(program: str, work: Callable[[], None]) -> int:
    """Do `work` and return the exit status."""
    try:
        work()
    except (ExportError, LoadError, BundleError, AutoencoderError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return REFUSED
    return DONE

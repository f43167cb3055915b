"""A worker that keeps the latents that it decodes: `python -m tests.recording_worker FOLDER [flags]`."""

from __future__ import annotations

import itertools
import sys
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import uvloop

from ditserve.model.spec.bundle import Bundle
from ditserve.service.backends import Backend, load_backend
from ditserve.service.settings import Settings
from ditserve.service.telemetry import logs
from ditserve.service.worker import main

Floats = npt.NDArray[np.float32]


async def opened(settings: Settings, bundle: Bundle, folder: Path, *_: object) -> Backend:
    """Return the backend that the settings choose; it writes what it decodes to files in `folder`."""
    backend = load_backend(main.with_backend(settings, bundle.manifest).backend, bundle, threads=1)
    count, decode = itertools.count(), backend.decode

    def recorded(latents: Floats) -> npt.NDArray[np.uint8]:
        np.save(folder / f"{next(count)}.npy", latents)
        return decode(latents)

    vars(backend)["decode"] = recorded
    return backend


if __name__ == "__main__":
    settings = Settings.load(sys.argv[2:])
    logs.configure(style="json", level="info")
    bundle = main.only_bundle(settings)
    opener = partial(opened, settings, bundle, Path(sys.argv[1]))
    sys.exit(0 if uvloop.run(main.serve(settings, bundle.manifest.name, opener)) else 1)

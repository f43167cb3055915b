"""Workers of every bundle of the settings, in one process, that keep the latents that they decode in
FOLDER/MODEL: `python -m tests.recording_worker FOLDER [flags]`. It works until it is killed.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import uvloop

from ditserve.model.spec.bundle import Bundle
from ditserve.service.backends import Backend, load_backend
from ditserve.service.served_models import ServedModel, open_served_models
from ditserve.service.settings import Settings
from ditserve.service.telemetry import logs
from ditserve.service.worker import main
from ditserve.service.worker.backend_choice import with_backend

Floats = npt.NDArray[np.float32]


def open_recording(settings: Settings, bundle: Bundle, folder: Path) -> Backend:
    """Return the backend that serves a bundle by default; it writes what it decodes to files in `folder`."""
    backend = load_backend(with_backend(settings, bundle.manifest).backend, bundle, threads=1)
    count, decode = itertools.count(), backend.decode
    folder.mkdir()

    def recorded(latents: Floats) -> npt.NDArray[np.uint8]:
        np.save(folder / f"{next(count)}.npy", latents)
        return decode(latents)

    vars(backend)["decode"] = recorded
    return backend


async def opened(backend: Backend, *_: object) -> dict[str, Backend]:
    return {"": backend}


async def serve(settings: Settings, backends: Mapping[ServedModel, Backend]) -> None:
    workers = (
        main.serve(model.settings(settings), model, partial(opened, backend))
        for model, backend in backends.items()
    )
    await asyncio.gather(*workers)


if __name__ == "__main__":
    settings = Settings.load(sys.argv[2:])
    logs.configure(style="json", level="info")
    # Before the loop runs: diffusers cannot be imported by two threads, nor for long while others wait.
    opened_first = {
        model: open_recording(settings, model.bundle, Path(sys.argv[1]) / model.name)
        for model in open_served_models(settings, verify=False)
    }
    uvloop.run(serve(settings, opened_first))

"""Workers of every bundle of the settings, in one process, that keep the latents that they decode in
FOLDER/MODEL: `python -m tests.recording_worker FOLDER [flags]`. It works until it is killed.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import uvloop

from ditserve.model.spec.bundle import Bundle
from ditserve.service.backends.torch import TorchBackend
from ditserve.service.served_models import open_served_models
from ditserve.service.settings import Settings
from ditserve.service.telemetry import logs
from ditserve.service.worker import main

Floats = npt.NDArray[np.float32]


class RecordingBackend(TorchBackend):
    def __init__(self, bundle: Bundle, folder: Path) -> None:
        super().__init__(bundle, threads=1)
        self._folder, self._count = folder, itertools.count()
        folder.mkdir()

    def decode(self, latents: Floats) -> npt.NDArray[np.uint8]:
        np.save(self._folder / f"{next(self._count)}.npy", latents)
        return super().decode(latents)


# While diffusers builds a module, every new parameter of the process is an empty one.
opening = asyncio.Lock()


async def opened(bundle: Bundle, folder: Path, *_: object) -> RecordingBackend:
    async with opening:
        return await asyncio.to_thread(RecordingBackend, bundle, folder)


async def serve(settings: Settings, folder: Path) -> None:
    models = open_served_models(settings, verify=False)
    workers = (
        main.serve(model.settings(settings), model.name, partial(opened, model.bundle, folder / model.name))
        for model in models
    )
    await asyncio.gather(*workers)


if __name__ == "__main__":
    settings = Settings.load(sys.argv[2:])
    logs.configure(style="json", level="info")
    uvloop.run(serve(settings, Path(sys.argv[1])))

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
from ditserve.service.backends.torch import TorchBackend
from ditserve.service.settings import Settings
from ditserve.service.telemetry import logs
from ditserve.service.worker import main

Floats = npt.NDArray[np.float32]


class RecordingBackend(TorchBackend):
    folder = Path(sys.argv[1])
    count = itertools.count()

    def decode(self, latents: Floats) -> npt.NDArray[np.uint8]:
        np.save(self.folder / f"{next(self.count)}.npy", latents)
        return super().decode(latents)


async def opened(bundle: Bundle, *_: object) -> RecordingBackend:
    return RecordingBackend(bundle, threads=1)


if __name__ == "__main__":
    settings = Settings.load(sys.argv[2:])
    logs.configure(style="json", level="info")
    bundle = main.only_bundle(settings)
    served = main.serve(settings, bundle.manifest.name, partial(opened, bundle))
    sys.exit(0 if uvloop.run(served) else 1)

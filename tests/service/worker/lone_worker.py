"""A worker process around a made-up network, for tests that kill it.

`python -m tests.service.worker.lone_worker [flags]`. A step takes DELAY_S; a row of class BLUE kills the
process, as a fault in a native library would.
"""

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.manifest import BackboneSpec
from ditserve.service.backends import Backend
from ditserve.service.served_models import ServedModel
from ditserve.service.settings import Settings
from ditserve.service.telemetry import logs
from ditserve.service.worker import main
from tests.service.conftest import FakeBackend, FakeCachingBackend

DELAY_S = 0.005
BLUE = 2

Floats = npt.NDArray[np.float32]


class MortalBackend(FakeBackend):
    def denoise(self, x: Floats, state: tuple[Floats, ...]) -> Floats:
        time.sleep(DELAY_S)
        return super().denoise(x, state)

    def embed(self, labels: npt.NDArray[np.int64], text: Floats | None = None) -> Floats:
        if (labels[:, 0] == BLUE).any():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().embed(labels, text)


class MortalCachingBackend(FakeCachingBackend):
    def tail(self, x: Floats, state: tuple[Floats, ...], change: Floats) -> Floats:
        time.sleep(DELAY_S)
        return super().tail(x, state, change)


def opened_now() -> dict[str, Backend]:
    """Return a network, a student of it that takes a quarter of the time, and itself with a block cache."""
    own, student, caching = MortalBackend(), MortalBackend(weights=3), MortalCachingBackend(every=3)
    spec = BackboneSpec(
        config=student.manifest.config,
        embedding_size=student.manifest.embedding_size,
        state=student.manifest.state,
        row_cost=0.25,
        guidance="none",
        defaults=student.manifest.defaults,
    )
    cache = {"block_cache": caching.block_cache, "row_cost": 0.5, "guidance": "classifier-free"}
    backbones = {"student": spec, "every-3": spec.model_copy(update=cache)}
    own.manifest = own.manifest.model_copy(update={"backbones": backbones})
    return {"": own, "student": student, "every-3": caching}


async def opened(*_: object) -> dict[str, Backend]:
    return opened_now()


if __name__ == "__main__":
    settings = Settings.load(sys.argv[1:])
    logs.configure(style="json", level="info")
    model = ServedModel(Path(), Bundle(Path(), opened_now()[""].manifest), settings.namespace)
    sys.exit(0 if asyncio.run(main.serve(settings, model, opened)) else 1)

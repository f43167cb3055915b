"""The quality canary: every few minutes one known image is drawn through the whole service and held against the bundle's own.

After a new driver, engine or runtime the images should still be the ones the model was verified with; a drift is seen here first.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import structlog
from PIL import Image

from ditserve.model.spec.bundle import GOLDEN, Golden
from ditserve.service.errors import ServiceError
from ditserve.service.http.intake import Caller, Intake
from ditserve.service.http.schemas import GenerateRequest
from ditserve.service.queue.queue_client import Waiter
from ditserve.service.telemetry import metrics

SAME_DB = 99.0  # PSNR of equal images, which is infinite
DRIFT_DB = 30.0  # below, a difference can be seen
_log = structlog.get_logger("service.canary")


class Canary:
    """Draws the golden image of the bundle in `folder` and measures how like it is."""

    def __init__(self, folder: Path, golden: Golden, intake: Intake, listener: Waiter) -> None:
        self._expected = pixels((folder / GOLDEN).read_bytes())
        self._golden, self._intake, self._listener = golden, intake, listener
        self._model = intake.manifest.name

    async def watch(self) -> None:
        """Draw once. A service that is too busy, or has no worker, is not judged."""
        try:
            await self.draw()
        except ServiceError as error:
            metrics.CANARY.labels(self._model, "skipped").inc()
            _log.info("canary skipped", model=self._model, code=error.code)

    async def draw(self) -> float:
        """PSNR in dB of one drawing against the golden image. Raises `ServiceError`."""
        golden = self._golden
        wish = {
            "condition": golden.condition,
            "seed": golden.seed,
            "steps": golden.steps,
            "sampler": golden.solver,
            "grid": golden.grid,
            "guidance_scale": golden.guidance_scale,
            "allow_degraded": False,
            "priority": "low",
        }
        request = GenerateRequest.model_validate(wish)
        ticket = await self._intake.submit(request, Caller("canary"))
        result = await self._listener.wait(ticket.job.id, new=ticket.new)
        likeness = psnr(pixels(result.images[0].data), self._expected)
        outcome = "drifted" if likeness < DRIFT_DB else "same"
        metrics.CANARY.labels(self._model, outcome).inc()
        metrics.CANARY_PSNR.labels(self._model).set(likeness)
        log = _log.warning if outcome == "drifted" else _log.info
        log(
            "canary drawn",
            model=self._model,
            psnr_db=round(likeness, 1),
            outcome=outcome,
            worker=result.worker,
        )
        return likeness


def pixels(file: bytes) -> npt.NDArray[np.uint8]:
    """RGB (H, W, 3) of an image file."""
    return np.asarray(Image.open(BytesIO(file)).convert("RGB"))


def psnr(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB, at most `SAME_DB`; 0 for images of different sizes."""
    if one.shape != other.shape:
        return 0.0
    error = float(np.mean((one.astype(np.float64) - other) ** 2))
    return SAME_DB if error == 0 else min(SAME_DB, 10 * float(np.log10(255.0**2 / error)))

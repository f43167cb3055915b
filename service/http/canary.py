"""The quality canary: every few minutes one known image is drawn through the whole service and compared.

After a new driver, engine or runtime the images should still be those that the model was verified with. The
canary is where a drift shows first.
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
from ditserve.service.http.schemas import GenerateRequest
from ditserve.service.http.submission import Caller, Submissions
from ditserve.service.queue.queue_client import Waiter
from ditserve.service.telemetry import metrics

# The PSNR reported for equal images, whose PSNR is infinite.
SAME_DB = 99.0
# Below this PSNR a difference can be seen.
DRIFT_DB = 30.0
_log = structlog.get_logger("service.canary")


class Canary:
    """Draws the golden image of the bundle in `folder` and measures how alike the two are."""

    def __init__(self, folder: Path, golden: Golden, submissions: Submissions, listener: Waiter) -> None:
        self._expected = pixels((folder / GOLDEN).read_bytes())
        self._golden, self._submissions, self._listener = golden, submissions, listener
        self._model = submissions.manifest.name

    async def watch(self) -> None:
        """Draw once. A service that is too busy, or has no worker, is skipped."""
        try:
            await self.draw()
        except ServiceError as error:
            metrics.CANARY.labels(self._model, "skipped").inc()
            _log.info("canary skipped", model=self._model, code=error.code)

    async def draw(self) -> float:
        """Draw once and return the PSNR in dB against the golden image. Raises `ServiceError`."""
        golden = self._golden
        request = GenerateRequest.model_validate(
            {
                "condition": golden.condition,
                "seed": golden.seed,
                "steps": golden.steps,
                "sampler": golden.solver,
                "grid": golden.grid,
                "guidance_scale": golden.guidance_scale,
                "allow_degraded": False,
                "priority": "low",
            }
        )
        submission = await self._submissions.submit(request, Caller("canary"))
        result = await self._listener.wait(submission.job.id, new=submission.new)
        psnr_db = psnr(pixels(result.images[0].data), self._expected)
        outcome = "drifted" if psnr_db < DRIFT_DB else "same"
        metrics.CANARY.labels(self._model, outcome).inc()
        metrics.CANARY_PSNR.labels(self._model).set(psnr_db)
        log = _log.warning if outcome == "drifted" else _log.info
        log(
            "canary drawn",
            model=self._model,
            psnr_db=round(psnr_db, 1),
            outcome=outcome,
            worker=result.worker,
        )
        return psnr_db


def pixels(file: bytes) -> npt.NDArray[np.uint8]:
    """Return the RGB pixels (H, W, 3) of an image file."""
    return np.asarray(Image.open(BytesIO(file)).convert("RGB"))


def psnr(image: npt.NDArray[np.uint8], reference: npt.NDArray[np.uint8]) -> float:
    """Return the peak signal-to-noise ratio in dB, at most `SAME_DB`; 0 for images of different sizes."""
    if image.shape != reference.shape:
        return 0.0
    error = float(np.mean((image.astype(np.float64) - reference) ** 2))
    return SAME_DB if error == 0 else min(SAME_DB, 10 * float(np.log10(255.0**2 / error)))

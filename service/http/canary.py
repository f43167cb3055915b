"""The quality canary: every few minutes one known image is drawn through the whole service and compared.

After a new driver, engine or runtime the images should still be those that the model was verified with. The
canary is where a drift shows first.

All API processes of a queue draw at the same ticks of its clock, under one key, and so share each drawing.
Where a drawing takes more than `SHARE` of the time between two ticks, only every second, fourth or eighth
tick has one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from io import BytesIO
from math import ceil, isfinite, log2
from pathlib import Path

import numpy as np
import numpy.typing as npt
import structlog
from PIL import Image

from ditserve.model.spec.bundle import GOLDEN
from ditserve.model.spec.errors import BundleError
from ditserve.model.spec.manifest import Golden
from ditserve.service.errors import Overloaded, ServiceError
from ditserve.service.http.schemas import GenerateRequest
from ditserve.service.http.submission import Caller, Idempotency, Submissions
from ditserve.service.identity import bundle_digest
from ditserve.service.planning.capacity import Capacity
from ditserve.service.queue.queue_client import Waiter
from ditserve.service.telemetry import metrics

# The PSNR reported for equal images, whose PSNR is infinite.
SAME_DB = 99.0
# Below this PSNR a difference can be seen.
DRIFT_DB = 30.0
# The drawings take at most this share of a worker's time.
SHARE = 0.01
_log = structlog.get_logger("service.canary")


class Canary:
    """Draws the golden image of the bundle in `folder` and measures how alike the two are."""

    def __init__(self, folder: Path, golden: Golden, submissions: Submissions, listener: Waiter) -> None:
        self._expected = golden_image(folder)
        self._golden, self._submissions, self._listener = golden, submissions, listener
        self._model, self._bundle = submissions.manifest.name, bundle_digest(submissions.manifest)
        for outcome in ("same", "drifted", "skipped"):
            metrics.CANARY.labels(self._model, outcome)
        self._request = GenerateRequest.model_validate(
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

    async def watch(self, tick: int, every_s: float) -> None:
        """Draw at this tick, one in `every_s` seconds, if it is one of those that have a drawing.

        A service that is too busy, or has no worker, is skipped.
        """
        try:
            seconds = await self._drawing_s()
            if not isfinite(seconds):
                raise Overloaded("No worker is running.")
            if tick % ticks_between(seconds, every_s) == 0:
                await self.draw(f"{self._bundle} {tick}")
        except ServiceError as error:
            metrics.CANARY.labels(self._model, "skipped").inc()
            _log.info("canary skipped", model=self._model, code=error.code)

    async def _drawing_s(self) -> float:
        """Return the predicted seconds of a drawing on an idle worker, infinite without workers."""
        steps = self._golden.steps
        rows = steps if self._golden.guidance_scale == 1.0 else 2 * steps
        capacity = Capacity(await self._submissions.load())
        return capacity.time_in_every_batch(rows=rows, steps=steps, samples=1, idle=True)

    async def draw(self, key: str) -> float:
        """Draw once under a key and return the PSNR in dB against the golden image. Raises `ServiceError`."""
        caller = Caller("canary", Idempotency(key, fingerprint=""))
        submission = await self._submissions.submit(self._request, caller)
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


async def next_tick(clock: Callable[[], float], every_s: float) -> int:
    """Return the number of the next tick by `clock`, one in `every_s` seconds, when it has come."""
    await asyncio.sleep(every_s - clock() % every_s)
    return round(clock() / every_s)


def ticks_between(drawing_s: float, every_s: float) -> int:
    """Return after how many ticks there is a drawing that takes `drawing_s` seconds: a power of two.

    Example: a drawing takes 20 s, and ticks are 300 s apart, of which 1 % are 3 s. Every seventh tick would
    do; every eighth has a drawing. A process that predicts 10 s draws at every fourth: it shares these.
    """
    return 1 << max(0, ceil(log2(max(drawing_s, 1e-9) / (SHARE * every_s))))


def golden_image(folder: Path) -> npt.NDArray[np.uint8]:
    """Return the RGB pixels (H, W, 3) of a bundle's golden image. Raises `BundleError` if it is none."""
    file = folder / GOLDEN
    try:
        return pixels(file.read_bytes())
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise BundleError(f"{file} is no image that can be read: export the bundle again") from None


def pixels(file: bytes) -> npt.NDArray[np.uint8]:
    """Return the RGB pixels (H, W, 3) of an image file."""
    return np.asarray(Image.open(BytesIO(file)).convert("RGB"))


def psnr(image: npt.NDArray[np.uint8], reference: npt.NDArray[np.uint8]) -> float:
    """Return the peak signal-to-noise ratio in dB, at most `SAME_DB`; 0 for images of different sizes."""
    if image.shape != reference.shape:
        return 0.0
    error = float(np.mean((image.astype(np.float64) - reference) ** 2))
    return SAME_DB if error == 0 else min(SAME_DB, 10 * float(np.log10(255.0**2 / error)))

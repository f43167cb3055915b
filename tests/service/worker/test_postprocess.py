"""From latents to image files: images of several sizes finish in one step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from prometheus_client import REGISTRY

from ditserve.model.spec.stretches import Stretch
from ditserve.service.engine.samples import Finished
from ditserve.service.errors import InvalidRequest
from ditserve.service.images import from_pixels
from ditserve.service.jobs import Claim, Lease
from ditserve.service.planning.ladder import Ladder
from ditserve.service.rung import Rung
from ditserve.service.source_picture import SourcePicture, encode
from ditserve.service.worker.postprocess import DECODED_AT_ONCE, Postprocessor, _decode_batches
from ditserve.service.worker.running_job import RunningJob

pytestmark = pytest.mark.anyio
Floats = npt.NDArray[np.float32]
Make = Callable[..., Any]


class Decoder:
    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def decode(self, latents: Floats) -> npt.NDArray[np.uint8]:
        self.shapes.append(latents.shape)
        return np.ascontiguousarray(latents.transpose(0, 2, 3, 1).astype(np.uint8))


@pytest.fixture
def make_running(make_job: Make) -> Make:
    def make(**fields: Any) -> RunningJob:
        job = make_job(**fields)
        claim = Claim(job, Lease(job.id, "w1", 1), run_isolated=False)
        return RunningJob(claim, Ladder(()), claimed_at=0.0, states=[None] * len(job.seeds))

    return make


def done(running: RunningJob, size: tuple[int, ...]) -> list[tuple[RunningJob, Finished]]:
    """Return all samples of a job as finished, each latent filled with the sample's seed."""
    return [
        (
            running,
            Finished(
                request.id,
                np.full((3, *size), request.seed, np.float32),
                steps_used=10,
                rung=request.rung,
                degraded=False,
                reason=None,
                queue_ms=0.0,
                denoise_ms=1.0,
            ),
        )
        for request in running.requests
    ]


async def test_images_of_one_size_are_decoded_together_and_the_order_is_kept(make_running: Make) -> None:
    decoder, many = Decoder(), DECODED_AT_ONCE + 1
    own, wide = make_running(seeds=tuple(range(many))), make_running(seeds=(100, 101), windows=3)
    postprocessor = Postprocessor(decoder)
    images = await postprocessor.images([*done(own, (4, 6)), *done(wide, (4, 12))])
    postprocessor.close()
    assert decoder.shapes == [(DECODED_AT_ONCE, 3, 4, 6), (1, 3, 4, 6), (2, 3, 4, 12)]
    pictures = [Image.open(BytesIO(image.image.data)) for image in images]
    assert [picture.size for picture in pictures] == [(6, 4)] * many + [(12, 4)] * 2
    assert [picture.getpixel((0, 0)) for picture in pictures] == [(k, k, k) for k in (*range(many), 100, 101)]
    assert pictures[-1].info["windows"] == "3"
    assert "windows" not in pictures[0].info


async def test_a_clip_is_decoded_with_as_many_others_as_its_frames_allow(make_running: Make) -> None:
    for frames, sizes in ((1, [5]), (3, [2, 2, 1]), (20, [1] * 5)):
        batch = done(make_running(seeds=(1, 2, 3, 4, 5)), (frames, 4, 6))
        assert [len(samples) for _, samples in _decode_batches(batch)] == sizes


async def test_what_another_backbone_finished_its_own_decoder_decodes(make_running: Make) -> None:
    own, other = Decoder(), Decoder()
    running = make_running(seeds=(1, 2, 3, 4))
    alone = running.requests[0].rung
    stitched = replace(alone, stretches=(Stretch(0.5, ""), Stretch(0.0, "student")))
    begun = replace(alone, stretches=(Stretch(0.5, "student"),))
    rungs = (alone, stitched, stitched, begun)
    samples = zip(done(running, (4, 6)), rungs, strict=True)
    batch = [(job, replace(finished, rung=rung)) for (job, finished), rung in samples]
    postprocessor = Postprocessor(own, further={"student": other})
    images = await postprocessor.images(batch)
    postprocessor.close()
    assert (own.shapes, other.shapes) == ([(1, 3, 4, 6), (1, 3, 4, 6)], [(2, 3, 4, 6)])
    assert [image.finished.id for image in images] == [finished.id for _, finished in batch]


RANDOM = np.random.default_rng(0)
IMAGE = RANDOM.integers(0, 256, (4, 6, 3), np.uint8)
MASK = np.array([[0, 0, 0, 0, 10, 255], [0, 0, 0, 30, 0, 0], [255] * 6, [0] * 6], np.uint8)


class Autoencoder(Decoder):
    """Latents of half the size, decoded to another picture than was encoded."""

    def encode(self, pixels: npt.NDArray[np.uint8]) -> Floats:
        return from_pixels(pixels[:, ::2, ::2])

    def decode(self, latents: Floats) -> npt.NDArray[np.uint8]:
        return super().decode(latents).repeat(2, axis=1).repeat(2, axis=2)


async def test_a_latent_is_repainted_as_far_as_any_of_its_pixels() -> None:
    postprocessor = Postprocessor(Autoencoder(), encoder=Autoencoder())
    source = await postprocessor.source(SourcePicture(encode(IMAGE), encode(MASK), 0.5))
    whole = await postprocessor.source(SourcePicture(encode(IMAGE), None, 0.5))
    postprocessor.close()
    assert source.mask is not None
    np.testing.assert_allclose(255 * source.mask, [[[0, 30, 255], [255, 255, 255]]], rtol=1e-6)
    np.testing.assert_array_equal(source.latent, from_pixels(IMAGE[None, ::2, ::2])[0])
    assert whole.mask is None


async def test_pixels_that_a_mask_keeps_are_those_of_the_picture(make_running: Make) -> None:
    running = make_running(seeds=(200,), source=SourcePicture(encode(IMAGE), encode(MASK), 0.5))
    postprocessor = Postprocessor(Autoencoder())
    (image,) = await postprocessor.images(done(running, (2, 3)))
    postprocessor.close()
    with Image.open(BytesIO(image.image.data)) as picture:
        made = np.asarray(picture)
        assert picture.info["strength"] == "0.5"
    np.testing.assert_array_equal(made[MASK == 0], IMAGE[MASK == 0])
    assert (made[MASK == 255] == 200).all()
    blended = np.rint((30 * 200.0 + 225.0 * IMAGE[1, 3]) / 255)
    np.testing.assert_array_equal(made[1, 3], blended)


async def test_a_worker_without_an_encoder_says_so() -> None:
    postprocessor = Postprocessor(Decoder())
    with pytest.raises(InvalidRequest, match="has no encoder of pictures: export the model again"):
        await postprocessor.source(SourcePicture(encode(IMAGE), None, 0.5))
    postprocessor.close()


def delivered(kind: str) -> tuple[float, float]:
    """Return the sum of the measured distances so far, and their number."""
    sample = REGISTRY.get_sample_value
    total, count = (sample(f"dit_delivered_quality_{part}", {"kind": kind}) for part in ("sum", "count"))
    return total or 0.0, count or 0.0


async def test_the_distance_that_was_asked_for_and_drawn_is_counted(make_running: Make) -> None:
    postprocessor = Postprocessor(Decoder())
    before = {kind: delivered(kind) for kind in ("asked", "drawn")}
    unmeasured = make_running(seeds=(1,))
    await postprocessor.images(done(unmeasured, (4, 4)))
    assert {kind: delivered(kind) for kind in before} == before
    best = Rung("ddim-50", "ddim", 50, "trailing", (0.0, 1.0), 0.5)
    worse = Rung("ddim-5", "ddim", 5, "trailing", (0.0, 1.0), 2.0)
    running = make_running(seeds=(1, 2), requested=best, admitted=best)
    first, (_, second) = done(running, (4, 4))
    await postprocessor.images([first, (running, replace(second, rung=worse, degraded=True))])
    postprocessor.close()
    grown = {kind: np.subtract(delivered(kind), before[kind]).tolist() for kind in before}
    assert grown == {"asked": [1.0, 2.0], "drawn": [2.5, 2.0]}


async def test_a_job_counts_the_rows_of_all_its_windows(make_running: Make) -> None:
    assert make_running(seeds=(1, 2)).rows == 4
    assert make_running(seeds=(1, 2), windows=3).rows == 12
    assert make_running(seeds=(1, 2), windows=3, guidance_scale=1.0).rows == 6

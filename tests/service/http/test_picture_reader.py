"""Pictures are read beside the event loop, one at a time, and a bounded number waits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from ditserve.service.errors import InvalidRequest, PayloadTooLarge, TooManyUploads
from ditserve.service.http import picture_reader
from ditserve.service.http.picture_reader import MOST_WAITING, PictureReader
from ditserve.service.source_picture import Pixels
from tests.conftest import wait_until
from tests.service.http.test_pictures import halves, saved

pytestmark = pytest.mark.anyio
PICTURE = saved(halves(8, 8))


@pytest.fixture
def reader() -> Iterator[PictureReader]:
    reader = PictureReader(1000)
    yield reader
    reader.close()


async def test_one_is_read_while_the_others_wait_and_more_are_refused(
    reader: PictureReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, reading = threading.Event(), [0]

    def slow(data: bytes, size: tuple[int, int]) -> Pixels:
        reading[0] += 1
        assert go.wait(60)
        return np.zeros((*size, 3), np.uint8)

    monkeypatch.setattr(picture_reader, "read_picture", slow)
    reads = [
        asyncio.create_task(reader.read(PICTURE, None, size=(8, 8), strength=0.5))
        for _ in range(MOST_WAITING)
    ]
    # The event loop goes on meanwhile.
    await wait_until(lambda: reading[0] == 1)
    with pytest.raises(TooManyUploads) as caught:
        await reader.read(PICTURE, None, size=(8, 8), strength=0.5)
    assert caught.value.retry_after
    assert reading[0] == 1
    go.set()
    assert {source.strength for source in await asyncio.gather(*reads)} == {0.5}
    await reader.read(PICTURE, None, size=(8, 8), strength=0.5)


@pytest.mark.parametrize(("image", "mask", "field"), [(b"?", PICTURE, "image"), (PICTURE, b"?", "mask")])
async def test_the_field_that_is_wrong_is_named(
    reader: PictureReader, image: bytes, mask: bytes, field: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}: "):
        await reader.read(image, mask, size=(8, 8), strength=0.5)
    large = {"image": image, "mask": mask, field: PICTURE + bytes(1000)}
    with pytest.raises(PayloadTooLarge, match=f"^{field}: .* 1000 bytes"):
        await reader.read(large["image"], large["mask"], size=(8, 8), strength=0.5)

"""The pictures of requests, read beside the event loop: one at a time, and a bounded number that waits."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from ditserve.model.spec.sizes import Size
from ditserve.service.errors import PayloadTooLarge, TooManyUploads
from ditserve.service.http.operating_point import field_error
from ditserve.service.http.pictures import UnusablePicture, read_mask, read_picture
from ditserve.service.source_picture import SourcePicture, encode

# Each takes up to a second, and 16 Mpx up to 300 MB while it does.
MOST_WAITING = 32


class PictureReader:
    """The thread of one API process that makes of files of at most `max_bytes` what workers start from."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._waiting = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="pictures")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def read(self, image: bytes, mask: bytes | None, *, size: Size, strength: float) -> SourcePicture:
        """Return a picture and its mask, made to `size` (height and width in pixels).

        Raises:
            InvalidRequest: one of them cannot be used, whose field is named.
            PayloadTooLarge, TooManyUploads: it is too large a file, or too many wait.
        """
        for field, data in (("image", image), ("mask", mask or b"")):
            if len(data) > self._max_bytes:
                raise PayloadTooLarge(f"{field}: A picture may be {self._max_bytes} bytes, not {len(data)}.")
        if self._waiting >= MOST_WAITING:
            raise TooManyUploads(f"{self._waiting} pictures wait to be read.", retry_after=self._waiting / 8)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._pool, _source_picture, image, mask, size, strength
            )
        finally:
            self._waiting -= 1


def _source_picture(image: bytes, mask: bytes | None, size: Size, strength: float) -> SourcePicture:
    field = "image"
    try:
        pixels = encode(read_picture(image, size))
        field = "mask"
        levels = None if mask is None else encode(read_mask(mask, size, picture=image))
    except UnusablePicture as error:
        raise field_error(field, str(error)) from None
    return SourcePicture(pixels, levels, strength)

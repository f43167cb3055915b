"""Pictures of strangers: upright, in the middle, on white, or refused before memory is spent."""

from __future__ import annotations

import resource
import struct
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import ExifTags, Image

from ditserve.service.http.pictures import (
    MAX_PIXELS,
    MAX_SCANS,
    UnusablePicture,
    data_url_bytes,
    read_mask,
    read_picture,
)

RED, BLUE = (255, 0, 0), (0, 0, 255)


def saved(picture: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    out = BytesIO()
    picture.save(out, format=format, **options)
    return out.getvalue()


def halves(width: int = 40, height: int = 20) -> Image.Image:
    """Return a picture whose left half is red and whose right half is blue."""
    picture = Image.new("RGB", (width, height), RED)
    picture.paste(BLUE, (width // 2, 0, width, height))
    return picture


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(width: int, height: int, data: bytes = b"") -> bytes:
    """Return a PNG whose head says RGBA of these sides, whatever its data."""
    head = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def corners(pixels: npt.NDArray[np.uint8]) -> list[tuple[int, ...]]:
    return [tuple(map(int, pixels[y, x])) for y in (0, -1) for x in (0, -1)]


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_a_picture_of_the_size_is_kept_to_the_bit(format: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    data = saved(Image.fromarray(pixels), format, lossless=True)
    assert np.array_equal(read_picture(data, (16, 24)), pixels)


def test_the_middle_is_used_and_nothing_is_stretched() -> None:
    disc = Image.new("L", (300, 100), 0)
    disc.paste(255, (125, 25, 175, 75))  # a square in the middle stays one
    pixels = read_picture(saved(disc), (40, 40))[..., 0] > 127
    assert (pixels.any(0).sum(), pixels.any(1).sum()) == (20, 20)
    tall = read_picture(saved(disc.rotate(90, expand=True)), (40, 40))[..., 0] > 127
    assert np.array_equal(tall, pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_says_which_way_is_up(orientation: int) -> None:
    upright = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = saved(Image.fromarray(np.ascontiguousarray(turned)), exif=exif)
    assert np.array_equal(read_picture(data, (8, 12)), upright)
    mask = saved(Image.fromarray(upright[..., 0]))
    assert np.array_equal(read_mask(mask, (8, 12), picture=data), upright[..., 0])


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 255)), RED),
        (Image.new("LA", (8, 8), (0, 127)), (128, 128, 128)),
        (Image.new("RGB", (8, 8), RED).quantize(), RED),
        (Image.new("1", (8, 8), 1), (255, 255, 255)),
        (Image.new("L", (8, 8), 7), (7, 7, 7)),
        (Image.fromarray(np.full((8, 8), 0x8040, np.uint16)), (128, 128, 128)),
    ],
)
@pytest.mark.parametrize("size", [(8, 8), (3, 5)])
def test_every_kind_of_pixel_becomes_rgb(
    picture: Image.Image, expected: tuple[int, ...], size: tuple[int, int]
) -> None:
    pixels = read_picture(saved(picture), size)
    assert pixels.shape == (*size, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected).max() <= 1


def test_cmyk_of_a_print_shop_and_a_palette_with_a_hole() -> None:
    cmyk = read_picture(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), (8, 8))
    assert np.abs(cmyk.astype(int) - RED).max() <= 3
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert corners(read_picture(saved(palette, transparency=1), (8, 8))) == [(255, 255, 255)] * 4


def test_the_colour_of_what_is_transparent_does_not_shine_through() -> None:
    picture = Image.new("RGBA", (80, 80), (0, 255, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 40, 80))
    pixels = read_picture(saved(picture), (8, 8)).astype(int)
    # Red on white: nothing is greener than it is blue.
    assert (pixels[..., 1] - pixels[..., 2]).max() <= 1


def test_a_large_jpeg_is_decoded_in_part_and_looks_the_same() -> None:
    ramp = np.linspace(0, 255, 1600).astype(np.uint8)
    large = Image.fromarray(np.broadcast_to(ramp[:, None], (1600, 1600)).copy())
    small = read_picture(saved(large, "JPEG", quality=95), (64, 64)).astype(int)
    assert np.abs(small - read_picture(saved(large), (64, 64))).max() <= 3


def test_the_further_pictures_of_a_camera_are_left_out() -> None:
    data = saved(halves(), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    assert np.abs(read_picture(data, (20, 40))[0, 0].astype(int) - RED).max() <= 3


class TestMask:
    PICTURE = saved(halves())

    def test_transparent_is_repainted(self) -> None:
        mask = Image.new("RGBA", (40, 20), (255, 255, 255, 255))
        mask.paste((0, 0, 0, 0), (0, 0, 20, 20))
        levels = read_mask(saved(mask), (20, 40), picture=self.PICTURE)
        assert (levels[:, :20] == 255).all()
        assert (levels[:, 20:] == 0).all()

    def test_without_transparency_white_is_repainted(self) -> None:
        mask = Image.new("L", (40, 20), 0)
        mask.paste(255, (0, 0, 20, 20))
        for kind in (mask, mask.convert("RGBA"), mask.convert("1"), mask.convert("P")):
            levels = read_mask(saved(kind), (10, 20), picture=self.PICTURE)
            assert levels.shape == (10, 20)
            assert (levels[:, :9] > 250).all()
            assert (levels[:, 11:] < 5).all()

    def test_another_scale_of_the_shape_will_do(self) -> None:
        read_mask(saved(Image.new("L", (7, 3), 255)), (20, 40), picture=saved(Image.new("L", (200, 100))))
        read_mask(saved(Image.new("L", (100, 67), 255)), (8, 8), picture=saved(Image.new("L", (300, 200))))

    @pytest.mark.parametrize("sides", [(20, 40), (40, 40), (40, 21), (10, 10)])
    def test_another_shape_is_refused(self, sides: tuple[int, int]) -> None:
        with pytest.raises(UnusablePicture, match=f"The mask is {sides[0]}x{sides[1]} and its picture 40x20"):
            read_mask(saved(Image.new("L", sides, 255)), (20, 40), picture=self.PICTURE)

    @pytest.mark.parametrize("mode", ["L", "RGB", "1"])
    def test_a_mask_that_repaints_nothing_is_refused(self, mode: str) -> None:
        with pytest.raises(UnusablePicture, match="It repaints nothing"):
            read_mask(saved(Image.new(mode, (40, 20))), (20, 40), picture=self.PICTURE)


def animated(format: str) -> bytes:
    return saved(Image.new("RGB", (8, 8)), format, save_all=True, append_images=[halves(8, 8)])


SCAN = b"\xff\xda\x00\x08\x01\x01\x00\x00\x00\x10"
BAD = {
    "nothing": (b"", "no picture"),
    "a page": (b"<svg onload=alert(1)>", "no picture"),
    "gif": (saved(halves(), "GIF"), "no picture"),
    "tiff": (saved(halves(), "TIFF"), "no picture"),
    "bmp": (saved(halves(), "BMP"), "no picture"),
    "a polyglot": (b"GIF89a" + saved(halves()), "no picture"),
    "animated png": (animated("PNG"), "animated"),
    "animated webp": (animated("WEBP"), "animated"),
    "no width": (png_with(0, 8), "no p"),
    "no height": (png_with(8, 0), "no p"),
    "too many pixels": (png_with(2**13, 2**11 + 1), f"more than {MAX_PIXELS}"),
    "a bomb": (png_with(2**31 - 1, 2**31 - 1), f"more than {MAX_PIXELS}"),
    "a webp bomb": (saved(Image.new("L", (16383, 1100)), "WEBP", lossless=True, quality=0), "more than"),
    "scans": (saved(halves(), "JPEG").replace(b"\xff\xd9", SCAN * MAX_SCANS + b"\xff\xd9"), "scans"),
    "no pixels behind the head": (png_with(64, 64), "damaged"),
    "a wrong checksum": (saved(halves()).replace(b"IDAT", b"IDAS"), "no picture"),
}


@pytest.mark.parametrize(("data", "sentence"), BAD.values(), ids=BAD)
def test_what_is_no_picture_is_refused_in_one_sentence(data: bytes, sentence: str) -> None:
    with pytest.raises(UnusablePicture, match=sentence) as caught:
        read_picture(data, (8, 8))
    assert str(caught.value).endswith(".")
    with pytest.raises(UnusablePicture):
        read_mask(data, (8, 8), picture=saved(halves(8, 8)))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_file_that_was_cut_off_is_refused(format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = saved(Image.fromarray(noise), format)
    for length in range(0, len(data) - 40, 97):
        with pytest.raises(UnusablePicture):
            read_picture(data[:length], (8, 8))


def test_damage_is_refused_or_harmless() -> None:
    random = np.random.default_rng(3)
    for format in ("PNG", "JPEG", "WEBP"):
        whole = np.frombuffer(saved(halves(), format, exif=Image.Exif()), np.uint8)
        for _ in range(200):
            data = whole.copy()
            data[random.integers(0, len(data), 4)] = random.integers(0, 256, 4)
            try:
                pixels = read_picture(data.tobytes(), (8, 8))
            except UnusablePicture:
                continue
            assert pixels.shape == (8, 8, 3)


BOMBS = """
import resource, sys
from pathlib import Path
from ditserve.service.http.pictures import UnusablePicture, read_picture
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        read_picture(Path(path).read_bytes(), (64, 64))
    except UnusablePicture:
        continue
    raise SystemExit(f"{path} was read")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(not hasattr(resource, "RUSAGE_SELF"), reason="needs: getrusage, as Linux has it")
def test_a_bomb_is_refused_before_memory_is_spent(tmp_path: Path) -> None:
    bombs = {
        "head.png": png_with(60000, 60000),
        "zeros.png": png_with(20000, 20000, bytes(20000 * 4 + 1)),
        "canvas.webp": saved(Image.new("L", (16383, 1100)), "WEBP", lossless=True, quality=0),
        "text.png": png_with(8, 8).replace(
            chunk(b"IEND", b""), 50 * chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**7)))
        ),
    }
    for name, data in bombs.items():
        (tmp_path / name).write_bytes(data)
    paths = [str(tmp_path / name) for name in bombs]
    kilobytes = subprocess.run(
        [sys.executable, "-c", BOMBS, *paths], capture_output=True, text=True, check=True
    ).stdout
    assert int(kilobytes) < 32 * 1024


@pytest.mark.parametrize(
    "url", ["https://example.org/a.png", "file:///etc/passwd", "data:image/png,%89PNG", "data:;base64", ""]
)
def test_nothing_is_fetched(url: str) -> None:
    with pytest.raises(ValueError, match="nothing is fetched"):
        data_url_bytes(url)


def test_a_data_url_is_base64() -> None:
    assert data_url_bytes("data:image/png;base64,AAEC") == b"\0\1\2"
    for text in ("AAE", "AA=E", "A A E C", "%41"):
        with pytest.raises(ValueError, match="not in base64"):
            data_url_bytes(f"data:image/png;base64,{text}")

"""Clips as files: other programs' decoders find all frames, for as long as they are to be seen."""

from __future__ import annotations

import json
from fractions import Fraction
from io import BytesIO
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
from PIL import ExifTags, Image, ImageSequence

from ditserve.service.errors import InvalidRequest
from ditserve.service.formats import CLIP_FORMATS, CONTENT_TYPES, MediaFormat
from ditserve.service.worker import clips
from ditserve.service.worker.clips import encode_clip, frame_durations

Pixels = npt.NDArray[np.uint8]
METADATA = {"seed": "7", "condition": "Erdbeere 🍓"}
PILLOW: list[MediaFormat] = ["webp", "gif", "apng"]


@pytest.fixture(scope="module")
def frames() -> Pixels:
    """Return a bright square that moves by four pixels a frame, (6, 48, 40, 3)."""
    made = np.full((6, 48, 40, 3), (30, 60, 90), np.uint8)
    for k, frame in enumerate(made):
        frame[8:24, 4 * k : 4 * k + 16] = (220, 180, 40)
    return made


def read(data: bytes) -> tuple[Pixels, list[int], dict[Any, Any]]:
    """Return the frames that Pillow finds, the milliseconds of each, and the file's further facts."""
    with Image.open(BytesIO(data)) as image:
        info, durations = dict(image.info), list[int]()
        shown = list[Pixels]()
        for frame in ImageSequence.Iterator(image):
            shown.append(np.asarray(frame.convert("RGB")))
            durations.append(int(frame.info["duration"]))
        return np.stack(shown), durations, info


@pytest.mark.parametrize("format", PILLOW)
def test_every_frame_is_found_in_its_place(frames: Pixels, format: MediaFormat) -> None:
    data = encode_clip(frames, format, fps=24, metadata=METADATA)
    shown, durations, info = read(data)
    assert np.abs(shown.astype(int) - frames).mean() < 3
    assert (len(shown), sum(durations), info["loop"]) == (6, 250, 0)
    assert max(durations) - min(durations) <= {"webp": 1, "apng": 1, "gif": 10}[format]
    assert data == encode_clip(frames, format, fps=24, metadata=METADATA)


def test_a_video_plays_at_its_rate(frames: Pixels) -> None:
    odd = frames[:, :47, :39]
    for fps, rate in ((29.97, Fraction(2997, 100)), (0.5, Fraction(1, 2))):
        with av.open(BytesIO(encode_clip(odd, "mp4", fps=fps, metadata=METADATA)), "r") as container:
            stream = container.streams.video[0]
            shown = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
            assert (stream.codec_context.name, stream.average_rate) == ("h264", rate)
            assert json.loads(container.metadata["comment"]) == METADATA
        assert shown.shape == frames.shape
        assert np.abs(shown[:, :47, :39].astype(int) - odd).mean() < 3


def test_the_file_says_how_it_was_made(frames: Pixels) -> None:
    *_, webp = read(encode_clip(frames, "webp", fps=8, metadata=METADATA))
    *_, gif = read(encode_clip(frames, "gif", fps=8, metadata=METADATA))
    *_, apng = read(encode_clip(frames, "apng", fps=8, metadata=METADATA))
    exif = Image.Exif()
    exif.load(webp["exif"])
    assert json.loads(exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment][8:]) == METADATA
    assert json.loads(gif["comment"]) == METADATA
    assert apng.items() >= METADATA.items()


@pytest.mark.parametrize("format", CLIP_FORMATS)
def test_a_clip_may_be_one_frame(frames: Pixels, format: MediaFormat) -> None:
    data = encode_clip(frames[:1], format, fps=8, metadata=METADATA)
    if format == "mp4":
        with av.open(BytesIO(data), "r") as container:
            assert len(list(container.decode(video=0))) == 1
    else:
        with Image.open(BytesIO(data)) as image:
            assert (getattr(image, "n_frames", 1), image.size) == (1, (40, 48))


def test_what_does_not_move_is_the_same_in_every_frame_of_a_gif() -> None:
    noisy = np.random.default_rng(0).integers(0, 256, (48, 40, 3), np.uint8)
    frames = np.repeat(noisy[None], 3, axis=0)
    frames[:, :8, :8] = np.array([0, 120, 255], np.uint8)[:, None, None, None]
    shown, *_ = read(encode_clip(frames, "gif", fps=8, metadata={}))
    assert len(shown) == 3
    np.testing.assert_array_equal(shown[:, 8:], shown[:1, 8:].repeat(3, axis=0))


def test_frames_last_as_long_as_they_should_in_all() -> None:
    assert frame_durations(6, 24, tick_ms=10) == [40, 40, 40, 50, 40, 40]
    for fps in (0.1, 7, 12.5, 23.976, 50, 240):
        durations = frame_durations(48, fps, tick_ms=1)
        assert abs(sum(durations) - 48_000 / fps) <= 0.5
        assert min(durations) >= 1


def test_a_worker_without_pyav_says_so(frames: Pixels, monkeypatch: pytest.MonkeyPatch) -> None:
    assert clips.extra_formats() == ("mp4",)
    monkeypatch.setattr(clips, "find_spec", lambda package: None)
    assert clips.extra_formats() == ()
    with pytest.raises(InvalidRequest, match="no package to write mp4: choose webp"):
        encode_clip(frames, "mp4", fps=8, metadata={})


def test_a_format_of_pictures_is_refused(frames: Pixels) -> None:
    assert CONTENT_TYPES["mp4"] == "video/mp4"
    with pytest.raises(ValueError, match="unknown clip format 'jpeg'"):
        encode_clip(frames, "jpeg", fps=8, metadata={})

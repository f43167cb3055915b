"""The files that a request asks for: which formats there are, and how fast a clip plays. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ditserve.model.spec.manifest import Manifest
from ditserve.service.errors import Overloaded
from ditserve.service.fleet import WorkerState
from ditserve.service.formats import EXTRAS, FORMATS, GIF_FPS, MediaFormat, MediaKind, kind_of
from ditserve.service.http.adapters import RETRY_S
from ditserve.service.http.operating_point import field_error
from ditserve.service.http.schemas import GenerateRequest

# The rate at which a volume turns, and a clip whose model says none plays.
DEFAULT_FPS: Final = 12.0


def written_formats(kind: MediaKind, workers: Sequence[WorkerState]) -> tuple[MediaFormat, ...]:
    """Return the formats of what a model makes that all of its workers write, the usual one first."""
    return tuple(
        name
        for name in FORMATS[kind]
        if name not in EXTRAS or (workers and all(name in worker.formats for worker in workers))
    )


def check_format(asked: MediaFormat | None, kind: MediaKind, workers: Sequence[WorkerState]) -> None:
    """Refuse a format that the workers of a model do not write; None is the usual one.

    Raises:
        InvalidRequest: it is none of the model's kind, or not every worker has the package for it.
        Overloaded: no worker is there to say.
    """
    written = written_formats(kind, workers)
    if asked is None or asked in written:
        return
    choose = f"choose {', '.join(written[:-1])} or {written[-1]}"
    if asked not in FORMATS[kind]:
        raise field_error("format", f"This model makes {kind}s, which are no {asked}: {choose}.")
    if not workers:
        raise Overloaded(f"No worker is running to say whether it writes {asked}.", retry_after=RETRY_S)
    raise field_error(
        "format", f"Not every worker has the extra {EXTRAS[asked]!r}, which {asked} needs: {choose}."
    )


def frame_rate(request: GenerateRequest, manifest: Manifest, format: MediaFormat) -> float:
    """Return the frames a second of the file that is asked for, 0 for one that does not play.

    Raises:
        InvalidRequest: what is asked for does not play, or not so fast.
    """
    kind = kind_of(manifest)
    if kind == "picture" or format == "npz":
        if request.fps is not None:
            still = "a picture" if kind == "picture" else "an npz"
            raise field_error("fps", f"{still.capitalize()} does not play: leave fps out.")
        return 0.0
    fps = request.fps or manifest.fps or DEFAULT_FPS
    if format == "gif" and fps > GIF_FPS:
        raise field_error(
            "fps",
            f"A gif plays at most {GIF_FPS:g} frames a second: ask for fewer, or for webp, apng or mp4.",
        )
    return fps

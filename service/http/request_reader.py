"""Reading a request as one model understands it: conditions, rung, size, and the picture it starts from.

Knows no HTTP. What the model cannot do is refused here, with one sentence that names the field.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ditserve.model.spec.bundle import encodes_pictures
from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.prompt_limit import PromptLimit
from ditserve.service.errors import Overloaded
from ditserve.service.formats import MediaFormat, kind_of
from ditserve.service.http.adapters import RETRY_S, requested_adapters
from ditserve.service.http.conditions import RequestedConditions, requested_conditions
from ditserve.service.http.load_cache import LoadCache
from ditserve.service.http.operating_point import field_error, requested_rung
from ditserve.service.http.picture_reader import PictureReader
from ditserve.service.http.schemas import MAX_SEED, GenerateRequest
from ditserve.service.http.sizes import (
    AskedSize,
    OutputSize,
    UnusableSize,
    as_a_whole,
    in_windows,
    own_text,
    picture_size,
)
from ditserve.service.jobs import AdapterUse
from ditserve.service.planning.ladder import Ladder
from ditserve.service.rung import Rung
from ditserve.service.settings import Settings
from ditserve.service.source_picture import SourcePicture
from ditserve.service.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class ResolvedRequest:
    """A request as this model understands it, with all defaults filled in."""

    request: GenerateRequest
    media_format: MediaFormat
    conditions: RequestedConditions
    rung: Rung
    output: OutputSize
    source: SourcePicture | None
    adapters: tuple[AdapterUse, ...]
    fps: float


class RequestReader:
    """Reads requests for one model, whose defaults fill in what a request leaves out."""

    def __init__(
        self,
        manifest: Manifest,
        settings: Settings,
        *,
        prompts: PromptLimit,
        pictures: PictureReader,
        ladder: Ladder,
        load: LoadCache,
    ) -> None:
        self._manifest, self._settings = manifest, settings
        self._prompts, self._pictures = prompts, pictures
        self._vocabulary, self._ladder, self._load = Vocabulary(manifest.factors), ladder, load

    def conditions(self, request: GenerateRequest) -> RequestedConditions:
        """Return the conditions that the request asks for. Raises `InvalidRequest`, `UnknownCondition`."""
        conditions = requested_conditions(request, self._manifest, self._vocabulary)
        if not request.truncate_prompt:
            self._check_length(request, conditions)
        return conditions

    def _check_length(self, request: GenerateRequest, conditions: RequestedConditions) -> None:
        """Refuse texts of more tokens than the model takes. Raises `InvalidRequest`."""
        own, negative = "condition" if request.prompt is None else "prompt", "negative_prompt"
        texts = [*((own, term.text) for term in conditions.terms), (negative, conditions.negative_prompt)]
        for name, text in texts:
            if excess := self._prompts.excess(text, negative=name == negative):
                raise field_error(
                    name,
                    f"The text has {excess}: shorten it, or say "
                    '"truncate_prompt": true to have the end cut off.',
                )

    def rung(self, request: GenerateRequest, rung: Rung | None) -> Rung:
        """Return the operating point that the request asks for, or `rung`. Raises `InvalidRequest`."""
        if request.n > self._settings.max_images:
            raise field_error("n", f"At most {self._settings.max_images} images a request.")
        if (request.seed or 0) + request.n - 1 > MAX_SEED:
            raise field_error("seed", f"The seed of the last image, seed + n - 1, may be at most {MAX_SEED}.")
        asked = requested_rung(request, self._manifest, self._ladder)
        if rung is None:
            return asked
        return replace(rung, guidance_decay=asked.guidance_decay, strength=asked.strength)

    async def size(self, request: GenerateRequest) -> OutputSize:
        """Return the size that the request asks for. Raises `InvalidRequest`, `Overloaded`.

        In windows every size is possible; as a whole the model's own, and those that every worker makes.
        """
        manifest, max_area = self._manifest, self._settings.max_area
        asked = AskedSize(request.size, request.frames)
        if asked.frames is not None and kind_of(manifest) == "picture":
            raise field_error("frames", "This model makes pictures, which have no frames: leave it out.")
        if request.windows and asked == AskedSize():
            raise field_error("windows", f"Name a size larger than the model's own, {own_text(manifest)}.")
        try:
            if request.windows:
                return in_windows(asked, manifest, max_area=max_area)
            if asked.is_own(manifest):
                return OutputSize()
            workers = (await self._load()).workers
            if not workers:
                raise Overloaded("No worker is running to say which sizes can be made.", retry_after=RETRY_S)
            return as_a_whole(asked, manifest, workers, max_area=max_area)
        except UnusableSize as error:
            raise field_error(error.field, str(error)) from None

    async def source(
        self, request: GenerateRequest, output: OutputSize, *, strength: float
    ) -> SourcePicture | None:
        """Return the picture that the request starts from, if any; a clip has it as its first frame.

        Raises `InvalidRequest`, `PayloadTooLarge`, `TooManyUploads`.
        """
        if request.image is None:
            for name in ("mask", "strength"):
                if name in request.model_fields_set and getattr(request, name) is not None:
                    raise field_error(name, "It needs an image to start from: send one, or leave it out.")
            return None
        kind = kind_of(self._manifest)
        if kind == "volume":
            raise field_error("image", "This model makes volumes, which start from no picture: leave it out.")
        if kind == "clip" and request.mask is not None:
            raise field_error("mask", "A clip keeps its whole first frame and has no mask: leave it out.")
        if not encodes_pictures(self._manifest):
            raise field_error(
                "image", "This model has no encoder of pictures: leave image out, or export the model again."
            )
        size = picture_size(self._manifest, output.size)
        return await self._pictures.read(request.image, request.mask, size=size, strength=strength)

    async def adapters(self, request: GenerateRequest) -> tuple[AdapterUse, ...]:
        """Return the adapters that the request asks for. Raises `InvalidRequest`, `Overloaded`."""
        return requested_adapters(request, (await self._load()).workers) if request.adapters else ()

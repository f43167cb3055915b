"""Requests over HTTP as pydantic models: with `answer_schemas` the source of the OpenAPI document.

Unknown fields are refused.

Rules that depend on the model served (its factors, classes, solvers, sizes) are in `submission`.
"""

import re
from collections.abc import Mapping
from hashlib import sha256
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    WithJsonSchema,
)

from ditserve.model.spec.mixing import Combine
from ditserve.model.spec.source import DEFAULT_STRENGTH
from ditserve.service.callback_url import MAX_URL
from ditserve.service.formats import MAX_FPS, MediaFormat
from ditserve.service.http.pictures import data_url_bytes

Format = Literal["png", "webp", "jpeg"]
Priority = Literal["low", "normal", "high"]
# The longest class name, and the longest text or prompt, in characters.
MAX_TEXT = 2000
ClassRef = Annotated[str, Field(max_length=MAX_TEXT)] | int | None
FactorName = Annotated[str, Field(max_length=40)]
Condition = dict[FactorName, ClassRef]

# A size as requests write it. ASCII digits only: `\d` would take those of every script.
SIZE = "[1-9][0-9]{0,4}x[1-9][0-9]{0,4}"
# A number without the sign of -0.0, which equals 0.0 and would be written differently.
UnsignedZero = AfterValidator(lambda value: value + 0.0)

NoiseLevel = Annotated[float, Field(ge=0, allow_inf_nan=False), UnsignedZero]

# The largest integer that every JSON reader keeps exact.
MAX_SEED = 2**53 - 1
MAX_TERMS = 8
MAX_PREVIEWS = 1000
MAX_FRAMES = 4096
MAX_LEVELS = 256
MAX_ADAPTERS = 4
# The key of a condition that holds a text and is no factor.
TEXT = "text"
# One grey pixel, as PNG.
PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="

EXAMPLE: dict[str, Any] = {"condition": {"label": "strawberry", "style": "noto"}, "steps": 30, "seed": 7}
MIX_EXAMPLE: dict[str, Any] = {
    "condition": [{"label": "strawberry", "weight": 0.6}, {"label": "lemon", "weight": 0.4}],
    "mix": "spherical",
    "n": 4,
    "deadline_ms": 8000,
}
COMPOSITION_EXAMPLE: dict[str, Any] = {
    "condition": [{"label": "strawberry", "weight": 1.5}, {"label": "lemon", "weight": -0.5}],
    "mix": "compose",
    "guidance_scale": 3.0,
    "guidance_decay": 0.75,
}


def written_size(size: str) -> str:
    """Return a size that is written as `SIZE`. Raises `ValueError` for any other text."""
    if not re.fullmatch(SIZE, size):
        raise ValueError("Write it as width x height, such as 128x64.")
    return size


def not_zero(weight: float) -> float:
    """Return a weight other than 0. Raises `ValueError` for 0."""
    if not weight:
        raise ValueError("A condition of weight 0 has no effect: leave it out.")
    return weight


Size = Annotated[
    str, AfterValidator(written_size), WithJsonSchema({"type": "string", "pattern": f"^{SIZE}$"})
]


def _file_bytes(value: object) -> object:
    return data_url_bytes(value) if isinstance(value, str) else value


# The bytes of a file, which JSON holds as a data URL. It is written as a digest, which tells it from others.
PictureFile = Annotated[
    bytes,
    BeforeValidator(_file_bytes),
    PlainSerializer(lambda data: sha256(data).hexdigest(), return_type=str),
    WithJsonSchema({"type": "string", "pattern": "^data:[a-z0-9.+/-]{0,60};base64,[A-Za-z0-9+/]+={0,2}$"}),
]


Strength = Annotated[
    float,
    Field(
        gt=0,
        le=1,
        description="The share of the steps that are walked from `image`, the last ones. A little changes a "
        "little; 1 starts from noise.",
    ),
]


class WeightedTerm(BaseModel):
    """One condition of several: a class per factor, and its weight."""

    model_config = ConfigDict(
        extra="allow", strict=True, json_schema_extra={"examples": [{"label": "lemon", "weight": 0.4}]}
    )
    __pydantic_extra__: dict[str, ClassRef] = Field(init=False)

    weight: Annotated[float, AfterValidator(not_zero)] = Field(
        1.0,
        ge=-1000,
        le=1000,
        allow_inf_nan=False,
        description="Relative to the sum of all; below 0 only in a composition.",
    )

    @property
    def condition(self) -> Mapping[str, ClassRef]:
        return self.__pydantic_extra__


class AdapterWish(BaseModel):
    """A low-rank adapter (LoRA) to draw with, and how strongly it acts."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"name": "pixel-art", "scale": 0.8}]}
    )

    name: str = Field(max_length=100, description="One of `adapters` in `/models`.")
    scale: Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False), UnsignedZero] = Field(
        1.0, description="1 is as it was trained, 0 is without it."
    )


def _condition_kind(value: Any) -> str:
    """Return the tag of a condition: a list is a mix."""
    return "as-mix" if isinstance(value, list) else "as-one"


class DrawingOptions(BaseModel):
    """The fields that mean the same in the request of every route."""

    model_config = ConfigDict(extra="forbid", strict=True)

    condition: Annotated[
        Annotated[Condition, Field(max_length=16), Tag("as-one")]
        | Annotated[list[WeightedTerm], Field(min_length=1, max_length=MAX_TERMS), Tag("as-mix")],
        Discriminator(_condition_kind),
    ] = Field(
        default_factory=dict,
        description="A class per factor of the model, by name or number, and a `text` where the model "
        "takes one; a factor that is left out or null is unconditioned. "
        "A list of weighted conditions is combined as `mix` says.",
    )
    mix: Combine = Field(
        "linear",
        description="How a list of conditions is combined: mixed to one on a line or an arc, as the weighted "
        "sum of what each would do (compose), or from shallow blocks of the network to deep ones (layers).",
    )
    guidance_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False), UnsignedZero] | None = Field(
        None,
        description="Strength of classifier-free guidance, as the model's authors count it; 1 turns it off, "
        "for Z-Image 0.",
    )
    guidance_decay: Annotated[float, Field(ge=-20, le=20, allow_inf_nan=False), UnsignedZero] = Field(
        0.0,
        description="Lowers guidance with noise: scale · exp(-decay · t / T), of a flow sigma for t / T.",
    )
    negative_prompt: str | None = Field(
        None,
        max_length=MAX_TEXT,
        description="A text that guidance subtracts in place of no text, where the model takes text.",
    )
    guidance_embedded: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False), UnsignedZero] | None = (
        Field(
            None,
            description="The guidance scale that the network is told, where the model is one that is told.",
        )
    )
    adapters: list[AdapterWish] = Field(
        [],
        max_length=MAX_ADAPTERS,
        description="Low-rank adapters of the model to draw with, whose effects add up.",
    )
    truncate_prompt: bool = Field(
        False, description="Cut off what a text has beyond the model's last token, instead of refusing it."
    )
    seed: int | None = Field(
        None,
        ge=0,
        le=MAX_SEED,
        description=f"Image k is drawn from seed + k, at most {MAX_SEED}; null picks one.",
    )
    windows: bool = Field(
        False,
        description="Denoise a `size` larger than the model's own in overlapping windows; any model can.",
    )
    deadline_ms: int | None = Field(None, ge=1, description="Answer within this time, or refuse at once.")
    allow_degraded: bool = Field(True, description="Under load, allow fewer steps or a cheaper sampler.")
    min_steps: int | None = Field(None, ge=1, description="Never fewer steps than this.")
    min_quality: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        None,
        description="Use no rung whose `quality` in `/models` is larger: it is a distance, less is better.",
    )
    priority: Priority = "normal"


class GenerateRequest(DrawingOptions):
    """A request for images: the condition, how to draw it, and within which limits."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE, MIX_EXAMPLE, COMPOSITION_EXAMPLE]})

    model: str | None = Field(
        None, max_length=100, description="A name from `/models`; null is the first there."
    )
    prompt: str | None = Field(
        None,
        max_length=MAX_TEXT,
        description="The picture in words: a text where the model takes one, else the names of classes. "
        "Classes in `condition` beside it are certain.",
    )
    n: int = Field(1, ge=1, le=256, description="Number of images.")
    steps: int | None = Field(None, ge=1, description="Denoising steps; null is the model's default.")
    sampler: str | None = Field(
        None, max_length=40, description="A sampler from `/models`; null is the model's default."
    )
    grid: str | None = Field(
        None, max_length=40, description="How the steps are spread over the noise levels."
    )
    noise_levels: Annotated[list[NoiseLevel], Field(min_length=1, max_length=MAX_LEVELS)] | None = Field(
        None,
        description="The noise levels of the steps in place of `grid` and `steps`: the model's timesteps, "
        "or the sigmas of a flow, decreasing from the noisiest. Such a request is degraded only if it says "
        "`allow_degraded`.",
        examples=[[999, 700, 400, 150]],
    )
    guidance_interval: (
        Annotated[list[Annotated[float, Field(ge=0, le=1), UnsignedZero]], Field(min_length=2, max_length=2)]
        | None
    ) = Field(None, description="Part of the noise range in which guidance acts, as [low, high].")
    size: Size | None = Field(None, description="Width x height, where the model has a choice.")
    frames: int | None = Field(
        None,
        ge=1,
        le=MAX_FRAMES,
        description="Frames of a clip, or slices of a volume, where the model makes one; null is its own.",
    )
    fps: Annotated[float, Field(ge=0.1, le=MAX_FPS, allow_inf_nan=False)] | None = Field(
        None,
        description="Frames a second at which a clip plays, or a volume turns; null is the model's own rate.",
    )
    image: PictureFile | None = Field(
        None,
        description="The picture to start from, of a clip its first frame: PNG, JPEG or WebP, as a data URL. "
        "The largest part in its middle that has the shape of `size` is used.",
        examples=[f"data:image/png;base64,{PICTURE}"],
    )
    mask: PictureFile | None = Field(
        None,
        description="The part of `image` to repaint, as a picture of its shape: what is transparent, or "
        "without transparency what is white. The rest is kept.",
        examples=[f"data:image/png;base64,{PICTURE}"],
    )
    strength: Strength = DEFAULT_STRENGTH
    format: MediaFormat | None = Field(
        None,
        description="File format, one of the model's `formats`; null follows `Accept`, else it is the first.",
    )
    callback_url: str | None = Field(
        None,
        max_length=MAX_URL,
        description="With `Prefer: respond-async`, where the job's state is sent once it has ended, if the "
        "service allows that address.",
    )
    previews: int = Field(
        0,
        ge=0,
        le=MAX_PREVIEWS,
        description="On the event stream, a preview after every so many steps; 0 is none.",
    )

    @property
    def may_degrade(self) -> bool:
        """True if the service may leave the steps asked for; it needs to be said where levels are listed."""
        said = "allow_degraded" in self.model_fields_set
        return self.allow_degraded and (said or self.noise_levels is None)

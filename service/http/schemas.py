"""Requests and responses over HTTP as pydantic models: the source of the OpenAPI document.

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
from ditserve.service.callback_url import MAX_URL
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
MAX_LEVELS = 256
MAX_ADAPTERS = 4
# The key of a condition that holds a text and is no factor.
TEXT = "text"
# One grey pixel, as PNG.
PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
DEFAULT_STRENGTH = 0.8

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
        description="The picture in words, in place of a condition: a text where the model takes one, else "
        "the names of classes.",
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
    image: PictureFile | None = Field(
        None,
        description="The picture to start from: PNG, JPEG or WebP, as a data URL. The largest part in its "
        "middle that has the shape of `size` is used.",
        examples=[f"data:image/png;base64,{PICTURE}"],
    )
    mask: PictureFile | None = Field(
        None,
        description="The part of `image` to repaint, as a picture of its shape: what is transparent, or "
        "without transparency what is white. The rest is kept.",
        examples=[f"data:image/png;base64,{PICTURE}"],
    )
    strength: Strength = DEFAULT_STRENGTH
    format: Format | None = Field(None, description="Image file format; null follows `Accept`, else png.")
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


class ImageOut(BaseModel):
    b64: str = Field(description="The image file, base64.")
    seed: int
    content_type: str


class GenerateResponse(BaseModel):
    """The images, and how they were made."""

    id: str
    model: str
    images: list[ImageOut]
    steps_requested: int
    steps_used: int
    sampler: str
    rung: str = Field(description="The operating point used.")
    backbones: list[str] = Field([], description="The model's further networks that took part.")
    degraded: bool
    reason: str | None = Field(description="Why fewer or cheaper steps were run; null if they were not.")
    timings_ms: dict[str, float]


class JobOutcome(BaseModel):
    """The seeds of a finished job, and how its images were made."""

    seeds: list[int]
    steps_requested: int
    steps_used: int
    sampler: str
    rung: str
    backbones: list[str] = []
    degraded: bool
    reason: str | None
    timings_ms: dict[str, float]


class Links(BaseModel):
    self: str
    events: str
    images: list[str]


class Problem(BaseModel):
    """RFC 9457 problem details. Some errors carry more members, such as `suggestions`."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str = Field(description="Stable name of the error.")
    request_id: str | None = None
    retry_after_s: int | None = None
    errors: list[dict[str, str]] | None = Field(
        None, description="For each field that is wrong, its place and what is wrong."
    )
    suggestions: list[str] | None = Field(None, description="The closest names that exist.")


class CallbackOut(BaseModel):
    """The state of a job's callback."""

    state: Literal["waiting", "pending", "delivered", "given-up"] = Field(
        description="waiting: the job has not ended; pending: being tried, or to be tried again."
    )
    attempts: int
    fault: str | None = Field(description="The fault of the last attempt; null if there was none.")


class JobOut(BaseModel):
    """The state of a job."""

    id: str
    model: str
    state: Literal["queued", "running", "done", "failed", "cancelled", "dead"]
    position: int | None = Field(None, description="Jobs ahead in the queue; null unless queued.")
    step: int
    steps: int
    attempt: int
    eta_s: float | None = Field(
        None, description="Predicted seconds until done; null if nothing can be said."
    )
    created_at: float
    deadline_at: float | None
    result: JobOutcome | None = None
    error: Problem | None = None
    callback: CallbackOut | None = Field(None, description="Null unless the request has a `callback_url`.")
    links: Links


class FactorOut(BaseModel):
    name: str
    classes: list[str]


class StretchOut(BaseModel):
    above: float = Field(description="The least noise of this stretch, in 0..1 of the range.")
    backbone: str = Field(description='A further network of the model; "" is its own.')


class RungOut(BaseModel):
    name: str
    sampler: str
    steps: int
    grid: str
    guidance_interval: tuple[float, float]
    rows: float = Field(description="Cost of one image, in rows of a forward pass.")
    quality: float = Field(description="The distance that orders the ladder; lower is better.")
    own: float | None = Field(
        description="RMS distance to the picture of the model's own long run; null: not measured."
    )
    real: float | None = Field(
        description="Energy score against training pictures; lower is nearer, null: not measured."
    )
    stretches: list[StretchOut] = Field(
        [], description="The backbones that take part, from noise to picture; the rest is the model's own."
    )


class DefaultsOut(BaseModel):
    steps: int
    sampler: str
    grid: str
    guidance_scale: float
    guidance_embedded: float | None = Field(None, description="The scale that the network is told, if any.")
    guidance_interval: tuple[float, float]


class AdapterOut(BaseModel):
    name: str
    version: str = Field(description="Equal for equal files.")
    rank: int


class LimitsOut(BaseModel):
    n: int
    steps: int
    deadline_ms: int
    body_bytes: int
    picture_bytes: int = Field(description="Of a picture to start from, and of its mask.")


class ModelOut(BaseModel):
    """A model being served."""

    name: str
    version: str
    description: str
    size: str
    size_step: int | None = Field(
        description="Other sizes whose sides are multiples of this many pixels can be had; null: none."
    )
    text: bool = Field(description="Whether a condition may hold a `text`.")
    pictures: bool = Field(description="Whether a request may start from an `image`.")
    guidance: Literal["classifier-free", "embedded", "none"] = Field(
        description="Embedded: the network is told `guidance_embedded`. None: no unconditional prediction "
        "was trained that guidance could subtract."
    )
    text_tokens: int | None = Field(
        None, description="The most tokens of a text, which are counted; null: texts are cut where they end."
    )
    networks: list[str] = Field(
        description="The runtimes and number formats that the workers run the model in."
    )
    adapters: list[AdapterOut] | None = Field(
        None,
        description="The low-rank adapters that a request may name: those that every worker has loaded. "
        "Null: no worker is there, or one of them runs another backend than torch, which takes none.",
    )
    factors: list[FactorOut]
    samplers: list[str]
    grids: list[str]
    step_counts: list[int] = Field(
        description="The only numbers of steps that a distilled model takes; empty: any up to the limit."
    )
    defaults: DefaultsOut
    ladder: list[RungOut] = Field(
        description="Operating points, best first. None: no request is ever drawn in fewer steps than asked."
    )
    ladder_order: Literal["own", "real"] | None = Field(
        description="The distance that orders the ladder, which `quality` repeats; null: no ladder."
    )
    limits: LimitsOut
    metrics: dict[str, float]
    licence: str
    attribution: list[str]


class ModelsOut(BaseModel):
    models: list[ModelOut]


class Health(BaseModel):
    status: Literal["ok", "failing"]
    checks: dict[str, bool]
    reasons: dict[str, str] = Field({}, description="Why a check fails, by its name.")


class Startup(Health):
    starting: list[str] = Field(description="The activities of workers that are not ready yet.")

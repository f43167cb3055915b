"""Answers over HTTP as pydantic models: with `schemas` the source of the OpenAPI document."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


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
    default: str | None = Field(None, description="The class of a request that leaves this factor out.")


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
    kind: Literal["picture", "clip", "volume"] = Field(description="What an image of this model is.")
    formats: list[str] = Field(description="Of the files that its workers write, the usual one first.")
    frames: int | None = Field(description="Of a clip, or the slices of a volume; null: of a picture.")
    frames_step: int | None = Field(
        description="Other numbers of frames that are multiples of this can be had; null: none."
    )
    fps: float | None = Field(description="Frames a second unless asked; null: of a picture.")
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

"""OpenAI's image API as pydantic models: its parameters, answers and errors.

A parameter that cannot be honoured is refused, unless OpenAI's reference makes it a hint for OpenAI's own
monitoring. Shapes: openai-python `types/image_generate_params.py`, `types/image_edit_params.py`,
`types/image_create_variation_params.py`, `types/images_response.py`.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from ditserve.model.spec.source import DEFAULT_STRENGTH
from ditserve.service.http.schemas import (
    COMPOSITION_EXAMPLE,
    MAX_TEXT,
    SIZE,
    DrawingOptions,
    Format,
    PictureFile,
    Strength,
    written_size,
)

Quality = Literal["auto", "standard", "hd", "low", "medium", "high", "xhigh", "max"]
Prompt = Annotated[
    str,
    Field(
        max_length=MAX_TEXT,
        description="Names a class of each factor, where the model reads no text; other words are ignored. "
        "Empty where a `condition` says it.",
    ),
]


def _refused(reason: str) -> BeforeValidator:
    """Return the validator of a parameter that this service cannot honour, so it must be null."""

    def refuse(value: object) -> None:
        if value is not None:
            raise ValueError(reason)

    return BeforeValidator(refuse)


class OpenAIOptions(DrawingOptions):
    """OpenAI's parameters, and as extensions those of `POST /generate` that OpenAI has no name for."""

    model: str | None = Field(None, max_length=100)
    n: int | None = Field(None, ge=1, le=10)
    size: (
        Annotated[
            str,
            AfterValidator(lambda size: size if size == "auto" else written_size(size)),
            WithJsonSchema({"type": "string", "pattern": f"^(auto|{SIZE})$"}),
        ]
        | None
    ) = Field(None, description="Width x height, where the model has a choice, or auto.")
    quality: Quality | None = Field(
        None, description="high (xhigh, max), medium and low are the top, middle and end of the ladder."
    )
    output_format: Format | None = None
    response_format: Literal["b64_json"] | None = Field(
        None, description="Images are answered in the body; there are no URLs."
    )
    output_compression: Literal[100] | None = None
    background: Literal["auto", "opaque"] | None = None
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=3)
    # Hints for OpenAI's own monitoring; nothing here depends on them.
    moderation: Literal["auto", "low"] | None = Field(None, description="Has no effect.")
    safety_identifier: str | None = Field(None, max_length=500, description="Has no effect.")
    user: str | None = Field(None, max_length=500, description="Has no effect.")
    style: Annotated[None, _refused("Name the style in the prompt instead.")] = None
    complexity: Annotated[None, _refused("Choose a quality instead.")] = None
    frame_count: Annotated[None, _refused("Images here are not animated.")] = None
    frame_duration_ms: Annotated[None, _refused("Images here are not animated.")] = None
    svg: Annotated[None, _refused("Images here are png, webp or jpeg.")] = None


class ImagesRequest(OpenAIOptions):
    """A request for pictures of a prompt."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "a strawberry, noto", "n": 2}, COMPOSITION_EXAMPLE]}
    )

    prompt: Prompt = ""


class EditRequest(OpenAIOptions):
    """A request that repaints a picture, or the part of it that a mask shows, as a prompt says."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"image": "(the file)", "prompt": "a strawberry, noto"}]}
    )

    prompt: Prompt = ""
    image: PictureFile = Field(description="One picture: PNG, JPEG or WebP. Its name may be `image[]`.")
    mask: PictureFile | None = Field(
        None, description="What is transparent in it is repainted, the rest of `image` is kept."
    )
    strength: Strength = DEFAULT_STRENGTH
    input_fidelity: Annotated[None, _refused("Choose a strength instead: less keeps more.")] = None
    markup: Annotated[None, _refused("Pictures are not marked up here: send a mask.")] = None


class VariationRequest(OpenAIOptions):
    """A request for pictures like another one, without a prompt."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"image": "(the file)", "n": 2}]})

    image: PictureFile = Field(description="One picture: PNG, JPEG or WebP.")
    strength: Strength = DEFAULT_STRENGTH
    stream: Annotated[None, _refused("Variations are not streamed.")] = None
    partial_images: Annotated[None, _refused("Variations are not streamed.")] = None


class ImageData(BaseModel):
    b64_json: str


class ImagesResponse(BaseModel):
    created: int
    data: list[ImageData]
    background: str
    output_format: str
    quality: str
    size: str
    usage: dict[str, Any]


class OpenAIErrorBody(BaseModel):
    model_config = ConfigDict(extra="allow")

    message: str
    type: str
    param: str | None
    code: str
    request_id: str | None


class OpenAIError(BaseModel):
    error: OpenAIErrorBody


class ModelEntry(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "dit"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelEntry]

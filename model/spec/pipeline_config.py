"""The network of an imported diffusers pipeline, and how each family of them is asked. Pure.

The transformer is the unmodified module of diffusers, built from the fields of its own config.json. A family
says what its pipelines are called, what the network is told of the noise and of the text, and the values that
its pipeline has by default. `model.nets.pipelines` asks the modules, `model.spec.pipeline_folder` reads
folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal, get_args

from ditserve.model.spec.guidance import GuidanceNorm

FamilyName = Literal[
    "pixart", "sd3", "flux", "sana", "lumina2", "auraflow", "chroma", "qwen_image", "z_image"
]
INDEX = "model_index.json"  # of a pipeline's folder
TOKENIZER = "tokenizer.json"  # of a tokenizer's folder, which counts the tokens of a prompt
# The first character of a text that guidance subtracts, where `plain_negatives` makes a difference of it.
NEGATIVE = "\0"
GuidanceKind = Literal["classifier-free", "embedded", "none"]


def missing_package(name: str, error: ImportError) -> str:
    """Return the sentence about what an imported pipeline cannot be run without."""
    return (
        f"{name} is an imported pipeline and needs the package {error.name}: "
        "pip install 'ditserve[pipelines]'"
    )


@dataclass(frozen=True, slots=True)
class PipelineConfig:
    """The configuration of a transformer of diffusers.

        family             the adapter that asks it
        transformer        the fields of its config.json
        image_size         height and width of the latent of a picture of the model's own size
        in_channels        the channels of a latent; the output has twice as many with `learn_sigma`
        patch_size         divides the sides of a latent, of at most `largest_side`
        factor             the pixels that a latent covers on a side
        text_tokens        the tokens of a text, padding included, of `text_size` numbers each
        text_limit         the most tokens of a prompt, as the tokenizer in the folder `tokenizer` counts them
        pooled_size        the numbers of a whole text; 0: the network is given none
        text_mask          True if the network does not look at the padding
        embedded_guidance  True if the network is told the guidance scale

    Raises:
        ValueError: the configuration cannot work; the message names the field.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    family: FamilyName
    transformer: Mapping[str, Any] = field(hash=False)
    image_size: tuple[int, int]
    in_channels: int
    text_tokens: int
    text_size: int
    text_limit: int
    tokenizer: str
    patch_size: int = 2
    factor: int = 8
    largest_side: int | None = None
    learn_sigma: bool = False
    pooled_size: int = 0
    text_mask: bool = False
    embedded_guidance: bool = False

    # No label factors, and no blocks of ours whose conditions could differ.
    classes: ClassVar[tuple[int, ...]] = ()
    depth: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"unknown family {self.family!r}: choose among {', '.join(FAMILIES)}")
        for name in ("in_channels", "text_tokens", "text_size", "text_limit", "patch_size", "factor"):
            value = getattr(self, name)
            if not isinstance(value, int) or value <= 0:
                raise ValueError(f"{name} must be positive and whole, not {value!r}")
        if min(self.image_size) <= 0 or any(side % self.patch_size for side in self.image_size):
            raise ValueError(
                f"image_size {self.image_size[0]}x{self.image_size[1]} is not divisible by patch_size "
                f"{self.patch_size}: change one of them"
            )

        if self.largest_side is not None and max(self.image_size) > self.largest_side:
            raise ValueError(
                f"image_size {self.image_size[0]}x{self.image_size[1]} is beyond largest_side "
                f"{self.largest_side}, up to which the network has places"
            )

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def tokens(self) -> int:
        return self.image_size[0] * self.image_size[1] // self.patch_size**2

    @property
    def text_width(self) -> int:
        """The numbers of an encoded text: its tokens, their mask, and the pooled text."""
        return self.text_tokens * (self.text_size + self.text_mask) + self.pooled_size

    @property
    def embedding_size(self) -> int:
        """The numbers of a condition: the text, and a guidance scale that the network is told."""
        return self.text_width + self.embedded_guidance

    def state(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Return the condition state: (name, shape without batch) of every tensor handed to the network."""
        tensors: list[tuple[str, tuple[int, ...]]] = [("noise", ())]
        tensors.append(("text", (self.text_tokens, self.text_size)))
        if self.text_mask:
            tensors.append(("mask", (self.text_tokens,)))
        if self.pooled_size:
            tensors.append(("pooled", (self.pooled_size,)))
        if self.embedded_guidance:
            tensors.append(("guidance", ()))
        return tuple(tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineFamily:
    """The facts about a family that its folders do not state; they are those of its pipelines in diffusers.

    pipelines      the pipelines' classes, and the most tokens of a text of each, all of which the network
                   is given
    transformer    the class of the transformer, and what it was called by earlier releases of diffusers
    tokenizer      the folder of the tokenizer that counts the tokens of a text
    text_size      the field of the transformer's configuration with the width of a token; pooled_size
                   that with the width of the pooled text
    more_tokens    tokens that the pipeline or other encoders put before these
    lowers         True if the pipeline makes letters small
    head, tail     the pipeline's own words before and after a prompt, whose tokens count as the text's
    plain_negatives  True if the pipeline puts its own words around a prompt and not around a negative one
    packs          pixels of a latent along a side that the pipeline hands over as one token
    positions_of_one_size  True if the positions of another size are computed outside of torch
    sample_size    the side of a latent, where it is not that of the transformer's configuration, else 128
    counts_positions  True if the transformer's pos_embed_max_size is that of a whole image, not of a side
    noise_scale    the network of a flow is told sigma times this
    ends           who places the line of a flow's grid: see `GridReading`
    tells_tokens   True if the pipeline tells its scheduler how many tokens an image has, for a dynamic shift
    distilled      True if guidance is embedded, or there is none
    guidance_norm, unguided_scale  of guidance: see `DiffusionSpec`
    steps, guidance_scale  the defaults
    """

    pipelines: Mapping[str, int]
    transformer: str
    earlier_transformer: str | None = None
    text_size: str
    tokenizer: str = "tokenizer"
    lowers: bool = False
    head: str = ""
    tail: str = ""
    plain_negatives: bool = False
    more_tokens: int = 0
    pooled_size: str | None = None
    text_mask: bool = False
    packs: int = 1
    positions_of_one_size: bool = False
    sample_size: int | None = None
    counts_positions: bool = False
    noise_scale: float = 1000.0
    noise_input: Literal["sigma", "1-sigma"] = "sigma"
    output_sign: Literal[1, -1] = 1
    ends: Literal["scheduler", "pipeline"] = "scheduler"
    tells_tokens: bool = True
    distilled: bool = False
    guidance_norm: GuidanceNorm | None = None
    unguided_scale: Literal[0, 1] = 1
    steps: int
    guidance_scale: float


FAMILIES: Mapping[str, PipelineFamily] = MappingProxyType(
    {
        "pixart": PipelineFamily(
            pipelines={"PixArtSigmaPipeline": 300, "PixArtAlphaPipeline": 120},
            transformer="PixArtTransformer2DModel",
            earlier_transformer="Transformer2DModel",
            text_size="caption_channels",
            lowers=True,
            text_mask=True,
            positions_of_one_size=True,
            steps=20,
            guidance_scale=4.5,
        ),
        "sd3": PipelineFamily(
            pipelines={"StableDiffusion3Pipeline": 256},
            transformer="SD3Transformer2DModel",
            text_size="joint_attention_dim",
            tokenizer="tokenizer_3",
            more_tokens=77,
            pooled_size="pooled_projection_dim",
            steps=28,
            guidance_scale=7.0,
        ),
        "flux": PipelineFamily(
            pipelines={"FluxPipeline": 512},
            transformer="FluxTransformer2DModel",
            text_size="joint_attention_dim",
            tokenizer="tokenizer_2",
            pooled_size="pooled_projection_dim",
            packs=2,
            noise_scale=1.0,
            ends="pipeline",
            distilled=True,
            steps=28,
            guidance_scale=3.5,
        ),
        "sana": PipelineFamily(
            pipelines={"SanaPipeline": 299},
            transformer="SanaTransformer2DModel",
            text_size="caption_channels",
            # The last token of the pipeline's instruction is one of the 300.
            more_tokens=1,
            lowers=True,
            plain_negatives=True,
            text_mask=True,
            tells_tokens=False,
            steps=20,
            guidance_scale=4.5,
        ),
        "lumina2": PipelineFamily(
            pipelines={"Lumina2Pipeline": 256, "Lumina2Text2ImgPipeline": 256},
            transformer="Lumina2Transformer2DModel",
            text_size="cap_feat_dim",
            head="You are an assistant designed to generate superior images with the superior degree of "
            "image-text alignment based on textual prompts or user prompts. <Prompt Start> ",
            plain_negatives=True,
            text_mask=True,
            noise_scale=1.0,
            noise_input="1-sigma",
            output_sign=-1,
            ends="pipeline",
            guidance_norm="line",
            tells_tokens=False,
            steps=30,
            guidance_scale=4.0,
        ),
        "auraflow": PipelineFamily(
            pipelines={"AuraFlowPipeline": 256},
            transformer="AuraFlowTransformer2DModel",
            text_size="joint_attention_dim",
            sample_size=128,
            counts_positions=True,
            tells_tokens=False,
            noise_scale=1.0,
            steps=50,
            guidance_scale=3.5,
        ),
        "chroma": PipelineFamily(
            pipelines={"ChromaPipeline": 512},
            transformer="ChromaTransformer2DModel",
            text_size="joint_attention_dim",
            text_mask=True,
            packs=2,
            noise_scale=1.0,
            ends="pipeline",
            steps=35,
            guidance_scale=5.0,
        ),
        "qwen_image": PipelineFamily(
            pipelines={"QwenImagePipeline": 512},
            transformer="QwenImageTransformer2DModel",
            text_size="joint_attention_dim",
            tail="<|im_end|>\n<|im_start|>assistant\n",
            text_mask=True,
            packs=2,
            noise_scale=1.0,
            ends="pipeline",
            guidance_norm="token",
            steps=50,
            guidance_scale=4.0,
        ),
        "z_image": PipelineFamily(
            pipelines={"ZImagePipeline": 512},
            transformer="ZImageTransformer2DModel",
            text_size="cap_feat_dim",
            head="<|im_start|>user\n",
            tail="<|im_end|>\n<|im_start|>assistant\n",
            text_mask=True,
            noise_scale=1.0,
            noise_input="1-sigma",
            output_sign=-1,
            ends="pipeline",
            unguided_scale=0,
            steps=50,
            guidance_scale=5.0,
        ),
    }
)
assert set(FAMILIES) == set(get_args(FamilyName))

"""The shape of a Diffusion Transformer: one frozen value, and the sizes that the paper names.

Pure: no torch, no I/O. A configuration that cannot work is refused at construction, with a sentence that says
how to mend it. Source: Peebles & Xie, arXiv:2212.09748, Table 1.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

from ditserve.model.spec.attention_kinds import AttentionKind, attention_kind, check_kinds, check_levels
from ditserve.model.spec.config_checks import Fusion, check_conditions, check_counts
from ditserve.model.spec.sizes import Size, check_size, patch_along

BlockKind = Literal["adaln_zero", "adaln", "cross_attention", "in_context"]
BLOCK_KINDS: tuple[BlockKind, ...] = get_args(BlockKind)
Routing = Literal["expert_choice", "token_choice"]

# Name → (depth, hidden size, heads).
SIZES: dict[str, tuple[int, int, int]] = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
PATCHES = (2, 4, 8)

# Block kind → modulation vectors (D,) of a block: shift, scale and gate of attention, then of the MLP.
MODULATIONS: dict[BlockKind, int] = {"adaln_zero": 6, "adaln": 4, "cross_attention": 0, "in_context": 0}


# The width of a SwiGLU is a multiple of it.
SWIGLU_MULTIPLE = 8
# The largest share of tokens that can be merged into others: three of four (arXiv:2303.17604, §4).
MOST_MERGED = 0.75


@dataclass(frozen=True, slots=True)
class DiTConfig:
    """The configuration that fixes the parameters and the function of a DiT.

    Sizes are (height, width), or (frames or depth, height, width), in latent pixels, or in image pixels for
    models without an autoencoder.

        patch_size       one number for height and width, and 1 along a third axis; or one along each axis
        attention_width  the width of all heads together, less where heads were pruned; None: hidden_size
        blocks           one kind for all blocks, or one kind per block
        classes          the number of classes of each label factor k; index classes[k] is its null class
        text_size        the width of text embeddings; 0: the model takes no text
        text_tokens      the tokens of a text that every block attends to; 0: its embedding alone
        text_labels      a text stands in for the labels that are not given, with a share for each class
        layout_rank      the rank of a bias that the condition gives to every token; 0: none
        mean_rank        the rank of the mean picture that the condition tells, which tokens see, and which
                         the output is predicted about; 0: none
        mean_maps        the maps from rank to picture that the condition mixes, such as one for each style
        rms_norm         norms by the root mean square, without the mean, those of qk_norm too
        head_channels    the channels handed to a small convolution at the end; 0: none
        attention        one kind of self-attention for all blocks, or one per block (`attention_kinds`)
        conv_mlp         MLPs with a gate and a depthwise convolution over the grid of tokens
        levels           the level of every block: at level k, 2^k × 2^k tokens are merged into one
        merge_tokens     the share of tokens that every block computes together with a like one
        frequency_shift  1 for diffusers' timestep frequencies (k/127), 0 for the published ones (k/128)
        mlp_norm_eps     the epsilon of the norm before the MLP: published 1e-6, in diffusers 1e-5
        first_frame      a clip's first frame may be given, as tokens beside those of every frame
        base_size        the size whose tokens stand at positions 0, 1, 2 …; None: image_size
        shared_modulation  one map of the condition for all blocks, with offsets for each (adaLN-single)
        condition_gate   a gate in each block decides token by token how much the modulation acts
        experts          the MLPs of a block, of which a token takes `top_k` (about as many where experts
                         choose); 0: one MLP for all tokens
        shared_expert    beside them, an MLP for all tokens

    A model that is trained at 32×32 and then at 64×64 keeps the base size (32, 32): its larger grid is
    squeezed into the range of the smaller one. diffusers' DiT differs from the published one in just the
    frequencies and the epsilon.

    Raises:
        ValueError: the configuration cannot work; the message names the field and the remedy.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    image_size: Size = (32, 32)
    patch_size: int | Size = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    attention_width: int | None = None
    mlp_ratio: float = 4.0
    blocks: tuple[BlockKind, ...] = ("adaln_zero",)
    classes: tuple[int, ...] = (1000,)
    text_size: int = 0
    text_tokens: int = 0
    text_labels: bool = False
    fusion: Fusion = "sum"
    learn_sigma: bool = True
    qk_norm: bool = False
    rms_norm: bool = False
    rope: bool = False
    swiglu: bool = False
    layout_rank: int = 0
    mean_rank: int = 0
    mean_maps: int = 1
    head_channels: int = 0
    attention: tuple[str, ...] = ("full",)
    conv_mlp: bool = False
    levels: tuple[int, ...] = (0,)
    merge_tokens: float = 0.0
    frequency_shift: int = 0
    mlp_norm_eps: float = 1e-6
    first_frame: bool = False
    base_size: Size | None = None
    shared_modulation: bool = False
    condition_gate: bool = False
    experts: int = 0
    top_k: int = 1
    routing: Routing = "expert_choice"
    shared_expert: bool = False

    def __post_init__(self) -> None:
        blocks: Any = self.blocks
        object.__setattr__(self, "blocks", (blocks,) if isinstance(blocks, str) else tuple(blocks))
        for field, kind in (("attention", str), ("levels", int)):
            if isinstance(getattr(self, field), kind):
                object.__setattr__(self, field, (getattr(self, field),))
        # JSON has lists where these fields are tuples.
        for field in ("image_size", "patch_size", "classes", "base_size", "attention", "levels"):
            if isinstance(getattr(self, field), list):
                object.__setattr__(self, field, tuple(getattr(self, field)))
        self._check_sizes()
        self._check_blocks()
        self._check_conditions()
        self._check_options()
        self._check_tokens()
        self._check_experts()

    def _check_sizes(self) -> None:
        check_counts(self, "in_channels", "hidden_size", "depth", "num_heads")
        check_size("image_size", self.image_size, 1, axes=(2, 3))
        self._check_patch()
        check_size("image_size", self.image_size, self.patch_size, axes=(2, 3))
        if self.base_size is not None:
            check_size("base_size", self.base_size, self.patch_size, axes=(self.axes,))
        for field in ("mlp_ratio", "mlp_norm_eps"):
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(f"{field} must be positive, not {getattr(self, field)!r}")
        if self.attention_width is not None:
            check_counts(self, "attention_width")
        if self.heads_width % self.num_heads:
            field = "hidden_size" if self.attention_width is None else "attention_width"
            near = max(1, self.heads_width // self.num_heads) * self.num_heads
            raise ValueError(
                f"{field} {self.heads_width} is not divisible by num_heads {self.num_heads}: "
                f"use a multiple such as {near}"
            )
        # Pairs of a sine and a cosine are shared out to the axes, to each one at least.
        if self.hidden_size % 4 or self.hidden_size < 2 * self.axes:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 4, with three axes at least 8, for "
                "sine-cosine positions"
            )
        if self.rope and (self.head_size % 4 or self.head_size < 2 * self.axes):
            raise ValueError(
                f"rope needs a head size that is a multiple of 4, not {self.head_size}, and with three axes "
                "at least 8: change num_heads"
            )

    def _check_patch(self) -> None:
        if not isinstance(self.patch_size, tuple):
            check_counts(self, "patch_size")
        elif len(self.patch_size) != self.axes or not all(
            isinstance(side, int) and side > 0 for side in self.patch_size
        ):
            raise ValueError(
                f"patch_size must be a positive number, or one for each of the {self.axes} axes of "
                f"image_size, not {self.patch_size!r}"
            )

    def _check_blocks(self) -> None:
        unknown = [kind for kind in self.blocks if kind not in BLOCK_KINDS]
        if unknown:
            raise ValueError(f"unknown block kind {unknown[0]!r}: choose among {', '.join(BLOCK_KINDS)}")
        if len(self.blocks) not in (1, self.depth):
            raise ValueError(
                f"blocks names {len(self.blocks)} kinds for depth {self.depth}: give one, or one per block"
            )

    def _check_conditions(self) -> None:
        check_conditions(self.classes, self.text_size, self.fusion)
        if not isinstance(self.text_tokens, int) or self.text_tokens < 0:
            raise ValueError(f"text_tokens must be 0 or positive, not {self.text_tokens!r}")
        if self.text_tokens and not self.text_size:
            raise ValueError("text_tokens needs text_size, the width of a token")
        if self.text_labels and not (self.text_size and self.classes):
            raise ValueError("text_labels needs texts and labels: set text_size and classes, or leave it out")
        if self.text_tokens and set(self.plan) != {"adaln_zero"}:
            raise ValueError("text_tokens is for blocks of the kind adaln_zero alone: change blocks")
        if not isinstance(self.layout_rank, int) or self.layout_rank < 0:
            raise ValueError(f"layout_rank must be 0 (no layout path) or positive, not {self.layout_rank}")
        if not isinstance(self.mean_rank, int) or self.mean_rank < 0:
            raise ValueError(f"mean_rank must be 0 (no mean picture) or positive, not {self.mean_rank}")
        check_counts(self, "mean_maps")
        if self.first_frame and self.axes != 3:
            raise ValueError("first_frame is for clips: give image_size three axes, or leave it out")
        if self.mean_maps > 1 and not self.mean_rank:
            raise ValueError("mean_maps is for mean_rank: set mean_rank, or leave it out")
        if self.mean_rank and self.learn_sigma:
            raise ValueError("mean_rank is for one prediction: turn learn_sigma off or set mean_rank to 0")

    def _check_options(self) -> None:
        if self.frequency_shift not in (0, 1):
            raise ValueError("frequency_shift must be 0 (published DiT) or 1 (diffusers)")
        if self.head_channels and self.head_channels < self.in_channels:
            raise ValueError(f"head_channels must be 0 or at least in_channels ({self.in_channels})")
        if self.head_channels and self.learn_sigma:
            raise ValueError(
                "head_channels refines one prediction: turn learn_sigma off or set head_channels to 0"
            )

        for field in ("shared_modulation", "condition_gate"):
            if getattr(self, field) and (len(set(self.plan)) > 1 or not MODULATIONS[self.plan[0]]):
                raise ValueError(f"{field} needs blocks that are all adaln_zero or all adaln: change blocks")

    def _check_experts(self) -> None:
        if self.routing not in get_args(Routing):
            raise ValueError(f"unknown routing {self.routing!r}: choose among {', '.join(get_args(Routing))}")
        if not isinstance(self.experts, int) or self.experts < 0 or self.experts == 1:
            raise ValueError(
                f"experts must be 0 (one MLP for all tokens) or 2 and more, not {self.experts!r}"
            )
        if not self.experts:
            for field, default in (("shared_expert", False), ("top_k", 1), ("routing", "expert_choice")):
                if getattr(self, field) != default:
                    raise ValueError(f"{field} is for experts: set experts, or leave it out")
            return
        check_counts(self, "top_k")
        if self.top_k >= self.experts:
            raise ValueError(f"top_k {self.top_k} must be below experts {self.experts}: lower it")
        for field in ("swiglu", "conv_mlp"):
            if getattr(self, field):
                raise ValueError(f"experts are MLPs without a gate: leave out {field}, or experts")
        tokens = int(self.tokens * (1 - self.merge_tokens)) >> 2 * max(self.level_plan)
        if tokens * self.top_k < self.experts:
            raise ValueError(
                f"experts {self.experts} are more than the {tokens} tokens of a picture can share: "
                "lower experts or patch_size"
            )

    def _check_tokens(self) -> None:
        for field in ("attention", "levels"):
            value = getattr(self, field)
            if not isinstance(value, tuple) or len(value) not in (1, self.depth):
                raise ValueError(f"{field} must be one value, or one per block for depth {self.depth}")
        check_kinds(self.attention_plan, self.num_heads, axes=self.axes, rope=self.rope)
        check_levels(self.level_plan)
        for kind, level in zip(self.attention_plan, self.level_plan, strict=True):
            if kind.name == "low_rank" and kind.size > self.tokens >> 2 * level:
                raise ValueError(
                    f"attention low_rank:{kind.size} has more mixes than a picture has tokens at its level, "
                    f"{self.tokens >> 2 * level}: lower the number"
                )
        if self.conv_mlp and self.swiglu:
            raise ValueError("conv_mlp has a gate of its own: turn swiglu off, or conv_mlp")
        if not isinstance(self.merge_tokens, int | float) or not 0 <= self.merge_tokens <= MOST_MERGED:
            raise ValueError(f"merge_tokens is a share from 0 to {MOST_MERGED}, not {self.merge_tokens!r}")
        if self.merge_tokens and (self.varies_attention or self.conv_mlp or self.rope or any(self.levels)):
            raise ValueError(
                "merge_tokens leaves no grid of tokens: use attention full, and no conv_mlp, levels or rope"
            )
        if (
            self.varies_attention or self.conv_mlp or any(self.levels) or self.merge_tokens
        ) and "in_context" in self.blocks:
            raise ValueError(
                "attention other than full, conv_mlp, levels and merge_tokens need a grid of tokens alone: "
                "use no block of the kind in_context"
            )
        if max(self.token_multiples) > 1:
            check_size(
                "image_size",
                self.image_size,
                self.size_multiples,
                "the side of windows and merged tokens,",
                axes=(self.axes,),
            )

    @property
    def attention_plan(self) -> tuple[AttentionKind, ...]:
        """The kind of attention of every block."""
        kinds = tuple(attention_kind(word) for word in self.attention)
        return kinds if len(kinds) == self.depth else kinds * self.depth

    @property
    def varies_attention(self) -> bool:
        """True if any block has another attention than the full one."""
        return any(kind.name != "full" for kind in self.attention_plan)

    @property
    def level_plan(self) -> tuple[int, ...]:
        """The level of every block."""
        return self.levels if len(self.levels) == self.depth else self.levels * self.depth

    @property
    def axes(self) -> int:
        """The number of axes of what is denoised: two of a picture, three of a clip or a volume."""
        return len(self.image_size)

    @property
    def patch(self) -> Size:
        """The patch along every axis."""
        return patch_along(self.patch_size, self.axes)

    @property
    def token_multiples(self) -> Size:
        """The number that must divide the tokens along each axis."""
        plan = tuple(zip(self.attention_plan, self.level_plan, strict=True))
        # Levels halve rows and columns alone, and tokens are merged by the 2×2 of a row and a column.
        side = math.lcm(*(kind.multiple << level for kind, level in plan), 2 if self.merge_tokens else 1)
        return (*[math.lcm(*(kind.multiple for kind, _ in plan))] * (self.axes - 2), side, side)

    @property
    def size_multiples(self) -> Size:
        """The number of latent pixels that must divide each side of a size."""
        return tuple(a * b for a, b in zip(self.patch, self.token_multiples, strict=True))

    @property
    def heads_width(self) -> int:
        """The width of all attention heads together."""
        return self.hidden_size if self.attention_width is None else self.attention_width

    @property
    def head_size(self) -> int:
        return self.heads_width // self.num_heads

    @property
    def out_channels(self) -> int:
        """The channels of the output: twice those of the input if the variance is learned."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def grid_size(self) -> Size:
        """The tokens along each axis, rows and columns last, at the trained size."""
        return tuple(side // patch for side, patch in zip(self.image_size, self.patch, strict=True))

    @property
    def base_grid(self) -> Size:
        """The tokens along each axis at `base_size`, which stand at distance 1 from one another."""
        size = self.base_size or self.image_size
        return tuple(side // patch for side, patch in zip(size, self.patch, strict=True))

    def position_scale(self, grid: Size) -> tuple[float, ...]:
        """Return the distance between neighbouring tokens of a grid, along each axis.

        A grid larger than the base grid is squeezed into its range (position interpolation, Chen et al.,
        arXiv:2306.15595); a smaller one is a crop of it. With a base grid of 16 × 16 tokens, 32 rows and 8
        columns have distances (0.5, 1.0): row 31 stands at position 15.5, column 7 at position 7.
        """
        return tuple(min(1.0, base / count) for base, count in zip(self.base_grid, grid, strict=True))

    @property
    def tokens(self) -> int:
        return math.prod(self.grid_size)

    @property
    def plan(self) -> tuple[BlockKind, ...]:
        """The kind of every block, shallow to deep."""
        return self.blocks if len(self.blocks) == self.depth else self.blocks * self.depth

    @property
    def mlp_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def adaptive_final(self) -> bool:
        """True if the final layer is modulated: with adaLN. The other kinds take the condition as tokens."""
        return MODULATIONS[self.plan[-1]] > 0

    @property
    def text_width(self) -> int:
        """The numbers that encode a text: its embedding and then its tokens, `text_size` each."""
        return self.text_size * (1 + self.text_tokens)

    @property
    def embedding_size(self) -> int:
        """The numbers of a condition embedding: its own, of its mean picture, its text, its first frame."""
        return self.hidden_size * (1 + self.text_tokens) + self.mean_size + math.prod(self.frame_shape)

    @property
    def frame_shape(self) -> Size:
        """The shape (C, H, W) of a first frame that is given; (0,) of a network that is told none."""
        return (self.in_channels, *self.image_size[-2:]) if self.first_frame else (0,)

    @property
    def mean_size(self) -> int:
        """The numbers that a condition tells of its mean picture: its share of each map, and its codes."""
        return self.mean_rank and self.mean_maps + self.mean_rank

    @property
    def has_layout(self) -> bool:
        """True if the condition gives every token of one size a bias of its own."""
        return self.layout_rank > 0 or self.mean_rank > 0

    def modulation_vectors(self, kind: BlockKind) -> int:
        """Return the number of vectors (D,) that modulate a block of this kind, that of its gate included."""
        return MODULATIONS[kind] and MODULATIONS[kind] + self.condition_gate

    def state(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Return the condition state: (name, shape without batch) of every tensor handed to the backbone."""
        tensors: list[tuple[str, tuple[int, ...]]] = []
        for index, kind in enumerate(self.plan):
            if MODULATIONS[kind]:
                tensors.append((f"block_{index}", (self.modulation_vectors(kind), self.hidden_size)))
        if any(not MODULATIONS[kind] for kind in self.plan):
            tensors.append(("tokens", (2, self.hidden_size)))
        if self.adaptive_final:
            tensors.append(("final", (2, self.hidden_size)))
        if self.has_layout:
            tensors.append(("layout", (self.tokens, self.hidden_size)))
        if self.mean_rank:
            tensors += [("output_mean", (self.in_channels, *self.image_size)), ("output_scales", (2,))]
        if self.text_tokens:
            tensors.append(("text", (self.text_tokens, self.hidden_size)))
        if self.first_frame:
            tensors.append(("first_frame", (math.prod(self.grid_size[-2:]), self.hidden_size)))
        return tuple(tensors)


def mlp_ratio(channels: int, hidden_size: int, *, swiglu: bool) -> float:
    """Return the `mlp_ratio` of an MLP of so many channels; those of a SwiGLU are a multiple of 8."""
    size = 3 * channels // 2 if swiglu else channels
    ratio = size / hidden_size
    # Rounding may leave the product one below.
    return ratio if int(hidden_size * ratio) == size else math.nextafter(ratio, math.inf)


def published_config(name: str, **changes: Any) -> DiTConfig:
    """Return the published configuration of a name such as "DiT-XL/2", for 256 px (32×32 latents).

    `changes` replace fields.

    Raises:
        ValueError: the name is not one of DiT-{S,B,L,XL}/{2,4,8}, or a change is illegal.
    """
    match = re.fullmatch(r"DiT-(S|B|L|XL)/(2|4|8)", name)
    if not match:
        raise ValueError(f"unknown model name {name!r}: use DiT-{{S,B,L,XL}}/{{2,4,8}}, for example DiT-S/2")
    depth, hidden, heads = SIZES[match[1]]
    config = DiTConfig(depth=depth, hidden_size=hidden, num_heads=heads, patch_size=int(match[2]))
    return replace(config, **changes)

"""The shape of a U-Net: one frozen value, and the residual blocks that it stands for.

Pure: no torch, no I/O. A configuration that cannot work is refused at construction, with a sentence that says
how to mend it. Source: Dhariwal & Nichol, arXiv:2105.05233, §3 and Table 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ditserve.model.spec.config_checks import Fusion, check_conditions, check_counts
from ditserve.model.spec.sizes import Size, check_size

Resample = Literal["keep", "halve", "double"]


@dataclass(frozen=True, slots=True)
class UNetStage:
    """One residual block: its channels, its resampling, and its part in attention and skip connections.

    With `pushes` its output becomes a skip connection; with `pops` it takes the last one beside its input.
    """

    inputs: int
    outputs: int
    attention: bool = False
    resample: Resample = "keep"
    pushes: bool = False
    pops: bool = False


@dataclass(frozen=True, slots=True)
class UNetConfig:
    """The configuration that fixes the parameters and the function of a U-Net.

    `multipliers` are the channels of each level relative to `base_channels`; every level has half the size of
    the one above. `attention` names the levels that attend, 0 being the finest. Heads are `head_size` wide.

    Raises:
        ValueError: the configuration cannot work; the message names the field and the remedy.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    image_size: Size = (32, 32)
    in_channels: int = 4
    base_channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 3)
    res_blocks: int = 2
    attention: tuple[int, ...] = (1, 2)
    head_size: int = 64
    classes: tuple[int, ...] = (1000,)
    text_size: int = 0
    fusion: Fusion = "sum"
    learn_sigma: bool = True

    def __post_init__(self) -> None:
        # JSON has lists where these fields are tuples.
        for field in ("image_size", "multipliers", "attention", "classes"):
            if isinstance(getattr(self, field), list):
                object.__setattr__(self, field, tuple(getattr(self, field)))
        check_counts(self, "in_channels", "base_channels", "res_blocks", "head_size")
        for field in ("multipliers", "attention"):
            value = getattr(self, field)
            if not isinstance(value, tuple) or not all(isinstance(number, int) for number in value):
                raise ValueError(f"{field} must be a tuple of whole numbers, not {value!r}")
        if not self.multipliers or min(self.multipliers) <= 0:
            raise ValueError(f"multipliers must be one or more positive numbers, not {self.multipliers}")
        self.check_size("image_size", self.image_size)
        if any(not 0 <= level < len(self.multipliers) for level in self.attention):
            raise ValueError(
                f"attention names levels in 0..{len(self.multipliers) - 1}, not {self.attention}"
            )
        for level in (*self.attention, len(self.multipliers) - 1):
            if self.base_channels * self.multipliers[level] % self.head_size:
                raise ValueError(
                    f"level {level} has {self.base_channels * self.multipliers[level]} channels, "
                    f"not a multiple of head_size {self.head_size}: change one of them"
                )
        check_conditions(self.classes, self.text_size, self.fusion)

    def check_size(self, field: str, size: Sequence[int]) -> None:
        """Raise ValueError unless `size` (height, width) can be halved from level to level."""
        levels = len(self.multipliers)
        check_size(field, size, 2 ** (levels - 1), f"the halvings between {levels} levels,")

    @property
    def hidden_size(self) -> int:
        """The width of the condition embedding."""
        return 4 * self.base_channels

    @property
    def embedding_size(self) -> int:
        """The numbers of a condition embedding."""
        return self.hidden_size

    @property
    def text_tokens(self) -> int:
        """The tokens of a text that the network attends to: none, it takes the text's embedding."""
        return 0

    @property
    def text_width(self) -> int:
        """The numbers that encode a text."""
        return self.text_size

    @property
    def out_channels(self) -> int:
        """The channels of the output: twice those of the input if the variance is learned."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def depth(self) -> int:
        """The number of residual blocks from input to output."""
        return len(self.stages())

    @property
    def tokens(self) -> int:
        """The number of positions at the coarsest level, where the attention in the middle is."""
        return math.prod(side >> (len(self.multipliers) - 1) for side in self.image_size)

    def stages(self) -> tuple[UNetStage, ...]:
        """Return the residual blocks from input to output."""
        widths = [self.base_channels * multiplier for multiplier in self.multipliers]
        stages, skips, channels = list[UNetStage](), [self.base_channels], self.base_channels
        for level, width in enumerate(widths):
            attends = level in self.attention
            for _ in range(self.res_blocks):
                stages.append(UNetStage(channels, width, attends, pushes=True))
                channels = width
                skips.append(channels)
            if level + 1 < len(widths):
                stages.append(UNetStage(channels, channels, resample="halve", pushes=True))
                skips.append(channels)
        stages += [UNetStage(channels, channels, attention=True), UNetStage(channels, channels)]
        for level, width in reversed(list(enumerate(widths))):
            attends = level in self.attention
            for _ in range(self.res_blocks + 1):
                stages.append(UNetStage(channels + skips.pop(), width, attends, pops=True))
                channels = width
            if level:
                stages.append(UNetStage(channels, channels, resample="double"))
        return tuple(stages)

    def state(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Return the condition state: the scale and shift (2, channels) of every residual block."""
        return tuple((f"block_{k}", (2, stage.outputs)) for k, stage in enumerate(self.stages()))

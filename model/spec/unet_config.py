"""The shape of a U-Net: one frozen value, and the residual blocks it stands for.

Pure: no torch, no I/O. A configuration that cannot work is refused here, at construction, with the sentence
that fixes it. Source: Dhariwal & Nichol, arXiv:2105.05233, §3 and Table 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ditserve.model.spec.dit_config import Fusion, check_conditions, check_counts, check_size

Resample = Literal["keep", "halve", "double"]


@dataclass(frozen=True, slots=True)
class UNetStage:
    """One residual block: its channels, whether attention follows, and what happens to the skip connections."""

    inputs: int
    outputs: int
    attention: bool = False
    resample: Resample = "keep"
    pushes: bool = False
    pops: bool = False


@dataclass(frozen=True, slots=True)
class UNetConfig:
    """Everything that fixes the parameters and the function of a U-Net.

    `multipliers` are the channels of each level relative to `base_channels`, every level being half the size
    of the one above; `attention` names the levels (0 the finest) that attend; heads are `head_size` wide.

    Raises:
        ValueError: the configuration cannot work; the message names the field and the remedy.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    image_size: tuple[int, int] = (32, 32)
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
        for field in (
            "image_size",
            "multipliers",
            "attention",
            "classes",
        ):  # JSON has lists where these are tuples
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
        """Raises ValueError unless `size` (height, width) can be halved from level to level."""
        levels = len(self.multipliers)
        check_size(field, size, 2 ** (levels - 1), f"the halvings between {levels} levels,")

    @property
    def hidden_size(self) -> int:
        """Width of the condition embedding."""
        return 4 * self.base_channels

    @property
    def out_channels(self) -> int:
        """Channels of the network's output: twice the input's when the variance is learned."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def depth(self) -> int:
        """Residual blocks from input to output."""
        return len(self.stages())

    @property
    def tokens(self) -> int:
        """Positions at the coarsest level, where the attention in the middle is."""
        return math.prod(side >> (len(self.multipliers) - 1) for side in self.image_size)

    def stages(self) -> tuple[UNetStage, ...]:
        """The residual blocks from input to output."""
        widths = [self.base_channels * multiplier for multiplier in self.multipliers]
        stages, skips, now = list[UNetStage](), [self.base_channels], self.base_channels
        for level, width in enumerate(widths):
            attends = level in self.attention
            for _ in range(self.res_blocks):
                stages.append(UNetStage(now, width, attends, pushes=True))
                now = width
                skips.append(now)
            if level + 1 < len(widths):
                stages.append(UNetStage(now, now, resample="halve", pushes=True))
                skips.append(now)
        stages += [UNetStage(now, now, attention=True), UNetStage(now, now)]
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(self.res_blocks + 1):
                stages.append(UNetStage(now + skips.pop(), width, level in self.attention, pops=True))
                now = width
            if level:
                stages.append(UNetStage(now, now, resample="double"))
        return tuple(stages)

    def state(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """The condition state: scale and shift (2, channels) of every residual block."""
        return tuple((f"block_{k}", (2, stage.outputs)) for k, stage in enumerate(self.stages()))

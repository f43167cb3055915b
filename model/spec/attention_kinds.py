"""The kinds of self-attention that a block may have, by the words of `DiTConfig.attention`.

    full             every token attends to every token
    space            within a frame of a clip, or a slice of a volume (arXiv:2401.03048)
    time             along frames or depth, at one place: with space in the other blocks, factorised attention
    window:8         within windows of 8×8 tokens; window:8+4: of windows shifted by 4 (arXiv:2103.14030)
    neighbourhood:2  to tokens at most 2 rows and 2 columns away (arXiv:2204.07143)
    axial            half of the heads within rows, the others within columns (arXiv:1912.12180)
    linear           by a kernel of ReLU instead of softmax, without a T×T matrix (arXiv:2410.10629)
    low_rank:16      to 16 mixes of the keys and values (arXiv:2006.04768; mixing as in arXiv:1810.00825)
    channel          of channels to channels, over all tokens (arXiv:2106.09681)

Windows, neighbourhoods and axial attention reach along a third axis as along the others.

Pure: no torch, no I/O.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

# Name → the form of its word, of which the first number is the size and the second the shift.
_FORMS = {
    "full": r"full",
    "space": r"space",
    "time": r"time",
    "window": r"window:(\d+)(?:\+(\d+))?",
    "neighbourhood": r"neighbourhood:(\d+)",
    "axial": r"axial",
    "linear": r"linear",
    "low_rank": r"low_rank:(\d+)",
    "channel": r"channel",
}
EXAMPLES = "full, window:8, window:8+4, neighbourhood:2, axial, linear, low_rank:16, channel, space or time"


@dataclass(frozen=True, slots=True)
class AttentionKind:
    """A kind of self-attention.

    `size` is the side of a window, the radius of a neighbourhood, or the rank; `shift` that of the windows.
    """

    name: str
    size: int = 0
    shift: int = 0

    @property
    def multiple(self) -> int:
        """The number that must divide the tokens along every axis."""
        # A neighbourhood is computed in blocks of twice its radius.
        return {"window": self.size, "neighbourhood": 2 * self.size}.get(self.name, 1)

    @property
    def takes_positions(self) -> bool:
        """True if scores are products of a query and a key, whose rotation (RoPE) tells their distance."""
        return self.name not in ("linear", "channel")

    @property
    def heads_are_alike(self) -> bool:
        """True if any heads can be taken away or given to another process: none has weights or a place."""
        return self.name in ("full", "space", "time", "window", "neighbourhood", "linear")


FULL = AttentionKind("full")


def attention_kind(word: object) -> AttentionKind:
    """Return the kind that a word such as "window:8+4" means.

    Raises:
        ValueError: it is no such word, or its numbers cannot work.
    """
    for name, form in _FORMS.items():
        match = re.fullmatch(form, word) if isinstance(word, str) else None
        if match:
            kind = AttentionKind(name, *(int(number) for number in match.groups() if number))
            if match.groups() and not kind.size:
                raise ValueError(f"attention {word!r} needs a number of at least 1")
            if kind.shift >= max(kind.size, 1):
                raise ValueError(f"attention {word!r} shifts its windows by their side or more")
            return kind
    raise ValueError(f"unknown attention {word!r}: use {EXAMPLES}")


def check_kinds(kinds: Sequence[AttentionKind], num_heads: int, *, axes: int, rope: bool) -> None:
    """Raise ValueError if a network of so many heads and axes cannot have these kinds of attention."""
    if num_heads % axes and any(kind.name == "axial" for kind in kinds):
        raise ValueError(
            f"attention axial over {axes} axes needs num_heads divisible by {axes}, not {num_heads}: change "
            "one of them"
        )
    factors = [kind.name for kind in kinds if kind.name in ("space", "time")]
    if factors and axes < 3:
        raise ValueError(f"attention {factors[0]} needs an image_size of three axes: use full")
    fixed = [kind.name for kind in kinds if not kind.takes_positions]
    if rope and fixed:
        raise ValueError(f"attention {fixed[0]} cannot take rope: turn rope off, or use another kind")


def check_levels(levels: Sequence[int]) -> None:
    """Raise ValueError unless the levels of blocks rise and fall by one, from 0 back to 0."""
    if not all(isinstance(level, int) and level >= 0 for level in levels):
        raise ValueError(f"levels must be whole numbers from 0 on, not {tuple(levels)}")
    if any(abs(a - b) > 1 for a, b in pairwise((0, *levels, 0))):
        raise ValueError(f"levels {tuple(levels)} must begin and end at 0 or 1, and change by 1 at a time")

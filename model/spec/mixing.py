"""Several conditions in one picture: mixed as embeddings, composed as outputs, or each steering its own
depth.

Pure: no torch, no I/O; plain arithmetic, so numpy arrays and torch tensors flow through alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, cast, get_args

from ditserve.model.spec.network_config import NetworkConfig

Array = TypeVar("Array")  # a numpy array or a torch tensor
Mix = Literal["linear", "spherical"]


def shares(weights: Sequence[float], count: int) -> list[float]:
    """`weights` of `count` conditions divided by their sum; each may be negative.

    Raises:
        ValueError: no condition, not one weight for each, or a sum that is not positive.
    """
    if not count or len(weights) != count:
        raise ValueError(
            f"give one weight for each of one or more conditions, not {len(weights)} for {count}"
        )
    total = math.fsum(weights)
    if not (total > 0 and math.isfinite(total)):
        raise ValueError(f"the weights of a condition must sum to more than 0, not {total}")
    return [weight / total for weight in weights]


def mixed(embeddings: Sequence[Array], weights: Sequence[float], mix: Mix = "linear") -> Array:
    """One embedding (D,) between several (D,), which are blended one after the other by their share so far.

    Raises:
        ValueError: no embedding, not one weight for each, a sum that is not positive, or an unknown kind of
        mix.
    """
    if mix not in get_args(Mix):
        raise ValueError(f"mix must be one of {', '.join(get_args(Mix))}, not {mix!r}")
    parts = shares(weights, len(embeddings))
    blend: Any = embeddings[0]
    total = parts[0]
    rest: Sequence[Any] = embeddings[1:]
    for embedding, share in zip(rest, parts[1:], strict=True):
        total += share
        blend = (slerp if mix == "spherical" else lerp)(blend, embedding, share / total)
    return cast(Array, blend)


def lerp(a: Any, b: Any, share: float) -> Any:
    """(1 − share)·a + share·b."""
    return (1.0 - share) * a + share * b


def slerp(a: Any, b: Any, share: float) -> Any:
    """Between vectors (D,) along their arc (Shoemake, SIGGRAPH 1985); of parallel ones, along the line."""
    lengths = math.sqrt((a * a).sum().item() * (b * b).sum().item())
    cosine = (a * b).sum().item() / max(lengths, 1e-12)
    angle = math.acos(min(1.0, max(-1.0, cosine)))
    if math.sin(angle) < 1e-4:
        return lerp(a, b, share)
    return (math.sin((1.0 - share) * angle) * a + math.sin(share * angle) * b) / math.sin(angle)


def composed(outputs: Sequence[Array], weights: Sequence[float]) -> Array:
    """Network outputs under several conditions, (…, C, H, W) each, as the one output that guidance then
    amplifies.

    Guided by scale s against the unconditional output u this is u + Σ s·w_k·(output_k − u), the composition
    of Liu et al. (arXiv:2206.01714, eq. 11), w_k being the weights relative to their sum; a negative one
    steers away.

    Raises:
        ValueError: not one weight for each output, or a sum that is not positive.
    """
    parts: Sequence[Any] = outputs
    total: Any = 0.0
    for output, share in zip(parts, shares(weights, len(parts)), strict=True):
        total = total + share * output
    return cast(Array, total)


def spread(depth: int, conditions: int) -> list[int]:
    """Which of `conditions` each of `depth` blocks follows: equal runs, the first shallow, the last deep.

    Raises:
        ValueError: no condition, or more than blocks.
    """
    if not 1 <= conditions <= depth:
        raise ValueError(f"{depth} blocks can follow 1 to {depth} conditions, not {conditions}")
    return [block * conditions // depth for block in range(depth)]


def splice(
    config: NetworkConfig, states: Sequence[Sequence[Array]], choice: Sequence[int]
) -> tuple[Array, ...]:
    """A condition state in which block i follows `states[choice[i]]`, all at one timestep.

    The layout bias comes with the first block's condition, the final modulation with the last block's.

    Raises:
        ValueError: not one choice per block, or several conditions for blocks that share the condition
        tokens.
    """
    if len(choice) != config.depth:
        raise ValueError(f"choose a condition for each of the {config.depth} blocks, not for {len(choice)}")
    modulated = {int(name.removeprefix("block_")) for name, _ in config.state() if name.startswith("block_")}
    by_tokens = {choice[block] for block in range(config.depth) if block not in modulated}
    if len(by_tokens) > 1:
        raise ValueError("cross-attention and in-context blocks share one condition: choose the same for all")
    source = {f"block_{block}": choice[block] for block in modulated}
    source |= {"tokens": next(iter(by_tokens), 0), "final": choice[-1], "layout": choice[0]}
    return tuple(states[source[name]][place] for place, (name, _) in enumerate(config.state()))

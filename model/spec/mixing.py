"""Several conditions in one picture: mixed as embeddings, composed as outputs, or one for each depth.

Pure: no torch, no I/O. All is plain arithmetic, so that it takes numpy arrays and torch tensors alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, cast, get_args

from ditserve.model.spec.network_config import BundleConfig

Array = TypeVar("Array")  # a numpy array or a torch tensor
Mix = Literal["linear", "spherical"]
Combine = Literal[Mix, "compose", "layers"]


def normalised_weights(weights: Sequence[float], count: int) -> list[float]:
    """Return the `weights` of `count` conditions divided by their sum. A weight may be negative.

    Raises:
        ValueError: no condition, not one weight per condition, or a sum that is not positive.
    """
    if not count or len(weights) != count:
        raise ValueError(
            f"give one weight for each of one or more conditions, not {len(weights)} for {count}"
        )
    total = math.fsum(weights)
    if not (total > 0 and math.isfinite(total)):
        raise ValueError(f"the weights of a condition must sum to more than 0, not {total}")
    return [weight / total for weight in weights]


def mix_embeddings(embeddings: Sequence[Array], weights: Sequence[float], mix: Mix = "linear") -> Array:
    """Return one embedding (D,) between several (D,), by their weights.

    They are blended one after the other, each by its share of the weights so far. With weights (1, 1, 2) the
    second is blended in by 1/2, then the third by 2/4. A linear mix thus has shares of 1/4, 1/4 and 1/2.

    Raises:
        ValueError: no embedding, not one weight per embedding, a sum that is not positive, or an unknown mix.
    """
    if mix not in get_args(Mix):
        raise ValueError(f"mix must be one of {', '.join(get_args(Mix))}, not {mix!r}")
    parts = normalised_weights(weights, len(embeddings))
    blend: Any = embeddings[0]
    total = parts[0]
    rest: Sequence[Any] = embeddings[1:]
    for embedding, share in zip(rest, parts[1:], strict=True):
        total += share
        blend = (slerp if mix == "spherical" else lerp)(blend, embedding, share / total)
    return cast(Array, blend)


def lerp(a: Any, b: Any, share: float) -> Any:
    """Return (1 − share)·a + share·b."""
    return (1.0 - share) * a + share * b


def slerp(a: Any, b: Any, share: float) -> Any:
    """Interpolate vectors (D,) along their arc (Shoemake, SIGGRAPH 1985), parallel ones along the line."""
    lengths = math.sqrt((a * a).sum().item() * (b * b).sum().item())
    cosine = (a * b).sum().item() / max(lengths, 1e-12)
    angle = math.acos(min(1.0, max(-1.0, cosine)))
    if math.sin(angle) < 1e-4:
        return lerp(a, b, share)
    return (math.sin((1.0 - share) * angle) * a + math.sin(share * angle) * b) / math.sin(angle)


def compose_outputs(outputs: Sequence[Array], weights: Sequence[float]) -> Array:
    """Return the weighted mean of network outputs (…, C, H, W) under several conditions.

    With guidance of scale s against the unconditional output u, it becomes u + Σ s·w_k·(output_k − u), where
    the w_k are the weights divided by their sum: the composition of Liu et al. (arXiv:2206.01714, eq. 11). A
    negative weight steers away from its condition.

    Raises:
        ValueError: not one weight per output, or a sum that is not positive.
    """
    parts: Sequence[Any] = outputs
    total: Any = 0.0
    for output, share in zip(parts, normalised_weights(weights, len(parts)), strict=True):
        total = total + share * output
    return cast(Array, total)


def assign_blocks(depth: int, conditions: int) -> list[int]:
    """Return for each of `depth` blocks the index of the condition it follows: equal runs, the first shallow.

    With 6 blocks and 2 conditions that is 0, 0, 0, 1, 1, 1.

    Raises:
        ValueError: no condition, or more conditions than blocks.
    """
    if not 1 <= conditions <= depth:
        raise ValueError(f"{depth} blocks can follow 1 to {depth} conditions, not {conditions}")
    return [block * conditions // depth for block in range(depth)]


def state_sources(config: BundleConfig, choice: Sequence[int]) -> tuple[int, ...]:
    """Return for each tensor of the condition state the condition that it follows; block i follows choice[i].

    The layout bias is that of the first block's condition, the final modulation that of the last block's.

    Raises:
        ValueError: not one choice per block, or several conditions for blocks that share tokens.
    """
    if len(choice) != config.depth:
        raise ValueError(f"choose a condition for each of the {config.depth} blocks, not for {len(choice)}")
    names = [name for name, _ in config.state()]
    modulated = {int(name.removeprefix("block_")) for name in names if name.startswith("block_")}
    by_tokens = set(choice if "text" in names else ())
    by_tokens |= {choice[block] for block in range(config.depth) if block not in modulated}
    if len(by_tokens) > 1:
        raise ValueError(
            "blocks that read the condition as tokens (cross-attention, in-context, text tokens) share one "
            "condition: choose the same for all"
        )
    shared = next(iter(by_tokens), 0)
    source = {f"block_{block}": choice[block] for block in modulated}
    source |= {"tokens": shared, "text": shared, "final": choice[-1], "layout": choice[0]}
    source |= {"output_mean": choice[0], "output_scales": choice[0], "first_frame": choice[0]}
    return tuple(source[name] for name in names)


def splice_states(
    config: BundleConfig, states: Sequence[Sequence[Array]], choice: Sequence[int]
) -> tuple[Array, ...]:
    """Return a condition state in which block i follows `states[choice[i]]`; all states are of one timestep.

    Raises:
        ValueError: as `state_sources`.
    """
    return tuple(states[source][k] for k, source in enumerate(state_sources(config, choice)))

"""Experts: the choice by hand, a token at a time; weights that fall to 0; balance and its figures."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ditserve.model.nets.dit import DiT
from ditserve.model.nets.experts import ExpertMlp, balance_loss, choose, observed_routers, router_figures
from ditserve.model.spec.dit_config import DiTConfig, Routing

Tiny = Callable[..., DiTConfig]
Make = Callable[..., DiT]

ROUTINGS: tuple[Routing, ...] = ("expert_choice", "token_choice")


def by_hand(mlp: ExpertMlp, h: Tensor) -> Tensor:
    """Return the output for one picture (T, D), a token and an expert at a time."""
    z = mlp.router(h)
    tokens, experts = z.shape
    capacity = tokens * mlp.top_k // experts
    if mlp.routing == "token_choice":
        capacity = math.floor(tokens * min(5 * mlp.top_k / (4 * experts), 1 - 1 / (4 * experts)))
        z = torch.stack([row - sorted(row.tolist())[-mlp.top_k - 1] for row in z]).clamp(min=0)
    out = torch.zeros_like(h) if mlp.shared is None else mlp.shared(h)
    for expert in range(experts):
        order = sorted(range(tokens), key=lambda token: -float(z[token, expert]))
        left = z[order[capacity], expert]
        for token in order[:capacity]:
            inner = mlp.fc1.weight[expert] @ h[token] + mlp.fc1.bias[expert]
            value = mlp.fc2.weight[expert] @ F.gelu(inner, approximate="tanh") + mlp.fc2.bias[expert]
            out[token] = out[token] + (z[token, expert] - left) * value
    return out


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("experts", "top_k", "shared"), [(4, 1, False), (5, 3, True), (2, 1, False)])
def test_experts_compute_what_a_loop_over_tokens_does(
    tiny: Tiny, network: Make, routing: Routing, experts: int, top_k: int, shared: bool
) -> None:
    config = tiny(experts=experts, top_k=top_k, routing=routing, shared_expert=shared)
    mlp = network(config).double().blocks[0].mlp
    assert isinstance(mlp, ExpertMlp)
    h = torch.randn(3, 12, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        together = mlp(h)
        for picture, out in zip(h, together, strict=True):
            assert torch.allclose(by_hand(mlp, picture), out, atol=1e-12)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_choice_that_changes_by_a_rounding_changes_nothing(routing: Routing) -> None:
    """Two tokens with equal scores at the edge of a choice: either may be taken."""
    z = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(0))
    taken = dense(z, routing)
    # From choice to choice the weights move as the scores do, and never by a jump.
    other = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    steps = 2000
    previous = taken
    for step in range(1, steps + 1):
        weights = dense(torch.lerp(z, other, step / steps), routing)
        assert (weights - previous).abs().max() < 3 * float((other - z).abs().max()) / steps
        previous = weights
    assert ((taken > 0) != (previous > 0)).any()


def dense(scores: Tensor, routing: Routing) -> Tensor:
    """Return the weight of every token for every expert, (N, T, E)."""
    weights, tokens = choose(scores, 1, routing)
    return torch.zeros_like(scores.transpose(1, 2)).scatter(2, tokens, weights).transpose(1, 2)


def test_experts_that_choose_have_equal_loads_and_a_crowd_of_tokens_is_cut() -> None:
    z = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(0))
    z[..., 0] += 10  # all tokens prefer the first expert
    by_experts, by_tokens = (dense(z, routing) > 0 for routing in ROUTINGS)
    assert by_experts.sum(1).tolist() == [[4, 4, 4, 4]] * 2
    assert by_tokens.sum(1).tolist() == [[5, 0, 0, 0]] * 2  # a quarter more than an equal share
    figures = router_figures([z], 1, top_k=1, routing="token_choice")
    assert figures == {"router_busiest": pytest.approx(4.0), "router_left_out": pytest.approx(11 / 16)}
    # Over two passes in which tokens prefer different experts the load is even.
    moved = z.roll(1, dims=2)
    assert router_figures([z, moved], 1, top_k=1, routing="token_choice")["router_busiest"] == 2.0
    assert router_figures([z, moved], 2, top_k=1, routing="token_choice")["router_busiest"] == 4.0
    assert router_figures([], 1, top_k=1, routing="token_choice") == {}


def test_the_balance_loss_is_1_for_even_loads_and_more_for_others() -> None:
    even = torch.eye(4).repeat(1, 4, 1)  # (1, 16, 4): every expert is preferred by four tokens
    assert float(balance_loss([even], 1)) == pytest.approx(1.0)
    crowd = torch.zeros(1, 16, 4)
    crowd[..., 2] = 20.0
    assert float(balance_loss([crowd], 1)) == pytest.approx(4.0, abs=1e-4)
    assert float(balance_loss([even, crowd], 1)) == pytest.approx(2.5, abs=1e-4)


def test_routers_are_observed_inside_the_context_alone(tiny: Tiny, network: Make) -> None:
    dit = network(tiny(experts=4))
    x, labels = torch.zeros(2, 3, 8, 8), torch.zeros(2, 2, dtype=torch.int64)
    with observed_routers(dit) as scores:
        dit(x, torch.zeros(2), labels)
    dit(x, torch.zeros(2), labels)
    assert [tuple(z.shape) for z in scores] == [(2, 16, 4)] * 3

"""A mixture of experts in place of the MLP of a block, and what its router does.

A router gives every token a score z for every expert, (N, T, E). An expert takes at most C tokens of a
picture and weighs its output for a token by how far the score stands above that of the first token it leaves:

    expert choice   w = z − (the (C + 1)-th score of the expert), C = ⌊T·k/E⌋
    token choice    z' = max(0, z − (the (k + 1)-th score of the token)), then so with C a quarter larger

With T = 64 tokens, E = 8 experts and k = 1, an expert takes 8 tokens by its own choice, and up to 10 if the
tokens choose. Every shape follows from T, so the graph is static, and a picture never depends on others in
its batch. A weight is 0 where the choice changes, so that a rounding cannot change a picture by a jump.
Sources: expert choice, Zhou et al., arXiv:2202.09368; weights that fall to 0 as in ReMoE, Wang et al.,
arXiv:2412.14711.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditserve.model.nets.layers import Mlp
from ditserve.model.spec.dit_config import DiTConfig, Routing


class ExpertLinear(nn.Module):
    """E linear maps side by side, (E, M, inputs) → (E, M, outputs)."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        limit = math.sqrt(6 / (inputs + outputs))
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs).uniform_(-limit, limit))
        self.bias = nn.Parameter(torch.zeros(experts, outputs))

    def forward(self, h: Tensor) -> Tensor:
        return torch.bmm(h, self.weight.transpose(1, 2)) + self.bias[:, None]


class ExpertMlp(nn.Module):
    """E MLPs and a router, (N, T, D) → (N, T, D); a shared expert takes every token besides."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        d, self.experts = config.hidden_size, config.experts
        self.top_k, self.routing = config.top_k, config.routing
        self.router = nn.Linear(d, self.experts)
        self.fc1 = ExpertLinear(self.experts, d, config.mlp_size)
        self.fc2 = ExpertLinear(self.experts, config.mlp_size, d)
        self.shared = Mlp(d, config.mlp_size) if config.shared_expert else None

    def forward(self, h: Tensor) -> Tensor:
        n, t, d = h.shape
        weights, tokens = choose(self.router(h), self.top_k, self.routing)  # 2 × (N, E, C)
        # Rows of all pictures one behind the other, so that an expert's weights are read once for all.
        rows = tokens + t * torch.arange(n, device=h.device)[:, None, None]  # (N, E, C)
        rows = rows.transpose(0, 1).flatten(1)  # (E, N·C)
        taken = h.flatten(0, 1)[rows.flatten()].unflatten(0, (self.experts, -1))  # (E, N·C, D)
        out = self.fc2(F.gelu(self.fc1(taken), approximate="tanh"))  # (E, N·C, D)
        out = out * weights.transpose(0, 1).flatten(1)[..., None].to(out.dtype)
        # Each expert writes into tokens of its own, because TensorRT adds nothing in a scatter.
        places = (rows + n * t * torch.arange(self.experts, device=h.device)[:, None]).flatten()
        spread = torch.zeros(self.experts * n * t, d, dtype=out.dtype, device=h.device)
        spread = spread.index_put((places,), out.flatten(0, 1)).unflatten(0, (self.experts, n, t))
        summed = spread.sum(0)  # (N, T, D)
        return summed if self.shared is None else cast(Tensor, summed + self.shared(h))


def choose(scores: Tensor, top_k: int, routing: Routing) -> tuple[Tensor, Tensor]:
    """Return the weights (N, E, C) and the numbers (N, E, C) int64 of the tokens that each expert takes.

    `scores` are (N, T, E). A weight of 0 stands for a token that is not taken after all.
    """
    experts, share = scores.shape[2], top_k
    if routing == "token_choice":
        edge = scores.topk(top_k + 1, dim=2).values[:, :, -1:]  # (N, T, 1)
        scores = F.relu(scores - edge)
        # A quarter more than equal shares, and at least one token less than all.
        share, experts = min(5 * top_k, 4 * experts - 1), 4 * experts
    capacity = scores.shape[1] * share // experts
    best, tokens = scores.transpose(1, 2).topk(capacity + 1, dim=2)  # 2 × (N, E, C + 1)
    return best[:, :, :-1] - best[:, :, -1:], tokens[:, :, :-1]


@contextmanager
def observed_routers(network: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the router scores (N, T, E) of every forward pass inside, shallow to deep."""
    scores: list[Tensor] = []

    def record(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        scores.append(output)

    layers = [module.router for module in network.modules() if isinstance(module, ExpertMlp)]
    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield scores
    finally:
        for handle in handles:
            handle.remove()


def balance_loss(scores: Sequence[Tensor], top_k: int) -> Tensor:
    """Return the mean over the layers of E · Σ_e f_e · P_e, () fp32: 1 if tokens spread evenly, at most E.

    f_e is the share of the choices of tokens that fell on expert e, P_e its mean probability. Source: Fedus
    et al., arXiv:2101.03961, eq. 4.
    """
    terms = [(preferred(z, top_k) * z.float().softmax(2).mean((0, 1))).sum() * z.shape[2] for z in scores]
    return torch.stack(terms).mean()


def preferred(scores: Tensor, top_k: int) -> Tensor:
    """Return the share (E,) fp32 of the choices of tokens that fall on each expert, for scores (N, T, E)."""
    chosen = scores.topk(top_k, dim=2).indices.flatten()
    return torch.bincount(chosen, minlength=scores.shape[2]).float() / len(chosen)


def router_figures(
    scores: Sequence[Tensor], layers: int, *, top_k: int, routing: Routing
) -> dict[str, float]:
    """Return how evenly tokens prefer experts, and the share of tokens that no expert takes, by name.

    `scores` are those of some passes through so many layers. "router_busiest" is the load of the most
    preferred expert of any layer, over all passes, relative to an equal load: 1 to E / k.
    """
    if not scores:
        return {}
    loads = [torch.stack([preferred(z, top_k) for z in scores[layer::layers]]) for layer in range(layers)]
    busiest = max(float(load.mean(0).max()) * load.shape[1] for load in loads)
    left = [_left_out(z, top_k, routing) for z in scores]
    return {"router_busiest": busiest, "router_left_out": sum(left) / len(left)}


def _left_out(scores: Tensor, top_k: int, routing: Routing) -> float:
    weights, tokens = choose(scores, top_k, routing)
    n, t, _ = scores.shape
    taken = torch.zeros(n, t, dtype=weights.dtype, device=scores.device)
    taken.scatter_add_(1, tokens.flatten(1), weights.flatten(1))
    return float((taken == 0).float().mean())

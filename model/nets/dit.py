"""The Diffusion Transformer: four kinds of block, and the network split into `modulate` and `backbone`.

    embedding = dit.embed(labels)                  labels (N, F) int64 → (N, D)
    state     = dit.modulate(timestep, embedding)  everything that depends on (timestep, condition) alone, and
    nothing else does output    = dit.backbone(x, state)             the per-pixel work

`forward(x, timestep, labels)` is these three in a row, to the last bit. Parameter names are those of the
published weights. Source: arXiv:2212.09748 §3.2, Figure 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditserve.model.nets.conditioner import ConditionEmbedder, LayoutPath
from ditserve.model.nets.layers import (
    Attention,
    CrossAttention,
    Mlp,
    PatchEmbed,
    SwiGlu,
    TimestepEmbedder,
    check_images,
    check_rows,
    check_state,
    layer_norm,
    modulate,
    positions,
    rotary_tables,
    unpatchify,
)
from ditserve.model.spec.dit_config import MODULATIONS, BlockKind, DiTConfig

Rotary = tuple[Tensor, Tensor] | None


class Block(nn.Module):
    """One transformer block; how the condition enters is its kind (`BlockKind`)."""

    def __init__(self, config: DiTConfig, kind: BlockKind) -> None:
        super().__init__()
        self.kind, self.mlp_norm_eps = kind, config.mlp_norm_eps
        d, width = config.hidden_size, config.heads_width
        self.attn = Attention(d, config.num_heads, width=width, qk_norm=config.qk_norm)
        self.mlp: nn.Module = (SwiGlu if config.swiglu else Mlp)(d, config.mlp_size)
        if kind == "cross_attention":
            self.cross = CrossAttention(d, config.num_heads, width=width)
        if MODULATIONS[kind]:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, MODULATIONS[kind] * d))

    def forward(self, h: Tensor, state: Tensor | None, rotary: Rotary = None) -> Tensor:
        """(N, T, D) → (N, T, D). `state`: modulation (N, 6 or 4, D), condition tokens (N, 2, D), or None
        (in-context).
        """
        if self.kind == "adaln_zero":
            parts = torch.split(cast(Tensor, state), 1, dim=1)
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts  # 6 × (N, 1, D)
            h = h + gate_a * self.attn(modulate(layer_norm(h), shift_a, scale_a), rotary)
            h = h + gate_m * self.mlp(modulate(layer_norm(h, self.mlp_norm_eps), shift_m, scale_m))
            return h
        if self.kind == "adaln":
            shift_a, scale_a, shift_m, scale_m = torch.split(cast(Tensor, state), 1, dim=1)  # 4 × (N, 1, D)
            h = h + self.attn(modulate(layer_norm(h), shift_a, scale_a), rotary)
            h = h + self.mlp(modulate(layer_norm(h, self.mlp_norm_eps), shift_m, scale_m))
            return h
        h = h + self.attn(layer_norm(h), rotary)
        if self.kind == "cross_attention":
            h = h + self.cross(layer_norm(h), cast(Tensor, state))
        return cast(Tensor, h + self.mlp(layer_norm(h, self.mlp_norm_eps)))


class FinalLayer(nn.Module):
    """LayerNorm, modulation where the blocks have it, linear map to the patch: (N, T, D) → (N, T, C·P·P).

    The published weights lay a patch out as (P, P, C). They are turned here, so that the much larger pixels need not be.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.channels = config.head_channels or config.out_channels
        self.linear = nn.Linear(config.hidden_size, config.patch_size**2 * self.channels)
        if config.adaptive_final:
            d = config.hidden_size
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d))

    def forward(self, h: Tensor, state: Tensor | None) -> Tensor:
        h = layer_norm(h)
        if state is not None:
            shift, scale = torch.split(state, 1, dim=1)  # 2 × (N, 1, D)
            h = modulate(h, shift, scale)
        return F.linear(h, self._channels_first(self.linear.weight), self._channels_first(self.linear.bias))

    def _channels_first(self, parameter: Tensor) -> Tensor:
        """Rows laid out (P·P, C) → (C, P·P)."""
        return cast(Tensor, parameter.unflatten(0, (-1, self.channels))).transpose(0, 1).flatten(0, 1)


class ConvHead(nn.Module):
    """Removes patch seams: h[:C] + Conv3×3(SiLU(Conv3×3([x, h]))), h unpatchified (N, head_channels, H, W)."""

    def __init__(self, in_channels: int, head_channels: int, width: int = 24) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.conv1 = nn.Conv2d(in_channels + head_channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, in_channels, 3, padding=1)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        detail: Tensor = self.conv2(F.silu(self.conv1(torch.cat([x, h], dim=1))))
        return h[:, : self.in_channels] + detail


class DiT(nn.Module):
    """A Diffusion Transformer over (N, C, H, W) images or latents, H and W any multiples of the patch."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.state_names = tuple(name for name, _ in config.state())
        d = config.hidden_size
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, d)
        self.t_embedder = TimestepEmbedder(d, shift=config.frequency_shift)
        self.y_embedder = ConditionEmbedder(
            config.classes, d, text_size=config.text_size, fusion=config.fusion
        )
        self.layout = LayoutPath(config.tokens, config.layout_rank, d) if config.layout_rank else None
        self.blocks = nn.ModuleList(Block(config, kind) for kind in config.plan)
        self.final_layer = FinalLayer(config)
        self.head = ConvHead(config.in_channels, config.head_channels) if config.head_channels else None
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", self._positions(*config.grid_size), persistent=False)  # (T, D)
        self.initialise()

    def initialise(self) -> None:
        """The published initialisation: xavier linears, N(0, 0.02) embeddings, zero modulation and output
        ("Zero").
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patch = self.x_embedder.proj
        nn.init.xavier_uniform_(patch.weight.view(patch.weight.shape[0], -1))
        nn.init.zeros_(cast(Tensor, patch.bias))
        for table in self.y_embedder.tables:
            nn.init.normal_(cast(nn.Embedding, table).weight, std=0.02)
        if self.y_embedder.text is not None:
            nn.init.normal_(self.y_embedder.no_text, std=0.02)
        for index in (0, 2):
            nn.init.normal_(cast(nn.Linear, self.t_embedder.mlp[index]).weight, std=0.02)
        for layer in self._zeroed():
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(cast(Tensor, layer.bias))

    def _zeroed(self) -> Iterator[nn.Linear | nn.Conv2d]:
        """The layers that start at zero: modulation, output, and what refines them."""
        yield self.final_layer.linear
        modulated = [block for block in self.blocks if MODULATIONS[cast(Block, block).kind]]
        for module in (*modulated, *([self.final_layer] if self.config.adaptive_final else [])):
            yield cast(nn.Linear, cast(nn.Sequential, module.adaLN_modulation)[1])
        if self.layout is not None:
            yield self.layout.coefficients
        if self.head is not None:
            yield self.head.conv2

    def embed(self, labels: Tensor, text: Tensor | None = None) -> Tensor:
        """Condition embedding (N, D) of labels (N, F) int64, each in 0..classes[k] (the last is null).

        `text` (N, text_size) are sentence embeddings, a row of zeros or None standing for no text.
        """
        return cast(Tensor, self.y_embedder(labels, text))

    def modulate(self, timestep: Tensor, embedding: Tensor) -> tuple[Tensor, ...]:
        """The condition state, in the order of `config.state()`: timestep (N,), embedding (N, D) → tensors
        (N, *shape).

        Raises:
            ValueError: not one timestep per embedding.
        """
        check_rows(timestep, embedding)
        t = self.t_embedder(timestep)  # (N, D)
        c = t + embedding  # (N, D)
        state: list[Tensor] = []
        for block in self.blocks:
            count = MODULATIONS[cast(Block, block).kind]
            if count:
                vectors = cast(nn.Sequential, block.adaLN_modulation)(c)
                state.append(cast(Tensor, vectors).reshape(c.shape[0], count, -1))  # (N, 6 or 4, D)
        if any(not MODULATIONS[kind] for kind in self.config.plan):
            state.append(torch.stack([t, embedding], dim=1))  # (N, 2, D)
        if self.config.adaptive_final:
            state.append(cast(Tensor, self.final_layer.adaLN_modulation(c)).reshape(c.shape[0], 2, -1))
        if self.layout is not None:
            state.append(self.layout(F.silu(c)))  # (N, T, D)
        return tuple(state)

    def backbone(self, x: Tensor, state: Sequence[Tensor]) -> Tensor:
        """(N, C, H, W) and the condition state → (N, C_out, H, W).

        Raises:
            ValueError: other channels, H or W is no multiple of the patch, a layout path trained for another size, or a
                state of another network.
        """
        rows, columns = self._grid(x)
        check_state(state, self.state_names)
        named = dict(zip(self.state_names, state, strict=True))
        h = self.x_embedder(x) + self.positions(rows, columns).to(x.dtype)  # (N, T, D)
        if self.layout is not None:
            h = h + named["layout"]
        if "in_context" in self.config.plan:
            h = torch.cat([named["tokens"], h], dim=1)  # (N, 2 + T, D)
        rotary = self.rotary(rows, columns, h)
        for index, block in enumerate(self.blocks):
            h = block(h, named.get(f"block_{index}", named.get("tokens")), rotary)
        h = h[:, -rows * columns :] if "in_context" in self.config.plan else h
        out = unpatchify(self.final_layer(h, named.get("final")), rows, columns, self.config.patch_size)
        return out if self.head is None else cast(Tensor, self.head(x, out))

    def forward(self, x: Tensor, timestep: Tensor, labels: Tensor, text: Tensor | None = None) -> Tensor:
        """(N, C, H, W), timesteps (N,), labels (N, F) → (N, C_out, H, W)."""
        return self.backbone(x, self.modulate(timestep, self.embed(labels, text)))

    def positions(self, rows: int, columns: int) -> Tensor:
        """(rows·columns, D): the trained table, or one interpolated into the base size's range for another
        size.
        """
        if (rows, columns) == self.config.grid_size:
            return self.pos_embed
        return self._positions(rows, columns).to(self.pos_embed.device)

    def rotary(self, rows: int, columns: int, h: Tensor) -> Rotary:
        """Rotary tables for the image tokens; condition tokens in front (in-context) are not turned."""
        if not self.config.rope:
            return None
        scale = self.config.position_scale(rows, columns)
        cos, sin = rotary_tables(self.config.head_size, rows, columns, scale)
        front = h.shape[1] - rows * columns
        cos, sin = F.pad(cos, (0, 0, front, 0), value=1.0), F.pad(sin, (0, 0, front, 0))
        return cos.to(h.device), sin.to(h.device)

    def _positions(self, rows: int, columns: int) -> Tensor:
        scale = self.config.position_scale(rows, columns)
        return positions(self.config.hidden_size, rows, columns, scale)

    def _grid(self, x: Tensor) -> tuple[int, int]:
        check_images(x, self.config.in_channels)
        patch = self.config.patch_size
        rows, columns = x.shape[2] // patch, x.shape[3] // patch
        if (rows * patch, columns * patch) != (x.shape[2], x.shape[3]):
            raise ValueError(
                f"size {x.shape[2]}x{x.shape[3]} is not a multiple of the patch {patch}: resize or crop"
            )
        if self.layout is not None and (rows, columns) != self.config.grid_size:
            raise ValueError(
                f"layout_rank fixes the size at {self.config.image_size}: train without it for others"
            )
        return rows, columns

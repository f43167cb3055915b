"""The Diffusion Transformer (DiT) in three calls, of which a server repeats only the last for every row:

    embedding = dit.embed(labels)                  # (N, F) int64 → (N, D)
    state     = dit.modulate(timestep, embedding)  # (N,), (N, D) → tensors to cache by both
    output    = dit.backbone(x, state)             # (N, C, H, W) → (N, C_out, H, W), the costly part

With three axes, `x` is a batch of clips or volumes (N, C, F, H, W), and so is the output. With `first_frame`
the condition may hold a clip's clean first frame: its tokens are added to those of every frame, place by
place, as Stable Video Diffusion (Blattmann et al., arXiv:2311.15127, §4.3) joins it to every noisy frame.

`dit(x, timestep, labels)` is these three calls and gives the same bits. N is the batch, F the number of label
factors, D the hidden size, C the channels. The condition enters through one of four kinds of block:
adaLN-Zero (the default), adaLN, cross-attention, or in context. Parameters are named as in the published
weights. Source: Peebles & Xie, arXiv:2212.09748, §3.2 and Figure 3.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from operator import floordiv, mul
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditserve.model.nets.blocks import Block, ConvHead, FinalLayer, Rotary, Text
from ditserve.model.nets.conditioner import ConditionalMean, ConditionEmbedder, LayoutPath
from ditserve.model.nets.hierarchy import TokenLevels, TokenSplit
from ditserve.model.nets.layers import (
    Grid,
    PatchEmbed,
    Spacing,
    TimestepEmbedder,
    along_rows,
    check_images,
    check_rows,
    check_state,
    sincos_positions,
    unpatchify,
)
from ditserve.model.nets.modulation import ConditionGate
from ditserve.model.nets.rotary import RotaryTables, RotaryTokens
from ditserve.model.nets.token_merging import squares_apart, squares_together
from ditserve.model.spec.dit_config import MODULATIONS, DiTConfig
from ditserve.model.spec.sizes import multiple_name, size_name

# The tensors of a condition state by their names in `config.state()`.
NamedState = Mapping[str, Tensor]


class DiT(nn.Module):
    """A Diffusion Transformer over images or latents (N, C, H, W); H and W are multiples of the patch."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config, self.symbolic_positions = config, False
        self.state_names = tuple(name for name, _ in config.state())
        self.level_plan, self.token_multiples = config.level_plan, config.token_multiples
        d = config.hidden_size
        self.x_embedder = PatchEmbed(config.patch, config.in_channels, d)
        self.t_embedder = TimestepEmbedder(d, shift=config.frequency_shift)
        self.y_embedder = ConditionEmbedder(
            config.classes,
            d,
            text_size=config.text_size,
            text_tokens=config.text_tokens,
            text_labels=config.text_labels,
            fusion=config.fusion,
            more=config.mean_size,
        )
        # A token that every text has, so that no text leaves attention something to attend to.
        self.first_token = nn.Parameter(torch.zeros(1, d)) if config.text_tokens else None
        self.layout = LayoutPath(config.tokens, config.layout_rank, d) if config.layout_rank else None
        self.conditional_mean = ConditionalMean(config) if config.mean_rank else None
        self.frame_embedder = (
            PatchEmbed(config.patch[-2:], config.in_channels, d) if config.first_frame else None
        )
        vectors = config.modulation_vectors(config.plan[0]) if config.shared_modulation else 0
        self.shared_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, vectors * d)) if vectors else None
        self.blocks = nn.ModuleList(map(Block, [config] * config.depth, config.plan, config.attention_plan))
        self.levels = TokenLevels(d, config.level_plan) if any(config.level_plan) else None
        self.final_layer = FinalLayer(config)
        self.head = (
            ConvHead(config.in_channels, config.head_channels, config.axes) if config.head_channels else None
        )
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", self._sincos(config.grid_size), persistent=False)  # (T, D)
        self.rotary_tables = RotaryTables(config.head_size, config.grid_size)
        self.initialise()

    def reset_positions(self) -> None:
        """Compute the position table, which is no weight and so is in no file."""
        self.pos_embed = self._sincos(self.config.grid_size)

    def initialise(self) -> None:
        """Initialise as published: Xavier for linear layers, N(0, 0.02²) for embeddings, and zeros.

        Modulation and output start at zero, so every block of adaLN-Zero starts as the identity.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for patch in [module.proj for module in self.modules() if isinstance(module, PatchEmbed)]:
            nn.init.xavier_uniform_(patch.weight.view(patch.weight.shape[0], -1))
            nn.init.zeros_(cast(Tensor, patch.bias))
        for table in self.y_embedder.tables:
            nn.init.normal_(cast(nn.Embedding, table).weight, std=0.02)
        if self.y_embedder.text is not None:
            nn.init.normal_(self.y_embedder.no_text, std=0.02)
        if self.first_token is not None:
            nn.init.normal_(self.first_token, std=0.02)
        for index in (0, 2):
            nn.init.normal_(cast(nn.Linear, self.t_embedder.mlp[index]).weight, std=0.02)
        for layer in self._zeroed():
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(cast(Tensor, layer.bias))

    def _zeroed(self) -> Iterator[nn.Linear | nn.Conv2d | nn.Conv3d]:
        """Yield the layers that start at zero: modulation, output, layout, frame, head, text and splits."""
        yield self.final_layer.linear
        owners = [block for block in self.blocks if MODULATIONS[cast(Block, block).kind]]
        maps = [self.shared_modulation] if self.shared_modulation else [b.adaLN_modulation for b in owners]
        maps += [self.final_layer.adaLN_modulation] if self.config.adaptive_final else []
        yield from (cast(nn.Linear, cast(nn.Sequential, modulation)[1]) for modulation in maps)
        if self.config.condition_gate:
            yield from (cast(ConditionGate, block.condition_gate).fc2 for block in self.blocks)
        if self.layout is not None:
            yield self.layout.coefficients
        if self.frame_embedder is not None:
            yield self.frame_embedder.proj
        if self.head is not None:
            yield self.head.conv2
        if self.config.text_tokens:
            yield from (cast(Block, block).cross.proj for block in self.blocks)
        if self.levels is not None:
            yield from (
                layer.linear for layer in self.levels.changes.values() if isinstance(layer, TokenSplit)
            )

    def embed(self, labels: Tensor, text: Tensor | None = None, first_frame: Tensor | None = None) -> Tensor:
        """Return the condition embedding (N, E) of labels (N, F) int64, column k in 0..classes[k].

        Label classes[k] is that factor's null class: "not given". `text` (N, text_width) holds sentence
        embeddings, and then the tokens of the sentences if the model has `text_tokens`; a row of zeros, or
        None for the whole batch, means no text. `first_frame` (N, C, H, W) holds clean frames, of clips that
        begin with them; zeros, or None, mean none.

        Raises:
            ValueError: labels, text or frames of another shape, a label out of range, or text or a frame for
                a model that takes none.
        """
        embedding = cast(Tensor, self.y_embedder(labels, text))
        if self.config.first_frame:
            embedding = F.pad(embedding, (0, math.prod(self.config.frame_shape)))
        return embedding if first_frame is None else self.tell_first_frame(embedding, first_frame)

    def tell_first_frame(self, embedding: Tensor, first_frame: Tensor) -> Tensor:
        """Return condition embeddings (N, E) with these first frames (N, C, H, W), or one (C, H, W) for all.

        Raises:
            ValueError: the network is told no first frame, or one of another shape.
        """
        shape = self.config.frame_shape
        if not self.config.first_frame or tuple(first_frame.shape[-3:]) != shape:
            takes = size_name(shape) if self.config.first_frame else "none: its first_frame is false"
            raise ValueError(f"this model takes a first frame of {takes}, not {size_name(first_frame.shape)}")
        told = first_frame.flatten(-3).expand(len(embedding), -1)  # (N, C·H·W)
        return torch.cat([embedding[:, : -told.shape[1]], told], dim=1)

    def modulate(self, timestep: Tensor, embedding: Tensor) -> tuple[Tensor, ...]:
        """Return the condition state of timesteps (N,) and condition embeddings (N, E).

        It has one tensor (N, *shape) for each entry of `config.state()`, in that order. It depends on nothing
        else, so rows with the same timestep and condition can share it.

        Raises:
            ValueError: not one timestep per embedding.
        """
        check_rows(timestep, embedding)
        d, of_mean = self.config.hidden_size, self.config.mean_size
        of_text, of_frame = d * self.config.text_tokens, math.prod(self.config.frame_shape)
        embedding, told, tokens, frame = torch.split(embedding, [d, of_mean, of_text, of_frame], dim=1)
        t = self.t_embedder(timestep)  # (N, D)
        c = t + embedding  # (N, D)
        source = c if self.shared_modulation is None else self.shared_modulation(c)
        state: list[Tensor] = []
        for block in self.blocks:
            count = self.config.modulation_vectors(cast(Block, block).kind)
            if count:
                vectors = cast(nn.Module, block.adaLN_modulation)(source)
                state.append(cast(Tensor, vectors).reshape(c.shape[0], count, -1))  # (N, vectors, D)
        if any(not MODULATIONS[kind] for kind in self.config.plan):
            state.append(torch.stack([t, embedding], dim=1))  # (N, 2, D)
        if self.config.adaptive_final:
            vectors = self.final_layer.adaLN_modulation(c)
            state.append(cast(Tensor, vectors).reshape(c.shape[0], 2, -1))  # (N, 2, D)
        mean = None if self.conditional_mean is None else self.conditional_mean(told, timestep)
        if self.config.has_layout:
            parts = [] if self.layout is None else [self.layout(F.silu(c))]
            parts += [] if mean is None else [mean[0]]
            state.append(cast(Tensor, sum(parts[1:], parts[0])))  # (N, T, D)
        if mean is not None:
            state += mean[1:]  # (N, C, H, W), (N, 2)
        if self.config.text_tokens:
            state.append(tokens.unflatten(1, (self.config.text_tokens, d)))  # (N, S, D)
        if self.frame_embedder is not None:
            given = (frame != 0).any(dim=1)[:, None, None]  # (N, 1, 1)
            patches = self.frame_embedder(frame.unflatten(1, self.config.frame_shape))  # (N, P, D)
            state.append(patches * given)
        return tuple(state)

    def backbone(self, x: Tensor, state: Sequence[Tensor]) -> Tensor:
        """Return the network's output (N, C_out, H, W) for `x` (N, C, H, W) and its condition state.

        Raises:
            ValueError: `x` has other channels, H or W is not a multiple of the patch size, the network has a
                layout path that was trained for another size, or `state` is another network's.
        """
        grid, named = self._given(x, state)
        h = self.enter(x, named, grid)
        return self.leave(x, self.run_blocks(h, named, grid), named, grid)

    def trunk(self, x: Tensor, state: Sequence[Tensor], blocks: int) -> Tensor:
        """Return what the first `blocks` blocks of `backbone` change of the tokens of `x`, (N, h, w, D)."""
        grid, named = self._given(x, state)
        h = self.enter(x, named, grid)
        change = self.run_blocks(h, named, grid, end=blocks) - h
        return change.reshape(-1, *grid, change.shape[2])

    def tail(self, x: Tensor, state: Sequence[Tensor], change: Tensor, blocks: int) -> Tensor:
        """Return the output of `backbone` where the first `blocks` blocks make this change (N, h, w, D)."""
        grid, named = self._given(x, state)
        h = self.enter(x, named, grid) + change.flatten(1, -2)
        return self.leave(x, self.run_blocks(h, named, grid, first=blocks), named, grid)

    def _given(self, x: Tensor, state: Sequence[Tensor]) -> tuple[Grid, NamedState]:
        """Return the grid of tokens of `x`, and the condition state by name, both checked."""
        grid = self._token_grid(x)
        check_state(state, self.state_names)
        return grid, dict(zip(self.state_names, state, strict=True))

    def enter(self, x: Tensor, named: NamedState, grid: Grid) -> Tensor:
        """Return the tokens (N, T, D) of `x`, with condition tokens in front of them if blocks have some."""
        h: Tensor = self.x_embedder(x) + self.positions(grid).to(x.dtype)  # (N, T, D)
        if self.config.has_layout:
            h = h + named["layout"]
        if self.config.first_frame:
            h = h + self._of_first_frame(named["first_frame"], grid)
        h = torch.cat([named["tokens"], h], dim=1) if "in_context" in self.config.plan else h
        return squares_apart(h, grid) if self.config.merge_tokens else h

    def run_blocks(
        self, h: Tensor, named: NamedState, grid: Grid, *, first: int = 0, end: int | None = None
    ) -> Tensor:
        """Return the tokens after all blocks or, without levels, after those from `first` to before `end`.

        Tokens are (N, T, D), before and after.
        """
        rotary = [self.rotary(grid, h, level) for level in range(1 + max(self.level_plan))]
        text = self._text(named["text"]) if self.config.text_tokens else None
        # The tokens of each level above the current one.
        skips: list[Tensor] = []
        plan = list(enumerate(zip(self.blocks, self.level_plan, strict=True)))
        for index, (block, level) in plan[first:end]:
            if self.levels is not None:
                h, grid = self.levels(h, grid, index, skips)
            h = block(h, named.get(f"block_{index}", named.get("tokens")), rotary[level], text, grid)
        return h if self.levels is None else self.levels(h, grid, len(self.blocks), skips)[0]

    def leave(self, x: Tensor, h: Tensor, named: NamedState, grid: Grid) -> Tensor:
        """Return the output (N, C_out, H, W) of the tokens after the last block."""
        h = squares_together(h, grid) if self.config.merge_tokens else h
        h = h[:, -math.prod(grid) :] if "in_context" in self.config.plan else h  # (N, T, D)
        out = unpatchify(self.final_layer(h, named.get("final")), grid, self.config.patch)
        # `out` is (N, C_out, H, W), or (N, head_channels, H, W) before the convolutional head.
        out = out if self.head is None else self.head(x, out)
        if self.conditional_mean is None:
            return cast(Tensor, out)
        of_x, of_blocks = (along_rows(column, x) for column in named["output_scales"].unbind(1))
        return named["output_mean"] + of_x * x + of_blocks * out

    def _of_first_frame(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Return the tokens (N, P, D) of the first frame for every frame of a grid, (N, T, D).

        On a grid of other rows and columns, each token is the nearest one of the trained grid.
        """
        own = self.config.grid_size[-2:]
        if self.symbolic_positions or grid[-2:] != own:
            planes = tokens.transpose(1, 2).unflatten(2, own)  # (N, D, h, w)
            tokens = F.interpolate(planes, grid[-2:]).flatten(2).transpose(1, 2)
        return tokens[:, None].expand(-1, grid[0], -1, -1).flatten(1, 2)

    def _text(self, tokens: Tensor) -> Text:
        """Return the tokens that blocks attend to, and the mask of those that are not padding."""
        first = cast(Tensor, self.first_token).to(tokens.dtype).expand(tokens.shape[0], 1, -1)
        tokens = torch.cat([first, tokens], dim=1)  # (N, 1 + S, D)
        return tokens, (tokens != 0).any(dim=2)[:, None, None, :]

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        labels: Tensor,
        text: Tensor | None = None,
        first_frame: Tensor | None = None,
    ) -> Tensor:
        """Return the output (N, C_out, H, W) for `x` (N, C, H, W), timesteps (N,) and labels (N, F)."""
        return self.backbone(x, self.modulate(timestep, self.embed(labels, text, first_frame)))

    def with_symbolic_positions(self) -> DiT:
        """Return this network, sharing its weights, for tracing a graph of any size.

        Its positions are always computed in the graph from the size of `x`. Otherwise a trace would look the
        positions of its example up in the trained table, and keep the example's spacing as a constant.
        """
        symbolic = copy.copy(self)
        symbolic.symbolic_positions = True
        return symbolic

    def compile_blocks(self, compiler: str = "inductor") -> None:
        """Compile the blocks, which share their code: one is compiled in a fraction of the time of all."""
        for block in self.blocks:
            block.compile(dynamic=True, backend=compiler)

    def uncompile_blocks(self) -> None:
        """Compute the blocks as they are written, after `compile_blocks`."""
        for block in self.blocks:
            block._compiled_call_impl = None

    def positions(self, grid: Grid) -> Tensor:
        """Return the position embedding (T, D) of a grid: the trained one, or an interpolated one."""
        if self.symbolic_positions:
            return self._sincos(grid)
        if grid == self.config.grid_size:
            return self.pos_embed
        return self._sincos(grid).to(self.pos_embed.device)

    def rotary(self, grid: Grid, h: Tensor, level: int = 0) -> Rotary:
        """Return the rotary tables for the tokens `h` (N, T, D) at a level, or None without RoPE.

        Condition tokens in front of the image tokens (in-context) are not rotated.
        """
        if not self.config.rope:
            return None
        tokens = RotaryTokens(grid, level, h.shape[1] - math.prod(grid), h.device)
        # A trace computes them, because it may be for other sizes than its example's.
        traced = self.symbolic_positions or torch.compiler.is_compiling()
        tables = self.rotary_tables.make if traced else self.rotary_tables.get
        return tables(tokens, self._spacing(grid))

    def _sincos(self, grid: Grid) -> Tensor:
        return sincos_positions(self.config.hidden_size, grid, self._spacing(grid))

    def _spacing(self, grid: Grid) -> Spacing:
        if not self.symbolic_positions:
            return self.config.position_scale(grid)
        return tuple(map(_symbolic_distance, self.config.base_grid, grid))

    def _token_grid(self, x: Tensor) -> Grid:
        config = self.config
        check_images(x, config.in_channels, config.axes)
        size = tuple(x.shape[2:])
        grid = tuple(map(floordiv, size, config.patch))
        if tuple(map(mul, grid, config.patch)) != size:
            raise ValueError(
                f"size {size_name(size)} is not a multiple of the patch {multiple_name(config.patch)}: "
                "resize or crop"
            )
        if any(count % part for count, part in zip(grid, self.token_multiples, strict=True) if part > 1):
            raise ValueError(
                f"size {size_name(size)} is not a multiple of {multiple_name(config.size_multiples)}, which "
                "the windows or levels of this network need: resize or crop"
            )
        if config.has_layout and grid != config.grid_size:
            field = "layout_rank" if config.layout_rank else "mean_rank"
            raise ValueError(f"{field} fixes the size at {config.image_size}: train without it for others")
        return grid


def _symbolic_distance(base: int, count: int) -> Tensor:
    """Return min(1, base / count) as a tensor (1,) that a trace follows."""
    # The last entry of `arange` is the count as a tensor; a plain number would be a constant in the graph.
    return torch.clamp(base / torch.arange(1, count + 1)[-1:], max=1.0)

"""The condition embedder, dropout of conditions for training, and new classes for fine-tuning.

Every condition is optional. "Not given" is the null class of a label factor, whose index is the number of
classes, and a text embedding of zeros.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditserve.model.nets.layers import PatchEmbed, along_rows
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.network_kinds import NetworkConfig

Config = TypeVar("Config", bound=NetworkConfig)


# The sharpness of what a text says of labels when pictures are drawn; in training it is 1. The mean of all
# classes that a text may mean is the best guess, but what is drawn of it is a blend of their drawings.
COMMITMENT = 4.0


class ConditionEmbedder(nn.Module):
    """The embedder of conditions: labels (N, F) int64 and texts (N, text_width) → (N, W) or (N, W + S·D).

    W is D, and after it the `more` numbers that are told in the same way to a part of the network of its own.

    Each label factor has a table whose last row is the null class. Text has a linear map, and a learned
    vector stands for no text. The parts are summed; `fusion` "mlp" adds a residual MLP over the sum.

    With `text_labels`, a text stands in for the labels that are not given: a factor's part is then the mean
    of its table's rows, the null class's too, weighted by the softmax of a linear map of the text, so that a
    text says what the labels have learned. The map of the text tells what the classes do not.

    A text is its embedding, of `text_size` numbers, and then as many for each of its S = `text_tokens`
    tokens. Tokens that are not there are zeros. Their maps follow the embedding, and are zeros again.
    """

    def __init__(
        self,
        classes: Sequence[int],
        hidden_size: int,
        *,
        text_size: int = 0,
        text_tokens: int = 0,
        text_labels: bool = False,
        fusion: str = "sum",
        more: int = 0,
    ) -> None:
        super().__init__()
        self.width, self.text_size, self.text_tokens = hidden_size + more, text_size, text_tokens
        width = self.width
        self.tables = nn.ModuleList(nn.Embedding(count + 1, width) for count in classes)
        self.text: nn.Linear | None = None
        if text_size:
            self.text = nn.Linear(text_size, width)
            self.no_text = nn.Parameter(torch.zeros(width))
        readers = [nn.Linear(text_size, count + 1) for count in classes] if text_labels else []
        self.readers = nn.ModuleList(readers)
        self.token = nn.Linear(text_size, hidden_size) if text_tokens else None
        self.fusion = (
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            if fusion == "mlp"
            else None
        )

    def forward(self, labels: Tensor, text: Tensor | None = None) -> Tensor:
        """Return the embeddings of labels (N, F) and text (N, text_width); None means no text.

        Raises:
            ValueError: labels are not (N, F) whole numbers in 0..classes, or text is not (N, text_width).
        """
        self._check_labels(labels)
        if self.token is None:
            return self._sum(labels, text)
        if text is None:
            text = torch.zeros(len(labels), self.text_width, device=labels.device)
        self._check_text(len(labels), text)
        tokens = text[:, self.text_size :].unflatten(1, (self.text_tokens, self.text_size))  # (N, S, size)
        given = (tokens != 0).any(dim=2, keepdim=True)  # (N, S, 1)
        mapped = self.token(tokens.to(self.token.weight.dtype)) * given  # (N, S, D)
        return torch.cat([self._sum(labels, text[:, : self.text_size]), mapped.flatten(1)], dim=1)

    @property
    def text_width(self) -> int:
        """The numbers of a text: its embedding's and its tokens'."""
        return self.text_size * (1 + self.text_tokens)

    def _sum(self, labels: Tensor, text: Tensor | None) -> Tensor:
        parts = [table(labels[:, k]) for k, table in enumerate(self.tables)]  # F × (N, W)
        if self.text is not None:
            parts.append(self._text(len(labels), text))
            if text is not None:
                for k in range(len(self.readers)):
                    parts[k] = self._read(k, parts[k], labels[:, k], text)
        elif text is not None:
            raise ValueError("this model takes no text: its text_size is 0")
        # An unconditional model has neither labels nor text.
        if not parts:
            return torch.zeros(len(labels), self.width, device=labels.device)
        total: Tensor = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        return total if self.fusion is None else total + self.fusion(total)

    def _check_labels(self, labels: Tensor) -> None:
        if labels.ndim != 2 or labels.shape[1] != len(self.tables) or labels.is_floating_point():
            raise ValueError(
                f"labels must be (N, {len(self.tables)}) whole numbers, "
                f"not {tuple(labels.shape)} {labels.dtype}"
            )
        # A trace has no values to look at. Elsewhere a bad label is refused here, because on the device it
        # would fail without a message.
        if torch.compiler.is_compiling() or labels.is_meta:
            return
        for factor, table in enumerate(self.tables):
            null, column = cast(nn.Embedding, table).num_embeddings - 1, labels[:, factor]
            outside = column[(column < 0) | (column > null)]
            if len(outside):
                raise ValueError(
                    f"label {outside[0].item()} of factor {factor} must be in 0..{null}, "
                    f"{null} standing for none"
                )

    def _check_text(self, rows: int, text: Tensor) -> None:
        if text.shape != (rows, self.text_width):
            raise ValueError(f"text must be ({rows}, {self.text_width}), not {tuple(text.shape)}")

    def _text(self, rows: int, text: Tensor | None) -> Tensor:
        assert self.text is not None
        if text is None:
            return self.no_text.expand(rows, -1)
        if self.token is None:
            self._check_text(rows, text)
        given = (text != 0).any(dim=1, keepdim=True)  # (N, 1)
        return torch.where(given, self.text(text.to(self.text.weight.dtype)), self.no_text)  # (N, W)

    def _read(self, factor: int, row: Tensor, label: Tensor, text: Tensor) -> Tensor:
        """Return the part (N, W) of a factor: its row where a label or no text is given, else the text's."""
        reader, table = cast(nn.Linear, self.readers[factor]), cast(nn.Embedding, self.tables[factor])
        logits = reader(text.to(reader.weight.dtype))  # (N, classes + 1)
        shares = (logits if self.training else COMMITMENT * logits).softmax(dim=1)
        stands_in = (text != 0).any(dim=1) & (label == table.num_embeddings - 1)  # (N,)
        return torch.where(stands_in[:, None], shares @ table.weight, row)


class LayoutPath(nn.Module):
    """The layout path: a bias for every token, computed from the condition, (N, D) → (N, T, D).

    bias[n, t] = Σ_r Linear(c)[n, t, r] · U[t, r], a sum of R = `rank` terms. adaLN alone gives all tokens the
    same modulation; without this bias, a small model needs tens of thousands of training steps before its
    pictures have a layout.
    """

    def __init__(self, tokens: int, rank: int, hidden_size: int) -> None:
        super().__init__()
        self.shape = (tokens, rank)
        self.coefficients = nn.Linear(hidden_size, tokens * rank)
        self.basis = nn.Parameter(torch.randn(tokens, rank, hidden_size) * rank**-0.5)

    def forward(self, c: Tensor) -> Tensor:
        weights = self.coefficients(c).reshape(-1, *self.shape).transpose(0, 1)  # (T, N, r)
        return torch.matmul(weights, self.basis).transpose(0, 1)  # (T, N, r)·(T, r, D) → (N, T, D)


# The rows of the table of a conditional mean's scales, for timesteps 0 to 1,000.
SCALE_ROWS = 33


def scale_shares(timestep: Tensor) -> Tensor:
    """Return the shares (N, rows) that the rows of a table of scales have at timesteps (N,)."""
    place = timestep.clamp(0, 1000) * ((SCALE_ROWS - 1) / 1000)
    return F.relu(1 - (place[:, None] - torch.arange(SCALE_ROWS, device=timestep.device)).abs())


class ConditionalMean(nn.Module):
    """The mean picture that a condition tells, as tokens beside those of the noisy one: (N, M) → (N, T, D).

    mean = Σ_m gate_m · (offset_m + Σ_r code_r · basis_mr), where gates and codes are a condition's own M
    numbers. A gate and its map are, for instance, a drawing style and what the codes look like in it. A
    denoiser that is given the mean of its condition (as in Grad-TTS, Popov et al., arXiv:2105.06337) need not
    learn by gradient descent what each class looks like, which is most of what it predicts at high noise. The
    mean is part of the condition state, so a step does not pay for it.

    The blocks then learn what is left: the output is a(t) · mean + b(t) · x + c(t) · theirs, where the three
    are a table over timesteps, linear between its rows (as c_skip and c_out of Karras et al.,
    arXiv:2206.00364, §5, which are about a mean of zero). The table and the basis are measured
    (`model.train.condition_start`), not learned by gradient descent.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.picture, self.maps = (config.in_channels, *config.image_size), config.mean_maps
        # The offset of each map, and then its `mean_rank` pictures.
        basis = torch.zeros(config.mean_maps, 1 + config.mean_rank, math.prod(self.picture))
        self.basis = nn.Parameter(basis, requires_grad=False)
        # The blocks' output alone, until a run has measured what suits it.
        scales = torch.tensor([0.0, 0.0, 1.0]).repeat(SCALE_ROWS, 1)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.embedder = PatchEmbed(config.patch, config.in_channels, config.hidden_size)
        # Rows of the passes inside `means_of_others`.
        self.hidden: Tensor | None = None

    def forward(self, told: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tokens (N, T, D) of the mean, a · mean (N, C, H, W), and b and c (N, 2)."""
        mean, scales = self.mean(told), scale_shares(timestep) @ self.scales  # (N, 3)
        return self.embedder(mean), along_rows(scales[:, 0], mean) * mean, scales[:, 1:]

    def mean(self, told: Tensor) -> Tensor:
        """Return the mean pictures (N, C, H, W) of what conditions tell of them (N, M)."""
        if self.hidden is not None:
            own = told[:, : self.maps]
            others = (own.sum(1, keepdim=True) - own) / (self.maps - 1)
            told = torch.cat([torch.where(self.hidden[:, None], others, own), told[:, self.maps :]], 1)
        gates, codes = told[:, : self.maps], F.pad(told[:, self.maps :], (1, 0), value=1.0)
        flat = torch.matmul((gates[:, :, None] * codes[:, None]).flatten(1), self.basis.flatten(0, 1))
        return flat.reshape(-1, *self.picture)


@contextmanager
def means_of_others(network: nn.Module, rows: Tensor | None) -> Iterator[None]:
    """Give the `rows` (N,) bool of passes inside the mean of the maps that their condition does not choose.

    So a row is told of its class only what its pictures in other styles tell, as of a pair that no picture
    shows. None: no row.
    """
    means = [module for module in network.modules() if isinstance(module, ConditionalMean)]
    for mean in means:
        mean.hidden = rows
    try:
        yield
    finally:
        for mean in means:
            mean.hidden = None


def embedding_penalty(embedding: Tensor) -> Tensor:
    """Return the mean squared length of condition embeddings (N, D), a scalar fp32: their L2 penalty."""
    return embedding.float().square().sum(1).mean()


def null_labels(config: NetworkConfig, batch: int, device: torch.device | None = None) -> Tensor:
    """Return labels (batch, F) int64 with every factor at its null class."""
    return torch.tensor(config.classes, dtype=torch.int64, device=device).expand(batch, -1)


def drop_labels(
    labels: Tensor, config: NetworkConfig, rates: Sequence[float], generator: torch.Generator | None = None
) -> Tensor:
    """Replace each factor by its null class, independently and with its own rate: (N, F) → (N, F).

    The rate of the DiT paper is 0.1.

    Raises:
        ValueError: not one rate per factor, or a rate outside 0..1.
    """
    if len(rates) != len(config.classes) or not all(0 <= rate <= 1 for rate in rates):
        raise ValueError(f"label dropout needs {len(config.classes)} rates in 0..1, not {tuple(rates)}")
    chance = torch.rand(labels.shape, generator=generator, device=labels.device)
    dropped = chance < torch.tensor(list(rates), device=labels.device)
    return torch.where(dropped, null_labels(config, len(labels), labels.device), labels)


def drop_text(text: Tensor, rate: float, generator: torch.Generator | None = None) -> Tensor:
    """Replace text embeddings (N, text_size) by zeros ("not given"), each row with probability `rate`.

    Raises:
        ValueError: a rate outside 0..1.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"text dropout must be in 0..1, not {rate}")
    kept = torch.rand((len(text), 1), generator=generator, device=text.device) >= rate
    return text * kept


def match_classes(old: Sequence[str], new: Sequence[str]) -> list[int | None]:
    """Return for every new class the index of the old class of that name, or None, for `resize_classes`."""
    index = {name: k for k, name in enumerate(old)}
    return [index.get(name) for name in new]


def resize_classes(
    weights: Mapping[str, Tensor], config: Config, factor: int, keep: Sequence[int | None]
) -> tuple[dict[str, Tensor], Config]:
    """Return weights and configuration with other classes for one label factor, to fine-tune from.

    New class k starts as old class `keep[k]`, or as the null class where `keep[k]` is None, because a class
    that the model has not seen is one not given. The null class stays last. With 3 old classes, `keep`
    (2, None) makes a table of the old rows 2, 3 and 3: the old class 2, a new class, and the null class.
    What a text says of the factor's classes goes with them. Everything else is unchanged.

    Raises:
        ValueError: no such factor, no class left, or an old index out of range.
    """
    if not 0 <= factor < len(config.classes):
        raise ValueError(f"factor must be in 0..{len(config.classes) - 1}, not {factor}")
    count = config.classes[factor]
    wrong = [k for k in keep if k is not None and not 0 <= k < count]
    if wrong or not keep:
        raise ValueError(f"keep must name at least one class, each None or in 0..{count - 1}, not {wrong}")
    rows = torch.tensor([count if k is None else k for k in (*keep, None)])
    classes = (*config.classes[:factor], len(keep), *config.classes[factor + 1 :])
    chosen = {key: weights[key][rows.to(weights[key].device)] for key in class_tensors(factor, weights)}
    return {**weights, **chosen}, replace(config, classes=classes)


def class_tensors(factor: int, names: Container[str]) -> list[str]:
    """Return those of the weights' names that have a row for each class of a factor, null too."""
    kinds = ("tables.{}.weight", "readers.{}.weight", "readers.{}.bias")
    return [name for kind in kinds if (name := f"y_embedder.{kind.format(factor)}") in names]

"""The captions of examples as a network takes them: a wording is drawn for each step, and encoded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ditserve.model.nets.text import open_encoder

Floats = npt.NDArray[np.float32]


def wordings_of(caption: str) -> tuple[list[str], list[str]]:
    """Return the wordings of a caption, a line each, and those after an empty line, kept from training."""
    lines = [line.strip() for line in caption.splitlines()]
    end = lines.index("", 1) if "" in lines[1:] else len(lines)
    return [line for line in lines[:end] if line] or [""], [line for line in lines[end:] if line]


class Texts:
    """The captions of N examples, encoded. Each line of a caption is a wording of it.

    Lines after an empty one are kept from training: `draw(..., unseen=True)` draws from them.

    A text is `width` numbers: its embedding, of `size` numbers, and then as many for each of its `tokens`
    tokens, with zeros for tokens that it does not have. Several threads may call this at once.

    Raises:
        TextError: the encoder cannot be opened, or has no tokens of that size.
    """

    def __init__(self, captions: Sequence[str], encoder: str, tokens: int = 0) -> None:
        split = [wordings_of(caption) for caption in captions]
        self.wordings, self.unseen = [seen for seen, _ in split], [unseen for _, unseen in split]
        self.encoder, self.tokens = open_encoder(encoder, tokens), tokens
        self.size = self.encoder.size
        self.width = self.size * (1 + tokens)
        self._encoded: dict[str, Floats] = {}
        if not tokens:
            # Without tokens all fit in memory.
            distinct = sorted({wording for lines in (*self.wordings, *self.unseen) for wording in lines})
            self._encoded.update(zip(distinct, self.encoder.encode(distinct), strict=True))

    def draw(
        self, index: npt.NDArray[np.int64], rng: np.random.Generator | None = None, *, unseen: bool = False
    ) -> Floats:
        """Return texts of the examples `index` (n,), float32 (n, width).

        `rng` draws among the wordings of those that have several; without it the first is taken. Those with
        tokens are encoded together, so their last bits are a function of all of `index`.

        Raises:
            IndexError: `unseen`, and an example has no wording that is kept from training.
        """
        lines = self.unseen if unseen else self.wordings
        wordings = [_wording(lines[int(row)], rng) for row in index]
        if self._encoded:
            return np.stack([self._encoded[wording] for wording in wordings])
        return self.encoder.encode(wordings)


def _wording(lines: Sequence[str], rng: np.random.Generator | None) -> str:
    return lines[0] if rng is None or len(lines) == 1 else lines[int(rng.integers(len(lines)))]

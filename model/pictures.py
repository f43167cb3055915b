"""Labelled pictures for training, held in memory as uint8, in an order that depends only on (seed, step)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from model.bundle import Factor


class DataError(Exception):
    """Data that cannot be trained on; the message is one sentence naming the file or field."""


@dataclass(frozen=True, slots=True)
class Pictures:
    """`images` uint8 (N, H, W, 3); `labels` int64 (N, F), one column per factor; `held_out` bool (N,) kept from training."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    factors: tuple[Factor, ...]
    held_out: npt.NDArray[np.bool_]

    @property
    def size(self) -> tuple[int, int]:
        return self.images.shape[1], self.images.shape[2]

    @property
    def training(self) -> npt.NDArray[np.int64]:
        """Indices of the pictures that may be trained on."""
        return np.flatnonzero(~self.held_out)


def load_npz(
    path: str | Path, *, groups: Sequence[str] = (), names: Sequence[str] = (), hold_out: float = 0.0
) -> Pictures:
    """Pictures from an array file: `x` uint8 (N, H, W, 3), `y` name index, `names`; optionally `s`, `styles` and `groups` (per name).

    With styles, only names drawn in every style are kept, so that the two factors cross. `groups` and `names` select which
    names (their union; empty means all). `hold_out` is the fraction of (name, style) pairs kept from training: a known name in a
    known style never seen together. The choice depends on the pair's text alone, so it is the same for every selection.

    Raises:
        DataError: the file is missing or lacks a field, a name or group is unknown, or fewer than two classes remain.
    """
    file = Path(path)
    drawn = _read(file)
    for wanted, known, what in ((names, drawn.names, "name"), (groups, drawn.groups, "group")):
        unknown = sorted(set(wanted) - set(known))
        if unknown:
            raise DataError(f"{file} has no {what} {unknown[0]!r}")
    count = np.bincount(drawn.y, minlength=len(drawn.names))
    chosen = [
        k
        for k, (name, group) in enumerate(zip(drawn.names, drawn.groups, strict=True))
        if count[k] >= max(1, len(drawn.styles))
        and (not (groups or names) or group in groups or name in names)
    ]
    if len(chosen) < 2:
        raise DataError(f"{file}: {len(chosen)} class remains after selection; training needs at least 2")
    index = np.full(len(drawn.names), -1)
    index[chosen] = np.arange(len(chosen))
    keep = index[drawn.y] >= 0
    factors = [Factor(name="label", classes=tuple(drawn.names[k] for k in chosen))]
    columns = [index[drawn.y[keep]]]
    if drawn.styles:
        factors.append(Factor(name="style", classes=tuple(drawn.styles)))
        columns.append(drawn.s[keep])
    labels = np.stack(columns, axis=1)
    return Pictures(drawn.x[keep], labels, tuple(factors), _held_out(labels, factors, hold_out))


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A whole array file: `groups` is per name, `s` all zero and `styles` empty where there are none."""

    x: npt.NDArray[np.uint8]
    y: npt.NDArray[np.int64]
    s: npt.NDArray[np.int64]
    names: list[str]
    groups: list[str]
    styles: list[str]


def _read(file: Path) -> _Drawn:
    if not file.is_file():
        raise DataError(f"{file} does not exist: pass an .npz with arrays x, y and names")
    with np.load(file, allow_pickle=False) as arrays:
        missing = {"x", "y", "names"} - set(arrays.files)
        if missing:
            raise DataError(
                f"{file} lacks the array {sorted(missing)[0]!r}: it needs x (uint8 N,H,W,3), y and names"
            )
        x, y, names = arrays["x"], arrays["y"].astype(np.int64), [str(name) for name in arrays["names"]]
        styles = [str(style) for style in arrays["styles"]] if "styles" in arrays else []
        s = arrays["s"].astype(np.int64) if styles else np.zeros_like(y)
        groups = [str(group) for group in arrays["groups"]] if "groups" in arrays else [""] * len(names)
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3:
        raise DataError(f"{file}: x must be uint8 (N, H, W, 3), not {x.dtype} {x.shape}")
    return _Drawn(x, y, s, names, groups, styles)


def _held_out(
    labels: npt.NDArray[np.int64], factors: Sequence[Factor], share: float
) -> npt.NDArray[np.bool_]:
    """Which pictures are kept from training, (N,): about `share` of the pairs, chosen by their text alone."""
    names, styles = factors[0].classes, factors[1].classes if len(factors) > 1 else ()
    pairs = [f"{names[row[0]]}/{styles[row[1]] if styles else ''}" for row in labels]
    return np.array([zlib.crc32(pair.encode()) % 10_000 < share * 10_000 for pair in pairs])


def batch_indices(count: int, batch: int, step: int, seed: int) -> npt.NDArray[np.int64]:
    """Positions (batch,) in 0..count of global step `step`: consecutive pieces of one permutation per epoch.

    A function of its arguments alone, so a resumed run continues exactly where it stopped.
    """
    out: list[npt.NDArray[np.int64]] = []
    start, needed = step * batch, batch
    while needed:
        epoch, offset = divmod(start, count)
        order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)
        piece = order[offset : offset + needed]
        out.append(piece)
        start, needed = start + len(piece), needed - len(piece)
    return np.concatenate(out)

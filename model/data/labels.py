"""What the pictures of a data set show: names, styles and captions, and the choice among them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ditserve.model.data.examples import DataError, Examples
from ditserve.model.spec.bundle import Factor


@dataclass(frozen=True, slots=True, eq=False)
class Catalogue:
    """What each of a source's N pictures shows.

    `y` int64 (N,) counts in `names` and `s` int64 (N,) in `styles`; without names or styles they are zero. `groups` is empty or
    tells each name's group; `captions` is empty or holds N sentences.
    """

    y: npt.NDArray[np.int64]
    names: tuple[str, ...]
    s: npt.NDArray[np.int64]
    styles: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()

    def take(self, index: npt.NDArray[np.int64]) -> Catalogue:
        """The same of some of the pictures."""
        captions = tuple(self.captions[k] for k in index) if self.captions else ()
        return replace(self, y=self.y[index], s=self.s[index], captions=captions)


def select(
    catalogue: Catalogue,
    source: Path,
    *,
    groups: Sequence[str] = (),
    names: Sequence[str] = (),
    hold_out: float = 0.0,
    captioned: bool = False,
) -> Examples:
    """The pictures of some groups and names (their union; all when both are empty), with labels counted anew.

    With styles, only names drawn in every style are kept, so that the two factors cross. `hold_out` is the share kept from
    training, see `_held_out`. Pictures that are `captioned` need no classes. `source` is named in errors.

    Raises:
        DataError: a label out of range, an unknown name or group, fewer than two classes, nothing to train on, or no captions.
    """
    check(catalogue, source)
    for wanted, known, what in ((names, catalogue.names, "name"), (groups, catalogue.groups, "group")):
        unknown = sorted(set(wanted) - set(known))
        if unknown:
            raise DataError(f"{source} has no {what} {unknown[0]!r}")
    classes = _chosen(catalogue, groups, names)
    if len(classes) < 2 and not captioned:
        raise DataError(
            f"{source}: {len(classes)} {'class remains' if len(classes) == 1 else 'classes remain'} after selection; training "
            "needs at least 2, or captions and the field text"
        )
    index = np.full(len(catalogue.names), -1) if catalogue.names else np.zeros(1, int)
    index[classes] = np.arange(len(classes))
    rows = np.flatnonzero(index[catalogue.y] >= 0)
    factors, columns = [], []
    if len(classes) >= 2:
        factors.append(Factor(name="label", classes=tuple(catalogue.names[k] for k in classes)))
        columns.append(index[catalogue.y[rows]])
    if catalogue.styles:
        factors.append(Factor(name="style", classes=catalogue.styles))
        columns.append(catalogue.s[rows])
    held_out = _held_out(catalogue, rows, hold_out)
    if held_out.all():
        raise DataError(f"{source}: no picture remains to train on; choose more names or a smaller hold_out")
    values = np.stack(columns, axis=1) if columns else np.zeros((len(rows), 0), np.int64)
    return Examples(
        rows=rows,
        labels=values,
        factors=tuple(factors),
        held_out=held_out,
        captions=_captions(catalogue, source, rows) if captioned else (),
    )


def check(catalogue: Catalogue, source: Path) -> None:
    """Refuse labels that are out of range.

    Raises:
        DataError: naming the first such picture.
    """
    for column, classes, what in (
        (catalogue.y, catalogue.names, "name"),
        (catalogue.s, catalogue.styles, "style"),
    ):
        wrong = np.flatnonzero((column < 0) | (column >= max(1, len(classes))))
        if len(wrong):
            raise DataError(
                f"{source}: picture {wrong[0]} has {what} {column[wrong[0]]}, but there are only {len(classes)} {what}s"
            )


def _chosen(catalogue: Catalogue, groups: Sequence[str], names: Sequence[str]) -> list[int]:
    drawn = np.zeros((len(catalogue.names), max(1, len(catalogue.styles))), bool)
    if catalogue.names:
        drawn[catalogue.y, catalogue.s] = True
    everything = not (groups or names)
    group_of = catalogue.groups or ("",) * len(catalogue.names)
    return [
        k
        for k, (name, group) in enumerate(zip(catalogue.names, group_of, strict=True))
        if drawn[k].all() and (everything or group in groups or name in names)
    ]


def _held_out(catalogue: Catalogue, rows: npt.NDArray[np.int64], share: float) -> npt.NDArray[np.bool_]:
    """Which pictures are kept from training, (n,): about `share` of the (name, style) pairs, so that composition can be measured.

    Without styles, of each name's pictures but its first, so that no class is left without any. The choice depends on the
    pair's text, or the name and the picture's number in it, alone: it is the same for every selection.
    """
    texts = []
    seen: dict[int, int] = {}
    for row in rows:
        y, s = int(catalogue.y[row]), int(catalogue.s[row])
        name = catalogue.names[y] if catalogue.names else ""
        number = seen[y] = seen.get(y, -1) + 1
        texts.append(
            f"{name}/{catalogue.styles[s]}" if catalogue.styles else f"{name}/{number}" if number else ""
        )
    return np.array(
        [bool(text) and zlib.crc32(text.encode()) % 10_000 < share * 10_000 for text in texts], bool
    )


def _captions(catalogue: Catalogue, source: Path, rows: npt.NDArray[np.int64]) -> tuple[str, ...]:
    captions = catalogue.captions or ("",) * len(catalogue.y)
    for row in rows:
        if not captions[row]:
            raise DataError(f"{source}: picture {row} has no caption, and the field text asks for captions")
    return tuple(captions[row] for row in rows)

"""Labels of pictures: the names, styles and captions of a source, and the choice among them."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from ditserve.model.data.examples import DataError, Examples
from ditserve.model.spec.errors import wrong_field
from ditserve.model.spec.manifest import Factor

REASONS = 12  # that are listed


@dataclass(frozen=True, slots=True, eq=False)
class Catalogue:
    """The labels of a source's N pictures.

    `y` int64 (N,) is an index into `names` and `s` int64 (N,) into `styles`; both are zero where
    there are no names or styles. `groups` is empty or holds the group of each name. `captions` is
    empty or holds N sentences.
    """

    y: npt.NDArray[np.int64]
    names: tuple[str, ...]
    s: npt.NDArray[np.int64]
    styles: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()

    def take(self, index: npt.NDArray[np.int64]) -> Catalogue:
        """Return the labels of the pictures at `index` (n,)."""
        captions = tuple(self.captions[k] for k in index) if self.captions else ()
        return replace(self, y=self.y[index], s=self.s[index], captions=captions)


@dataclass(frozen=True, slots=True, eq=False)
class LeftOut:
    """The pictures that a source holds and does not use: `counts` by reason, and `remarks` on the reading."""

    counts: Counter[str] = field(default_factory=Counter)
    remarks: tuple[str, ...] = ()

    def __or__(self, counts: Mapping[str, int]) -> LeftOut:
        """Return this with further counts."""
        return replace(self, counts=self.counts + Counter(counts))

    def lines(self) -> list[str]:
        """Return a sentence for every reason, the most frequent first, and for every remark."""
        ranked = [(count, reason) for reason, count in self.counts.most_common() if count]
        lines = [f"{count:,} left out: {reason}" for count, reason in ranked[:REASONS]]
        if rest := sum(count for count, _ in ranked[REASONS:]):
            lines.append(f"{rest:,} left out for {len(ranked) - REASONS} other reasons")
        return [*lines, *self.remarks]

    def suffix(self) -> str:
        """Return the end of a sentence on a source without pictures."""
        return "".join(f"; {line}" for line in self.lines())


def select_examples(
    catalogue: Catalogue,
    source: Path,
    *,
    groups: Sequence[str] = (),
    names: Sequence[str] = (),
    hold_out: float = 0.0,
    crossed: bool = True,
    captioned: bool = False,
    left_out: LeftOut = LeftOut(),
) -> Examples:
    """Return the pictures of some groups and names, with classes numbered anew.

    `groups` and `names` select their union; if both are empty, everything. With `crossed`, only
    names drawn in every style are kept, so that the two factors cross. `hold_out` is the share kept
    from training, see `_held_out`. With `captioned`, every picture needs a caption. A single class is no
    factor: there is nothing to choose. Errors name `source`.

    Raises:
        DataError: a label is out of range, a name or group is unknown, a caption is missing, or nothing
            remains to train on.
    """
    check_labels(catalogue, source)
    for wanted, known, kind in ((names, catalogue.names, "name"), (groups, catalogue.groups, "group")):
        unknown = sorted(set(wanted) - set(known))
        if unknown:
            raise DataError(f"{source} has no {kind} {unknown[0]!r}")
    classes = _select_classes(catalogue, groups, names, crossed=crossed)
    if catalogue.names and not classes:
        raise DataError(f"{source}: no class remains: none of those selected is there in every style")
    # Old class → new class, −1 for classes left out. A source without names has one class, 0.
    renumbered = np.full(len(catalogue.names), -1) if catalogue.names else np.zeros(1, int)
    renumbered[classes] = np.arange(len(classes))
    rows = np.flatnonzero(renumbered[catalogue.y] >= 0)
    factors, columns = [], []
    if len(classes) >= 2:
        factors.append(_factor(source, "label", [catalogue.names[k] for k in classes]))
        columns.append(renumbered[catalogue.y[rows]])
    if catalogue.styles:
        factors.append(_factor(source, "style", catalogue.styles))
        columns.append(catalogue.s[rows])
    held_out = _held_out(catalogue, rows, hold_out)
    if held_out.all():
        raise DataError(f"{source}: no picture remains to train on; choose more names or a smaller hold_out")
    labels = np.stack(columns, axis=1) if columns else np.zeros((len(rows), 0), np.int64)
    return Examples(
        rows=rows,
        labels=labels,
        factors=tuple(factors),
        held_out=held_out,
        captions=_captions(catalogue, source, rows) if captioned else (),
        left_out=tuple((left_out | _unselected(catalogue, renumbered)).lines()),
    )


def _unselected(catalogue: Catalogue, renumbered: npt.NDArray[np.int64]) -> dict[str, int]:
    """Count the pictures of classes that were not selected (−1 in `renumbered`), by reason."""
    out = renumbered[catalogue.y] < 0
    if not catalogue.styles:
        return {"of classes that were not selected": int(out.sum())}
    drawn = np.zeros((len(catalogue.names), len(catalogue.styles)), bool)
    drawn[catalogue.y, catalogue.s] = True
    crossed = np.asarray(drawn.all(1))[catalogue.y]
    return {
        "of classes that were not selected": int((out & crossed).sum()),
        "of classes that are not there in every style": int((out & ~crossed).sum()),
    }


def check_labels(catalogue: Catalogue, source: Path) -> None:
    """Refuse labels that are out of range.

    Raises:
        DataError: a label is out of range; it names the first such picture.
    """
    for column, classes, kind in (
        (catalogue.y, catalogue.names, "name"),
        (catalogue.s, catalogue.styles, "style"),
    ):
        wrong = np.flatnonzero((column < 0) | (column >= max(1, len(classes))))
        if len(wrong):
            raise DataError(
                f"{source}: picture {wrong[0]} has {kind} {column[wrong[0]]}, "
                f"but there are only {len(classes)} {kind}s"
            )


def _factor(source: Path, name: str, classes: Sequence[str]) -> Factor:
    """Return a factor of the names in a data set, any of which a bundle must be able to hold.

    Raises:
        DataError: a name is empty, too long, or no Unicode, as a folder's may be.
    """
    try:
        return Factor(name=name, classes=tuple(classes))
    except ValidationError as error:
        field, _ = wrong_field(error)
        number = field.rpartition(".")[2]
        wrong = f"{name} {classes[int(number)]!a}" if number.isdigit() else name
        raise DataError(
            f"{source}: {wrong} cannot be the name of a class: take 1 to 1,000 characters of Unicode"
        ) from None


def _select_classes(
    catalogue: Catalogue, groups: Sequence[str], names: Sequence[str], *, crossed: bool
) -> list[int]:
    drawn = np.zeros((len(catalogue.names), max(1, len(catalogue.styles))), bool)
    if catalogue.names:
        drawn[catalogue.y, catalogue.s] = True
    everything = not (groups or names)
    group_of = catalogue.groups or ("",) * len(catalogue.names)
    return [
        k
        for k, (name, group) in enumerate(zip(catalogue.names, group_of, strict=True))
        if (drawn[k].all() if crossed else drawn[k].any())
        and (everything or group in groups or name in names)
    ]


def _held_out(catalogue: Catalogue, rows: npt.NDArray[np.int64], share: float) -> npt.NDArray[np.bool_]:
    """Choose the pictures that are kept from training, bool (n,): about `share` of them.

    If there are styles, whole (name, style) pairs are held out, so that composition can be measured. Without
    styles, pictures are held out, but never the first of a name, so that every class keeps one. The choice is
    a hash of the text "name/style" or "name/number", so it is the same for every selection.
    """
    keys = []
    last_number: dict[int, int] = {}
    for row in rows:
        y, s = int(catalogue.y[row]), int(catalogue.s[row])
        name = catalogue.names[y] if catalogue.names else ""
        number = last_number[y] = last_number.get(y, -1) + 1
        if catalogue.styles:
            keys.append(f"{name}/{catalogue.styles[s]}")
        else:
            keys.append(f"{name}/{number}" if number else "")
    return np.array([bool(key) and zlib.crc32(key.encode()) % 10_000 < share * 10_000 for key in keys], bool)


def _captions(catalogue: Catalogue, source: Path, rows: npt.NDArray[np.int64]) -> tuple[str, ...]:
    captions = catalogue.captions or ("",) * len(catalogue.y)
    for row in rows:
        if not captions[row]:
            raise DataError(f"{source}: picture {row} has no caption, and the field text asks for captions")
    return tuple(captions[row] for row in rows)

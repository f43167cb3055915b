"""The summary of a data set that `python -m model.data describe` prints, for a look before training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ditserve.model.data.examples import DataError
from ditserve.model.data.latents import Moments
from ditserve.model.data.sources import NAMED, Source
from ditserve.model.data.transforms import centre_crop
from ditserve.model.spec.sizes import size_name

BROKEN = 20  # unreadable pictures that are listed
COLUMNS, ROWS, CELL = 12, 8, 64  # contact sheet; a cell in pixels


def summarise(source: Source) -> Iterator[str]:
    """Yield lines about a source: pictures, sizes, classes, captions, licence, and what cannot be read."""
    catalogue, count = source.catalogue, len(source.data)
    yield f"{source.path}: {source.kind}"
    sizes = ", ".join(f"{size_name(size, '×')} ({n:,})" for size, n in source.sizes.most_common(5))
    more = f" and {len(source.sizes) - 5} more" if len(source.sizes) > 5 else ""
    held = {None: "pictures", "frames": "clips", "depth": "volumes"}[source.card.first_axis]
    yield f"  {'latents' if isinstance(source.data, Moments) else held}  {count:,}: {sizes}{more}"
    for factor, classes, names in (
        ("names", catalogue.y, catalogue.names),
        ("styles", catalogue.s, catalogue.styles),
    ):
        if names:
            counts = np.bincount(classes, minlength=len(names))
            few, many = int(counts.argmin()), int(counts.argmax())
            fewest, most = f"{counts[few]:,} of {names[few]!r}", f"{counts[many]:,} of {names[many]!r}"
            yield f"  {factor:8}  {len(names):,}: {fewest} to {most}"
            if not counts.all():
                empty = [name for name, n in zip(names, counts, strict=True) if not n]
                yield f"  {'':8}  {len(empty):,} without pictures: {', '.join(empty[:NAMED])}"
    if catalogue.names and catalogue.styles:
        drawn = np.zeros((len(catalogue.names), len(catalogue.styles)), bool)
        drawn[catalogue.y, catalogue.s] = True
        crossed = drawn.all(1).sum()
        yield f"  crossed   {crossed:,} names are there in every style; the others are left out of training"
    if catalogue.groups:
        yield f"  groups    {', '.join(sorted(set(catalogue.groups)))}"
    captions = [caption for caption in catalogue.captions if caption]
    if captions:
        yield f"  captions  {len(captions):,} of {count:,}, such as {captions[0]!r}"
    yield f"  licence   {source.card.licence or 'not told: add a card.json'}"
    if source.broken:
        yield f"  broken    {len(source.broken):,}; to train without them, set corrupt_limit to that or more"
        yield from (f"    {message}" for message in source.broken[:BROKEN])


def contact_sheet(source: Source, file: Path) -> None:
    """Save up to 96 pictures, evenly spread over the set, side by side in `file`.

    Raises:
        DataError: the source holds latents.
        OSError, ValueError: the file cannot be written, or its name has no known picture format.
    """
    if isinstance(source.data, Moments):
        raise DataError(f"{source.path} holds latents, of which there is no contact sheet")
    chosen = np.unique(np.linspace(0, len(source.data) - 1, COLUMNS * ROWS).astype(int))
    sheet = Image.new("RGB", (COLUMNS * CELL, -(-len(chosen) // COLUMNS) * CELL), "white")
    for k, index in enumerate(chosen):
        cell = Image.fromarray(centre_crop(source.data[int(index)], (CELL, CELL)))
        sheet.paste(cell, (k % COLUMNS * CELL, k // COLUMNS * CELL))
    sheet.save(file)

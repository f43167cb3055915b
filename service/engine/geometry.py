"""The geometry of a sample: the size of its latent, and the rows that the network sees of it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ditserve.model.spec.sizes import Size, size_name
from ditserve.model.spec.windows import Windows, windows_over
from ditserve.service.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Geometry:
    """The size of a latent and the rows of one prediction of it; sizes are in latent pixels, by axis.

    A latent is one row, or one row a window. `row_size` is the size of a row. `cost` is the tokens of one
    prediction, in rows of the bundle's own size.
    """

    size: Size
    row_size: Size
    windows: Windows | None
    cost: float

    @property
    def rows(self) -> int:
        """Rows of one prediction without guidance."""
        return 1 if self.windows is None else len(self.windows)

    @property
    def row_area(self) -> float:
        """The tokens of a row, in rows of the bundle's own size."""
        return self.cost / self.rows


def geometry_of(size: Size | None, *, own: Size, windows: bool, multiples: Size | None) -> Geometry:
    """Return the geometry of a request for latents of `size`; None is the bundle's `own`.

    With `windows` it is denoised in overlapping windows of the bundle's own size. `multiples` are what the
    sides of other sizes must be multiples of; None means that the backend runs no other size.

    Raises:
        InvalidRequest: the size is not larger and windows are asked for, or the backend does not run it.
    """
    size = size or own
    if len(size) != len(own):
        raise InvalidRequest(
            f"This worker makes nothing of {size_name(size)}: its own size is {size_name(own)}."
        )
    if windows:
        if size == own or any(side < least for side, least in zip(size, own, strict=True)):
            raise InvalidRequest(f"Only what is larger than {size_name(own)} latent pixels has windows.")
        grid = windows_over(size, own)
        return Geometry(size, own, grid, float(len(grid)))
    if size != own and not _is_made(size, multiples):
        raise InvalidRequest(f"This worker makes no images of {size_name(size)} latent pixels.")
    return Geometry(size, size, None, prod(size) / prod(own))


def _is_made(size: Size, multiples: Size | None) -> bool:
    """Return whether a backend runs a size other than its own."""
    return multiples is not None and all(
        side > 0 and side % multiple == 0 for side, multiple in zip(size, multiples, strict=True)
    )

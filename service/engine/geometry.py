"""The geometry of a sample: the size of its latent, and the rows that the network sees of it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ditserve.model.spec.sizes import Size
from ditserve.model.spec.windows import Windows, windows_over
from ditserve.service.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Geometry:
    """The size of a latent and the rows of one prediction of it; sizes are height and width in latent pixels.

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


def geometry_of(size: Size | None, *, own: Size, windows: bool, multiple: int | None) -> Geometry:
    """Return the geometry of a request for latents of `size`; None is the bundle's `own`.

    With `windows` it is denoised in overlapping windows of the bundle's own size. `multiple` is what the
    sides of other sizes must be multiples of; None means that the backend runs no other size.

    Raises:
        InvalidRequest: the size is not larger and windows are asked for, or the backend does not run it.
    """
    size = size or own
    if windows:
        if size == own or size[0] < own[0] or size[1] < own[1]:
            raise InvalidRequest(f"Only what is larger than {own[0]}x{own[1]} latent pixels has windows.")
        grid = windows_over(size, own)
        return Geometry(size, own, grid, float(len(grid)))
    if size != own and (multiple is None or any(side < 1 or side % multiple for side in size)):
        raise InvalidRequest(f"This worker makes no images of {size[0]}x{size[1]} latent pixels.")
    return Geometry(size, size, None, prod(size) / prod(own))

"""The low-rank adapters of a backend, as the engine asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from ditserve.service.fleet import LoadedAdapter
from ditserve.service.jobs import AdapterUse

# The adapters of one row, by name.
RowUses = tuple[AdapterUse, ...]


class BackendAdapters(Protocol):
    """The adapters that a backend has loaded beside its bundle."""

    loaded: tuple[LoadedAdapter, ...]

    def of_conditioner(self, uses: RowUses) -> RowUses:
        """Return those of `uses` that change what `embed` or `modulate` compute."""
        ...

    def applied(self, rows: Sequence[RowUses]) -> AbstractContextManager[None]:
        """Return the context of one call of the backend, whose rows use these adapters."""
        ...


def adapted(backend: Any, rows: Sequence[RowUses]) -> AbstractContextManager[None]:
    """Return the context of a call of `backend` for these rows; nothing happens where none has an adapter."""
    used: AbstractContextManager[None] = backend.adapters.applied(rows) if any(rows) else nullcontext()
    return used

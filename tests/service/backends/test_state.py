"""The contract of a state memory, on every implementation; and pictures that do not depend on which it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from ditserve.model.spec.bundle import Bundle
from ditserve.service.backends import Floats, OutOfMemory, load_backend
from ditserve.service.backends.state import HostMemory, StateArray, StateMemory
from ditserve.service.jobs import ConditionTerm
from tests.service.backends.drawing import drawn

torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[dev]'")
Make = Callable[..., Any]


@pytest.fixture(params=["host", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def memory(request: pytest.FixtureRequest) -> StateMemory:
    from ditserve.service.backends.torch import TorchMemory

    return HostMemory() if request.param == "host" else TorchMemory(torch.device(request.param))


def values_of(array: StateArray) -> Floats:
    values: Floats = array if isinstance(array, np.ndarray) else array.cpu().numpy()
    return values


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_rows_are_written_and_taken(memory: StateMemory, shape: tuple[int, ...]) -> None:
    rows = np.random.default_rng(0).standard_normal((4, *shape), np.float32)
    table, out = memory.zeros(6, shape), memory.zeros(5, shape)
    assert not values_of(table).any()
    assert values_of(table).dtype == np.float32
    memory.write(table, [5, 0], rows[:2])
    memory.write(table, slice(2, 4), rows[2:])
    memory.take(table, [0, 3, 5, 3], out)
    np.testing.assert_array_equal(values_of(out)[:4], rows[[1, 3, 0, 3]])
    # The other rows of both stay, and a slice is what the network is given.
    assert not values_of(out)[4:].any()
    assert not values_of(table)[[1, 4]].any()
    np.testing.assert_array_equal(values_of(out[1:3]), rows[[3, 0]])


def test_values_that_are_written_are_copied(memory: StateMemory) -> None:
    table, rows = memory.zeros(2, (3,)), np.ones((2, 3), np.float32)
    memory.write(table, slice(0, 2), rows)
    rows[:] = 7.0
    np.testing.assert_array_equal(values_of(table), np.ones((2, 3)))


def test_arrays_too_large_for_the_memory_are_an_error_of_memory(memory: StateMemory) -> None:
    with pytest.raises(MemoryError):
        memory.zeros(1 << 42, (1024,))


@pytest.fixture(scope="module")
def backend(bundle: Bundle) -> Iterator[Any]:
    loaded = load_backend("torch", bundle, threads=1)
    yield loaded
    loaded.close()


@pytest.mark.parametrize("modulation_bytes", [0, 1 << 20])
def test_pictures_are_those_of_a_state_in_the_hosts_memory(
    backend: Any,
    make_request: Make,
    make_rung: Make,
    monkeypatch: pytest.MonkeyPatch,
    modulation_bytes: int,
) -> None:
    """To the last bit, also where a batch runs in parts, and by way of the cache or past it."""
    requests = [
        make_request(
            f"{k}/0", seed=k, condition=(ConditionTerm((k, None)),), rung=make_rung("dpmpp-2m", 4 + k)
        )
        for k in range(4)
    ]
    plain, refused = backend.denoise, list[int]()

    def denoise(x: Floats, state: tuple[StateArray, ...]) -> Floats:
        if len(x) > 1:
            refused.append(len(x))
            raise OutOfMemory(f"{len(x)} rows")
        assert {type(tensor) for tensor in state} == {type(backend.state_memory.zeros(1, ()))}
        output: Floats = plain(x, state)
        return output

    monkeypatch.setattr(backend, "denoise", denoise)
    own = drawn(backend, requests, modulation_bytes)
    assert isinstance(backend.state_memory.zeros(1, ()), torch.Tensor)
    monkeypatch.setattr(backend, "state_memory", HostMemory())
    on_host = drawn(backend, requests, modulation_bytes)
    assert len(refused) == 2
    for name, latent in own.items():
        np.testing.assert_array_equal(latent, on_host[name])

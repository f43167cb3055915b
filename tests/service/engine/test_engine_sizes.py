"""Samples of several image sizes in one engine: each its own image, in turns, within one budget of tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ditserve.service.errors import InternalError, InvalidRequest
from tests.service.engine.stepping import failed, finished, recorded_shapes, run

Make = Callable[..., Any]

OWN, SMALL, WIDE, TALL = (4, 6), (2, 2), (4, 12), (16, 6)


def test_any_multiple_of_the_backends_size_is_made_as_if_alone(
    make_backend: Make, make_engine: Make, make_request: Make
) -> None:
    sizes = [OWN, SMALL, WIDE, TALL, None]
    requests = [make_request(f"{k}/0", size=size, seed=k) for k, size in enumerate(sizes)]
    together = finished(run(make_engine(make_backend(size_multiple=2)), requests))
    for request, size in zip(requests, sizes, strict=True):
        alone = finished(run(make_engine(make_backend(size_multiple=2)), [request]))[request.id]
        assert together[request.id].latent.shape == (3, *(size or OWN))
        np.testing.assert_array_equal(together[request.id].latent, alone.latent)


@pytest.mark.parametrize("size", [(5, 6), (0, 6), (-2, 6)])
def test_a_size_that_is_no_multiple_is_refused(
    size: tuple[int, int], make_backend: Make, make_engine: Make, make_request: Make
) -> None:
    engine = make_engine(make_backend(size_multiple=2))
    with pytest.raises(InvalidRequest, match="makes no images of"):
        engine.add(make_request(size=size))
    assert engine.idle
    assert engine.free_samples == 16


def test_a_backend_of_one_size_takes_no_other(make_engine: Make, make_request: Make) -> None:
    with pytest.raises(InvalidRequest):
        make_engine().add(make_request(size=WIDE))


def test_rows_share_a_pass_with_their_own_size_only_and_within_the_budget(
    make_backend: Make, make_engine: Make, make_request: Make
) -> None:
    backend = make_backend(size_multiple=2)
    shapes = recorded_shapes(backend)
    engine = make_engine(backend, max_rows=8)
    for k in range(8):
        engine.add(make_request(f"wide-{k}/0", size=WIDE, seed=k))
        engine.add(make_request(f"own-{k}/0", seed=k))
    run(engine)
    rows = {size: [shape[0] for shape in shapes if shape[2:] == size] for size in (OWN, WIDE)}
    assert max(rows[OWN]) == 8
    assert max(rows[WIDE]) == 4  # a row of twice the tokens


def test_sizes_advance_at_one_pace(make_backend: Make, make_engine: Make, make_request: Make) -> None:
    engine = make_engine(make_backend(size_multiple=2), max_rows=2)
    for k in range(6):
        engine.add(make_request(f"own-{k}/0", seed=k))
    engine.add(make_request("small/0", size=SMALL))
    order = [
        name.partition("-")[0] for report in run(engine) for name in (sample.id for sample in report.finished)
    ]
    assert order.index("small/0") >= 3  # it does not overtake the many, though its passes are short
    taken = Counter(order)
    assert taken == {"own": 6, "small/0": 1}


def test_backlog_counts_in_rows_of_the_bundles_own_size(
    make_backend: Make, make_engine: Make, make_request: Make
) -> None:
    engine = make_engine(make_backend(size_multiple=2))
    engine.add(make_request("a/0"))
    assert engine.backlog_rows == 16
    engine.add(make_request("b/0", size=WIDE))
    assert engine.backlog_rows == 16 + 32


def test_a_size_that_does_not_fit_in_memory_fails_alone(
    make_backend: Make, make_engine: Make, make_request: Make
) -> None:
    backend = make_backend(size_multiple=2)
    inner = backend.denoise

    def denoise(x: Any, state: Any) -> Any:
        if x.shape[2:] == TALL:
            raise MemoryError
        return inner(x, state)

    backend.denoise = denoise
    engine = make_engine(backend)
    reports = run(engine, [make_request("tall/0", size=TALL), make_request("own/0")])
    assert isinstance(failed(reports)["tall/0"].error, InternalError)
    assert set(finished(reports)) == {"own/0"}
    assert engine.free_samples == 16

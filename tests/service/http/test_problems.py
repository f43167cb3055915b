"""Errors as HTTP answers: the value of `Retry-After`."""

from __future__ import annotations

from ditserve.service.http.problems import seconds_header


def test_retry_after_is_whole_seconds() -> None:
    assert [seconds_header(value) for value in (0.0, 0.2, 1.0, 1.1)] == [1, 1, 1, 2]

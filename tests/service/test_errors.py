"""The error tree: every error crosses the queue, and none leaks what is not the caller's."""

import re

import msgpack
import pytest

from ditserve.service import errors
from ditserve.service.errors import ERRORS, InternalError, ServiceError, UnknownCondition, from_wire, to_wire


@pytest.mark.parametrize("kind", ERRORS.values(), ids=ERRORS.keys())
def test_every_error_survives_the_queue(kind: type[ServiceError]) -> None:
    sent = kind("what happened", retry_after=2.5, extra={"factor": "label"})
    received = from_wire(msgpack.unpackb(msgpack.packb(to_wire(sent))))
    assert type(received) is kind
    assert (received.detail, received.retry_after, received.extra) == (
        "what happened",
        2.5,
        {"factor": "label"},
    )


def test_every_error_has_a_code_of_its_own_and_a_status() -> None:
    declared = [
        each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, ServiceError)
    ]
    assert len({each.code for each in declared}) == len(declared) == len(ERRORS)
    for each in declared:
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", each.code)
        assert 400 <= each.status < 600


def test_a_foreign_exception_crosses_without_its_text() -> None:
    wire = to_wire(FileNotFoundError("/secret/path"))
    assert wire["code"] == InternalError.code
    assert "/secret" not in str(wire)


def test_an_unknown_code_is_an_internal_error_that_names_it() -> None:
    error = from_wire({"code": "from-the-future", "detail": "x"})
    assert type(error) is InternalError
    assert error.extra["unknown_code"] == "from-the-future"


def test_suggestions_survive() -> None:
    error = from_wire(to_wire(UnknownCondition("no such label", suggestions=["lemon"])))
    assert isinstance(error, UnknownCondition)
    assert error.suggestions == ("lemon",)

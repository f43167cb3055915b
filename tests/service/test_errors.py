"""The error tree: every error crosses the queue, and none leaks data of others."""

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
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, ServiceError)
    ]
    assert len({error.code for error in declared}) == len(declared) == len(ERRORS)
    for error in declared:
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", error.code)
        assert 400 <= error.status < 600


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


@pytest.mark.parametrize(
    "extra",
    [
        "none",
        {"errors": "all of them"},
        {"errors": []},
        {"errors": [{"pointer": "#/steps"}]},
        {"errors": [{"pointer": "#/steps", "detail": 5}]},
        {"suggestions": 5},
        {"suggestions": ["lemon", 5]},
        {"retry_after_s": "soon"},
        {"status": 200, "code": "fine", "message": 5},
        {5: "five"},
        {"image": b"\xff"},
        {"predicted_s": float("nan")},
        {"deep": {"image": [b""]}},
    ],
    ids=str,
)
def test_fields_of_another_form_are_left_out(extra: object) -> None:
    error = from_wire({"code": "invalid-request", "detail": "x", "extra": extra})
    assert (error.code, error.detail, error.extra) == ("invalid-request", "x", {})


def test_fields_that_a_later_release_adds_are_shown() -> None:
    errors = [{"pointer": "#/steps", "detail": "Too many.", "hint": "Ask for fewer."}]
    extra = {"errors": errors, "suggestions": ["lemon"], "tried": [{"rung": "full"}]}
    assert from_wire({"code": "invalid-request", "extra": extra}).extra == extra

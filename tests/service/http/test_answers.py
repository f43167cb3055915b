"""Content negotiation: `Accept` as RFC 9110 defines it."""

import pytest

from ditserve.service.http.answers import preferred

OFFERS = ["application/json", "image/png", "image/webp"]


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        (None, "application/json"),
        ("", "application/json"),
        ("*/*", "application/json"),
        ("image/*", "image/png"),
        ("IMAGE/WEBP", "image/webp"),
        ("image/webp;q=0.8, image/png;q=0.9", "image/png"),
        ("image/*;q=0.5, image/png;q=0.1", "image/webp"),
        ("image/png;q=0, */*;q=0.1", "application/json"),
        ("text/html", None),
        ("image/png;q=0", None),
        ("nonsense, image/png;q=high", None),
        ("image/png ; q=0.5", "image/png"),
    ],
)
def test_the_best_liked_offer_wins(accept: str | None, chosen: str | None) -> None:
    assert preferred(accept, OFFERS) == chosen


def test_a_huge_header_is_read_in_bounded_time() -> None:
    assert preferred("text/html," * 100_000 + "image/png", OFFERS) is None

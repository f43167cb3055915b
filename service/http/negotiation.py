"""Which of the representations we have a client wants most: the `Accept` header (RFC 9110 §12.5.1). Pure."""

from collections.abc import Sequence


def preferred(accept: str | None, offers: Sequence[str]) -> str | None:
    """The offer the client likes best; among equals the first offered; None when it accepts none.

    No header means anything is fine. A malformed part counts as absent.
    """
    if accept is None or not accept.strip():
        return offers[0]
    ranges = [parsed for part in accept.split(",")[:50] if (parsed := _media_range(part))]
    ranked = sorted(offers, key=lambda offer: -_quality(offer, ranges))
    return ranked[0] if _quality(ranked[0], ranges) > 0 else None


def _media_range(part: str) -> tuple[str, float] | None:
    kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
    if kind.count("/") != 1:
        return None
    quality = 1.0
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                quality = min(max(float(value), 0.0), 1.0)
            except ValueError:
                return None
    return kind, quality


def _quality(offer: str, ranges: Sequence[tuple[str, float]]) -> float:
    """The quality of the most specific range that covers `offer`; 0 when none does."""
    family = offer.partition("/")[0]
    for wanted in (offer, f"{family}/*", "*/*"):
        for kind, quality in ranges:
            if kind == wanted:
                return quality
    return 0.0

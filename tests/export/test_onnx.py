from pathlib import Path

from model.bundle import Bundle


def test_a(tiny_bundle: Path) -> None:
    Bundle.open(tiny_bundle)

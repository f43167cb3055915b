"""The bundles that ship with the code; the only file that knows which one is served where none is named."""

from __future__ import annotations

from pathlib import Path

# The folder that holds `model`: a checkout, or the installed package.
ROOT = Path(__file__).resolve().parents[2]
ZOO = ROOT / "model" / "zoo"
FLAGSHIP = ZOO / "emoji"
# Small and quick, for trials.
TINY = ZOO / "tiny"

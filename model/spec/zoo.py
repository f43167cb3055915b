"""The bundles that ship with the code; the only file that knows which one is served where none is named."""

from __future__ import annotations

from pathlib import Path

# The folder that holds `model`: a checkout, or the installed package.
ROOT = Path(__file__).resolve().parents[2]
ZOO = ROOT / "model" / "zoo"
FLAGSHIP = ZOO / "emoji"
# The flagship of before, of pixels: benchmarks go on with it, so that their records can be compared.
EMOJI64 = ZOO / "emoji64"
# Small and quick, for trials.
TINY = ZOO / "tiny"

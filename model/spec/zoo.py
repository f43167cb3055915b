"""The bundles that ship with the code; the only file that knows which one is served where none is named."""

from __future__ import annotations

from pathlib import Path

# The folder that holds `model`: a checkout, or the installed package.
ROOT = Path(__file__).resolve().parents[2]
ZOO = ROOT / "model" / "zoo"
FLAGSHIP = ZOO / "emoji"
# The flagship of before, of pixels, which a wheel lacks.
EMOJI64 = ZOO / "emoji64"
# What benchmarks measure: the old one where it is, so that their records can be compared.
BENCHMARKED = EMOJI64 if EMOJI64.is_dir() else FLAGSHIP
# Small and quick, for trials.
TINY = ZOO / "tiny"

"""Write which models ran on which hardware into docs/models.md, from the results that are kept.

    python -m bench.support

A model was measured where a result in bench/results names it, on the machine that this result names. A family
of pipelines runs where the tests draw with it. All else was not tried.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ditserve.bench import report
from ditserve.model.spec.bundle import MANIFEST, write_atomic
from ditserve.model.spec.pipeline_config import FAMILIES
from ditserve.model.spec.zoo import ZOO

DOCUMENT = Path("docs/models.md")
BEGIN, END = "<!-- Written by `python -m bench.support`. -->", "<!-- End of what it wrote. -->"
CPU = "x86 CPU"
# Names in results → what is shown.
OTHERS = {"DiT-XL-2": "DiT-XL/2, random weights", "DiT-S-2": "DiT-S/2, random weights"}
NOT_TRIED = "not tried"


def hardware(result: Mapping[str, Any]) -> str:
    """Return what a result was measured on."""
    return str(result["gpu"]["name"]) if "gpu" in result else CPU


def models(options: Mapping[str, Any]) -> set[str]:
    """Return the names of the models that the options of a benchmark name.

    Where it was given a pipeline, it did not use the network that it has by default.
    """
    network = None if options.get("pipeline") else options.get("network")
    named = [options.get("bundle"), network, *options.get("networks", ())]
    texts = (text for text in named if isinstance(text, str))
    return {text.removeprefix("model/zoo/").removeprefix("/tmp/").replace("/", "-") for text in texts}


def measured() -> dict[str, dict[str, list[str]]]:
    """Return, by model and hardware, the names of the results that measured it."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for file in sorted(report.RESULTS.glob("*.json")):
        result = json.loads(file.read_text())
        if isinstance(result, dict) and isinstance(result.get("machine"), dict):
            for model in models(result.get("options", {})):
                found[model][hardware(result)].append(file.stem)
    return found


def support_table() -> str:
    """Return the table as Markdown."""
    found = measured()
    places = sorted({place for by_place in found.values() for place in by_place})
    places.sort(key=lambda place: place != CPU)
    rows = [["model", *places], ["---"] * (len(places) + 1)]
    shipped = [folder.name for folder in sorted(ZOO.iterdir()) if (folder / MANIFEST).is_file()]
    for name in (*shipped, *OTHERS):
        cells = [", ".join(map(_link, found[name][place])) for place in places]
        states = [f"runs and measured: {cell}" if cell else NOT_TRIED for cell in cells]
        rows.append([OTHERS.get(name, f"`{name}`, ships"), *states])
    runs = "runs, tiny and of random weights: [test](../tests/test_pipelines_over_http.py)"
    tested = [runs if place == CPU else NOT_TRIED for place in places]
    rows += [[", ".join(family.pipelines), *tested] for family in FAMILIES.values()]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([BEGIN, *lines, END])


def _link(name: str) -> str:
    return f"[{name}](../bench/results/{name}.json)"


def updated(document: str) -> str:
    """Return the document with the table as it is now."""
    before, _, rest = document.partition(BEGIN)
    return before + support_table() + rest.partition(END)[2]


def main() -> int:
    """Write the table into the document; return the exit status."""
    return report.run_command(
        "support", lambda: write_atomic(DOCUMENT, updated(DOCUMENT.read_text()).encode())
    )


if __name__ == "__main__":
    sys.exit(main())

"""BentoML with adaptive batching: a batchable API, whose dispatcher chooses how long to wait from what batches took.

    bentoml serve bench.peers.bentoml_server:Drawing

`max_concurrency` is its own cap: what is beyond it is refused. `wait_s` is `max_latency_ms`, beyond which it gives requests up.
A batch size of one is no batch here.
"""

# mypy: disable-error-code="import-not-found, misc, untyped-decorator"
from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import bentoml

from ditserve.bench.peers.options import Options
from ditserve.bench.peers.pipeline import Pipeline, Wish

options = Options.read()
batching = {
    "batchable": True,
    "max_batch_size": options.batch,
    "max_latency_ms": round(1000 * options.wait_s),
}


@bentoml.service(workers=1, traffic={"timeout": 600, "max_concurrency": options.cap})
class Drawing:
    def __init__(self) -> None:
        self.pipeline = Pipeline(Path(options.model), threads=options.threads)

    @bentoml.api(**batching if options.batch > 1 else {})
    def generate(self, wishes: list[dict[str, Any]]) -> list[str]:
        files = self.pipeline([Wish.read(wish) for wish in wishes])
        return [base64.b64encode(file).decode() for file in files]

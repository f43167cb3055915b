"""BentoML with adaptive batching: its dispatcher chooses how long to wait from the time that batches took.

    bentoml serve ditserve.bench.peers.bentoml_server:BentoMLPeer

`max_concurrency` is BentoML's own cap, and requests beyond it are refused. `wait_s` is `max_latency_ms`,
after which it gives a request up. A batch size of one turns batching off.
"""

# mypy: disable-error-code="import-not-found, misc, untyped-decorator"
from __future__ import annotations

import base64
from typing import Any

import bentoml

from ditserve.bench.peers.graph import open_pipeline
from ditserve.bench.peers.options import PeerOptions
from ditserve.bench.peers.requests import PeerRequest

options = PeerOptions.read()
batching = {
    "batchable": True,
    "max_batch_size": options.batch,
    "max_latency_ms": round(1000 * options.wait_s),
}


@bentoml.service(workers=1, traffic={"timeout": 600, "max_concurrency": options.cap})
class BentoMLPeer:
    def __init__(self) -> None:
        self.pipeline = open_pipeline(options)

    @bentoml.api(**batching if options.batch > 1 else {})
    def generate(self, wishes: list[dict[str, Any]]) -> list[str]:
        files = self.pipeline([PeerRequest.read(fields) for fields in wishes])
        return [base64.b64encode(file).decode() for file in files]

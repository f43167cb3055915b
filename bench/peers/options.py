"""How a peer is told how to run: a file in the folder it is started in, since servers that fork and import hear of nothing else."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

OPTIONS = "peer.json"


@dataclass(frozen=True, slots=True)
class Options:
    """How a peer is run. `model` holds `transformer/` as diffusers saved it, `bundle` the same weights as ONNX graphs. At most `cap`
    requests are inside at once, the rest are refused; a batch of up to `batch` is waited for `wait_s`."""

    model: str
    bundle: str
    port: int
    threads: int
    batch: int
    wait_s: float
    cap: int

    @classmethod
    def read(cls) -> Options:
        return cls(**json.loads(Path(OPTIONS).read_text()))

    def write(self, folder: Path) -> None:
        (folder / OPTIONS).write_text(json.dumps(asdict(self)))

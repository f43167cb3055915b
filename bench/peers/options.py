"""The options of a peer, in a file: servers that fork and import see nothing else."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "peer.json"
TRANSFORMER = "transformer"  # folder of a model that diffusers saved


@dataclass(frozen=True, slots=True)
class PeerOptions:
    """The way a peer is run.

    Args:
        model: folder with `transformer/` as diffusers saved it, or a bundle.
        bundle: folder with the same weights as ONNX graphs; that of the model where it is a bundle.
        graphs: run those graphs, in place of the network in PyTorch.
        batch: most requests of a batch.
        wait_s: seconds to wait for a full batch.
        cap: most requests inside at once; the rest are refused.
    """

    model: str
    bundle: str
    graphs: bool
    port: int
    threads: int
    batch: int
    wait_s: float
    cap: int

    @classmethod
    def read(cls) -> PeerOptions:
        return cls(**json.loads(Path(FILE).read_text()))

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self)))

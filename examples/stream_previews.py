"""Watch an image appear: previews of a job as server-sent events.

make serve                                   # in another terminal
python examples/stream_previews.py
"""

import argparse
import base64
from pathlib import Path

from ditserve.service.client import Client

parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
parser.add_argument("--url", default="http://127.0.0.1:8000")
parser.add_argument("--label", default="strawberry")
parser.add_argument("--out", type=Path, default=Path("."))
options = parser.parse_args()

with Client(options.url) as client:
    # A preview every five steps: what the model believes the finished image to be.
    job_id = client.submit({"label": options.label, "style": "noto"}, steps=20, seed=7, previews=5)
    for event in client.events(job_id):
        print(event.kind, {name: value for name, value in event.data.items() if name != "b64"})
        if event.kind == "preview":
            path = options.out / f"{options.label}-step-{event.data['step']:02}.png"
            path.write_bytes(base64.b64decode(event.data["b64"]))
    (options.out / f"{options.label}.png").write_bytes(client.image(job_id).data)

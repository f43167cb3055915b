"""Draw two images and save them: the smallest program that uses the service.

make serve                                   # in another terminal
python examples/generate.py
"""

import argparse
from pathlib import Path

from ditserve.service.client import Client

parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
parser.add_argument("--url", default="http://127.0.0.1:8000")
parser.add_argument("--label", default="strawberry")
parser.add_argument("--out", type=Path, default=Path("."))
options = parser.parse_args()

with Client(options.url) as client:
    # The fields of POST /generate. The client waits as `Retry-After` says, and never draws twice.
    generation = client.generate({"label": options.label, "style": "noto"}, n=2, steps=20, seed=7)
for image in generation.images:
    path = options.out / f"{options.label}-{image.seed}.png"
    path.write_bytes(image.data)
    print(path)
print(f"{generation.facts['steps_used']} of {generation.facts['steps_requested']} steps")

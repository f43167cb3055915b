"""Queue several jobs at once, cancel one, and collect the others as they finish.

make serve                                   # in another terminal
python examples/async_jobs.py
"""

import argparse
import asyncio
from pathlib import Path

from ditserve.service.client import AsyncClient

parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
parser.add_argument("--url", default="http://127.0.0.1:8000")
parser.add_argument("--labels", nargs="+", default=["strawberry", "fox", "rocket"])
parser.add_argument("--out", type=Path, default=Path("."))
options = parser.parse_args()


async def draw(client: AsyncClient, label: str) -> str:
    """Submit one job and return the state in which it ends."""
    job_id = await client.submit({"label": label, "style": "noto"}, steps=20, seed=7, deadline_ms=60_000)
    if label == options.labels[-1]:
        await client.cancel(job_id)  # takes effect within one step
    async for event in client.events(job_id):
        if event.kind == "done":
            image = await client.image(job_id)
            (options.out / f"{label}.png").write_bytes(image.data)
        last = event.kind
    return last


async def main() -> None:
    async with AsyncClient(options.url) as client:
        states = await asyncio.gather(*(draw(client, label) for label in options.labels))
    for label, state in zip(options.labels, states, strict=True):
        print(label, state)


asyncio.run(main())

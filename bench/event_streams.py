"""Measure what clients that follow one job's previews cost the others, on a running service.

    python -m service --bundle model/zoo/tiny &
    python -m bench.event_streams [--url http://127.0.0.1:8000] [--clients 100] [--steps 1000]

Asks `GET /livez` every few milliseconds while a job makes previews of four images at every step: first with
nobody who follows it, then with `--clients`. Prints the latency of both, and the events that the clients got.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from urllib.parse import urlsplit

import httpx
import numpy as np

from ditserve.commands import command_line

ASK_EVERY_S = 0.005


async def follow(host: str, port: int, path: str) -> int:
    """Read an event stream to its end; return the number of its events."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    events, tail = 0, b""
    while data := await reader.read(2**16):
        # An event's name may lie across two pieces.
        events += (tail + data).count(b"event: ")
        tail = data[-6:]
    writer.close()
    return events


def follow_all(address: tuple[str, int, str], clients: int, results: Connection) -> None:
    """Follow one job `clients` times, in a process of its own; send the numbers of events."""

    async def run() -> list[int]:
        return await asyncio.gather(*(follow(*address) for _ in range(clients)))

    results.send(asyncio.run(run()))


def measure(url: str, *, clients: int, steps: int) -> dict[str, float]:
    """Run one job while `clients` follow it; return the latency of `/livez` in ms, and events."""
    parts = urlsplit(url)
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        body = {"steps": steps, "previews": 1, "seed": 1, "n": 4}
        response = client.post("/generate", json=body, headers={"prefer": "respond-async"})
        response.raise_for_status()
        links = response.json()["links"]
        receiver, sender = multiprocessing.Pipe(duplex=False)
        address = (parts.hostname or "", parts.port or 80, links["events"])
        following = multiprocessing.Process(target=follow_all, args=(address, clients, sender))
        following.start()
        latencies: list[float] = []
        while client.get(links["self"]).json()["state"] in ("queued", "running"):
            for _ in range(20):
                began = time.perf_counter()
                client.get("/livez")
                latencies.append(1000 * (time.perf_counter() - began))
                time.sleep(ASK_EVERY_S)
        events = receiver.recv()
        following.join()
    p50, p99 = np.percentile(latencies, [50, 99])
    figures = {"clients": clients, "asked": len(latencies), "p50_ms": p50, "p99_ms": p99}
    return {name: round(float(value), 1) for name, value in figures.items()} | {
        "events": min(events, default=0)
    }


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=command_line("bench.event_streams"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args(arguments)
    for clients in (0, options.clients):
        print(json.dumps(measure(options.url, clients=clients, steps=options.steps)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The systems under test: servers that are started as their users start them, one at a time."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from ditserve.bench.load.adapters import ADAPTERS, Adapter, Drawing
from ditserve.bench.load.processes import free_port, process_tree
from ditserve.bench.peers.options import TRANSFORMER, PeerOptions
from ditserve.model.spec.errors import ModelError

ROOT = Path(__file__).resolve().parents[2]
# A server yields the cores to the load generator, whose requests would leave late otherwise.
NICE = ("nice", "-n", "5", "env")
READY_TIMEOUT_S, POLL_S, STOP_TIMEOUT_S = 180.0, 0.2, 15.0


@dataclass(frozen=True, slots=True)
class SystemUnderTest:
    """One way to serve.

    Args:
        command: the arguments of the interpreter, with {port}, {bundle} and {threads}; flags for our service.
        adapter: name of the dialect it is asked in.
        batch, wait_s, cap: of a peer: batch size, seconds to wait for a batch, and requests inside at once.
        graphs: a peer that runs our ONNX graphs.
        tunings: batches and waits to try before a peer is compared.
    """

    name: str
    command: tuple[str, ...]
    adapter: str
    batch: int = 1
    wait_s: float = 0.02
    cap: int = 8
    graphs: bool = False
    tunings: tuple[tuple[int, float], ...] = ()

    @property
    def ours(self) -> bool:
        return self.command[:2] == ("-m", "ditserve.service")


@dataclass(frozen=True, slots=True)
class ServerSetup:
    """The set-up that all systems share: what they serve, how it is asked for, peers' interpreter, threads.

    `model` is the folder that `bench.peers.model` wrote, or a bundle.
    """

    model: Path
    drawing: Drawing
    python: Path
    threads: int


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that is ready."""

    url: str
    pid: int
    adapter: Adapter


class ServerFailed(ModelError):
    """Raised when a server does not become ready; the message ends with its last output."""


OURS = (
    *("-m", "ditserve.service", "--port={port}", "--bundle={bundle}"),
    *("--threads={threads}", "--log-level=warning"),
    "--canary-s=0",
)
OURS_FP32 = (*OURS, "--precision=fp32")
LITSERVE = ("-m", "ditserve.bench.peers.litserve_server")
WAITS = ((1, 0.0), (4, 0.01), (4, 0.05), (8, 0.05))
# BentoML chooses by itself how long to wait for a batch; what is tuned is when it gives requests up.
BENTOML_LIMITS = ((1, 60.0), (4, 10.0), (4, 60.0), (8, 60.0))

SYSTEMS: Mapping[str, SystemUnderTest] = {
    system.name: system
    for system in (
        SystemUnderTest("planner", OURS_FP32, "service"),
        SystemUnderTest("EDF", OURS_FP32, "service-undegraded"),
        SystemUnderTest("step FIFO", OURS_FP32, "service-undated"),
        SystemUnderTest(
            "one at a time", (*OURS_FP32, "--max-rows=1", "--lookahead-rows=0"), "service-undated"
        ),
        SystemUnderTest("torch eager", (*OURS, "--backend=torch"), "service-undated"),
        SystemUnderTest("torch compiled", (*OURS, "--backend=torch", "--compile"), "service-undated"),
        SystemUnderTest("ONNX INT8", (*OURS, "--precision=int8"), "service-undated"),
        SystemUnderTest(
            "diffusers + lock",
            ("-m", "uvicorn", "ditserve.bench.peers.locked:app", "--port={port}", "--log-level=warning"),
            "peer",
            tunings=((1, 0.0),),
        ),
        SystemUnderTest("LitServe", LITSERVE, "peer", tunings=WAITS),
        SystemUnderTest(
            "BentoML",
            ("-m", "bentoml", "serve", "ditserve.bench.peers.bentoml_server:BentoMLPeer", "--port={port}"),
            "bentoml",
            wait_s=60.0,
            tunings=BENTOML_LIMITS,
        ),
        SystemUnderTest("Ray Serve", ("-m", "ditserve.bench.peers.ray_server"), "ray", tunings=WAITS),
        SystemUnderTest("LitServe + our ONNX", LITSERVE, "peer", graphs=True, tunings=WAITS),
    )
}


def served_bundle(model: Path) -> Path:
    """Return the bundle that is served of a model: itself, or that beside what diffusers saved."""
    return model / "bundle" if has_diffusers(model) else model


def has_diffusers(model: Path) -> bool:
    """Return whether peers run diffusers' own network; of a bundle they run its network in PyTorch."""
    return (model / TRANSFORMER).is_dir()


@asynccontextmanager
async def running_server(system: SystemUnderTest, setup: ServerSetup) -> AsyncIterator[RunningServer]:
    """Run a server until it is ready, and stop it with all that it started afterwards.

    Raises:
        ServerFailed: it ended, or was not ready in time.
    """
    port = free_port()
    url, adapter = f"http://127.0.0.1:{port}", ADAPTERS[system.adapter](setup.drawing)
    bundle = served_bundle(setup.model)
    with tempfile.TemporaryDirectory(prefix="dit-bench-") as name:
        folder = Path(name)
        PeerOptions(
            model=str(setup.model),
            bundle=str(bundle),
            graphs=system.graphs,
            port=port,
            threads=setup.threads,
            batch=system.batch,
            wait_s=system.wait_s,
            cap=system.cap,
        ).write(folder)
        words = [word.format(port=port, bundle=bundle, threads=setup.threads) for word in system.command]
        python = sys.executable if system.ours else str(setup.python.absolute())
        environment = [f"PYTHONPATH={ROOT}", "RAY_USAGE_STATS_ENABLED=0", "BENTOML_DO_NOT_TRACK=True"]
        log = folder / "log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *NICE, *environment, python, *words, cwd=folder, stdout=output, stderr=output
            )
        try:
            await _wait_ready(url + adapter.ready, process, log)
            yield RunningServer(url, process.pid, adapter)
        finally:
            await _stop(process)


async def _wait_ready(url: str, process: asyncio.subprocess.Process, log: Path) -> None:
    async with httpx.AsyncClient(trust_env=False) as http:
        for _ in range(round(READY_TIMEOUT_S / POLL_S)):
            if process.returncode is not None:
                break
            try:
                if (await http.get(url)).is_success:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(POLL_S)
    raise ServerFailed("the server did not become ready:\n" + _last_output(log))


def _last_output(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Ask a server to end; after `STOP_TIMEOUT_S` kill it, and kill all that it started in any case."""
    tree = process_tree(process.pid)
    if process.returncode is None:
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
    except TimeoutError:
        process.kill()
    await process.wait()
    for pid in tree[1:]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue

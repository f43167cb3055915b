"""Measure the memory that a large model takes on its way: import, export, and a worker that draws.

    python -m bench.memory [--network DiT-XL/2] [--half auto]
    python -m bench.memory --pipeline 24

The weights are random, in the published layout and in fp32, over 32×32 pixels of three channels, so that no
autoencoder takes part. Every command is a process of its own, whose peak of resident memory counts: the pages
of files that it maps too. The export verifies few rows, and leaves out the ladder and the golden image, which
take hours and no more memory. Writes bench/results/memory.json.

With `--pipeline` it is a pipeline of diffusers with so many layers of Stable Diffusion 3 medium, in fp16 and
with small text encoders, for pictures of 128×128; 24 are the whole model of two billion parameters. It is
also served in fp16, by torch. Writes bench/results/memory-pipeline.json.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from ditserve.bench import report
from ditserve.bench.load.processes import free_port, process_tree
from ditserve.bench.load.wire import exchange
from ditserve.bench.machine.networks import random_network
from ditserve.bench.machine.pipelines import write_sd3
from ditserve.bench.startup import image_request, started_service
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.command_line import named_path, positive
from ditserve.model.spec.dit_config import published_config
from ditserve.model.spec.heap import release_memory
from ditserve.model.weights.official import to_official

# A child begins with the peak of the process that started it, so that a small process must start it.
_MEASURE = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""
# The largest peaks that are meant to be, in sizes of the weights.
GOALS = {"import": 1.3, "export": 2.2, "worker": 1.5}
FEW_ROWS = ("--samples", "1", "--steps", "2", "--golden", "none", "--ladder", "none")
PATIENCE_S = 900.0


def command_peak(*words: str) -> tuple[int, str]:
    """Run `python WORDS`; return the peak of its resident memory in bytes, and what it printed.

    Raises:
        RuntimeError: the command fails.
    """
    command = [sys.executable, "-c", _MEASURE, sys.executable, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"python {' '.join(words)} failed: {done.stderr.strip()[-2000:]}")
    return int(done.stdout) * 1024, done.stderr


async def worker_peak(bundle: Path, *flags: str) -> int:
    """Start the service, and return the peak of its worker's resident memory in bytes after one image."""
    request, port = image_request(Bundle.open(bundle, verify=False).manifest, steps=1), free_port()
    async with started_service(bundle, port, *flags, patience_s=PATIENCE_S) as (child, _):
        await exchange(port, iter([request]), connections=1, n=1)
        # No other process of the service has a model.
        return max(map(_peak, process_tree(child.pid)))


def _peak(pid: int) -> int:
    match = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def measure(options: argparse.Namespace, folder: Path) -> tuple[int, dict[str, int]]:
    """Return the bytes of the weights in fp32, and the peak of each command in bytes."""
    checkpoint, bundle, served = folder / "checkpoint.safetensors", folder / "bundle", folder / "served"
    network = random_network(published_config(options.network, in_channels=3, learn_sigma=False))
    save_file(to_official(network.state_dict(), network.config), checkpoint)
    size = sum(parameter.nbytes for parameter in network.parameters())
    del network
    release_memory()
    peaks = {}
    words = ("-m", "ditserve.model.convert", "import", str(checkpoint), str(bundle))
    peaks["import"], _ = command_peak(*words, "--licence", "none", "--predicts-noise")
    checkpoint.unlink()
    words = ("-m", "ditserve.export.onnx", str(bundle), "--out", str(served))
    peaks["export"], told = command_peak(*words, *FEW_ROWS, "--half", options.half)
    print(told, file=sys.stderr, end="")
    peaks["worker"] = asyncio.run(worker_peak(served))
    return size, peaks


def measure_pipeline(layers: int, folder: Path) -> tuple[int, dict[str, int]]:
    """Return the same of an imported pipeline."""
    source, bundle, served = folder / "pipeline", folder / "bundle", folder / "served"
    size = 2 * write_sd3(source, layers=layers)
    peaks, sizes = {}, ("--size", "16", "16", "--licence", "none")
    peaks["import"], _ = command_peak(
        "-m", "ditserve.model.convert", "import", str(source), str(bundle), *sizes
    )
    peaks["export"], _ = command_peak(
        "-m", "ditserve.export.onnx", str(bundle), "--out", str(served), *FEW_ROWS
    )
    peaks["worker"] = asyncio.run(worker_peak(served))
    peaks["worker in fp16"] = asyncio.run(worker_peak(bundle, "--backend=torch", "--precision=fp16"))
    return size, peaks


def peaks_table(network: str, size: int, peaks: Mapping[str, int]) -> Table:
    rows = [
        [command, f"{peak / 1e9:.2f}", f"{peak / size:.2f}", f"{GOALS[command.partition(' ')[0]]:.1f}"]
        for command, peak in peaks.items()
    ]
    title = f"peak of resident memory, {network}, weights of {size / 1e9:.2f} GB in fp32"
    return report.table(title, ["", "GB", "of the weights", "goal"], rows, text={""})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("memory", __doc__)
    parser.add_argument("--network", default="DiT-XL/2", help="a published size")
    parser.add_argument("--half", default="auto", help="the half-precision backbone of the export")
    parser.add_argument("--pipeline", type=positive, help="layers of an SD3 to bring in instead, 24 for all")
    parser.add_argument(
        "--folder", type=named_path, help="where the files lie meanwhile; default: of the system"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options, console, background = parse(arguments), Console(), report.BackgroundLoad()

    def work() -> None:
        with TemporaryDirectory(prefix="dit-", dir=options.folder) as folder:
            if options.pipeline:
                size, peaks = measure_pipeline(options.pipeline, Path(folder))
            else:
                size, peaks = measure(options, Path(folder))
        name = f"{options.pipeline} layers of SD3" if options.pipeline else options.network
        console.print(peaks_table(name, size, peaks))
        file = "memory-pipeline" if options.pipeline else "memory"
        report.save(file, options, background, {"weights_bytes": size, "peak_bytes": peaks})

    return report.run_command("memory", work)


if __name__ == "__main__":
    sys.exit(main())

"""The processor time, memory and forward passes of a server, seen from outside (Linux)."""

from __future__ import annotations

import os
import re
import socket
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from ditserve.bench.report import MIB, TICKS_PER_S

_BATCH_ROWS = re.compile(r"^dit_batch_rows_(sum|count)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process in bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def processor_seconds(pid: int) -> float:
    """Return the processor time that all threads of a process have used."""
    return _used_seconds(Path(f"/proc/{pid}/stat"))


def main_thread_seconds(pid: int) -> float:
    """Return the processor time that the main thread of a process has used: in Python, its event loop."""
    return _used_seconds(Path(f"/proc/{pid}/task/{pid}/stat"))


def _used_seconds(stat: Path) -> float:
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def process_tree(pid: int) -> list[int]:
    """Return a process and all its descendants, the process first."""
    children: dict[int, list[int]] = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            # The process ended meanwhile.
            continue
        children[parent].append(int(stat.parent.name))
    tree = [pid]
    for member in tree:
        tree += children[member]
    return tree


@dataclass(frozen=True, slots=True)
class Consumption:
    """Processor seconds so far and memory now, of a process tree.

    A page that processes share counts once for each.
    """

    processor_s: float
    resident_mib: float

    @classmethod
    def of(cls, pid: int) -> Consumption:
        processor_s = resident = 0.0
        for member in process_tree(pid):
            try:
                processor_s += processor_seconds(member)
                resident += resident_bytes(member)
            except (FileNotFoundError, ProcessLookupError):
                continue
        return cls(processor_s, resident / MIB)


def batch_counters(metrics: str) -> tuple[float, float]:
    """Return the rows and the forward passes so far, from the text of the service's `/metrics`."""
    totals = {"sum": 0.0, "count": 0.0}
    for part, value in _BATCH_ROWS.findall(metrics):
        totals[part] += float(value)
    return totals["sum"], totals["count"]

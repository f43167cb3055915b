"""The metrics and their names: the only file that knows prometheus_client.

The instruments are the constants below; the code that does the work observes into them. Several processes of
one host share them through memory-mapped files in the folder that `PROMETHEUS_MULTIPROC_DIR` names when they
start (the all-in-one sets it), so the API's `/metrics` there includes the workers. A worker on its own host
serves its own (`serve`). Figures of the queue are no instruments: they are read at scrape time from a load
snapshot in Redis. No label names a user, and no name holds a colon.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Summary,
    disable_created_metrics,
    generate_latest,
    multiprocess,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ditserve.service.errors import ERRORS
from ditserve.service.fleet import LoadSnapshot
from ditserve.service.formats import CONTENT_TYPES
from ditserve.service.planning.capacity import drain_time
from ditserve.service.planning.load import backlog_workers, networks
from ditserve.service.telemetry.gpus import gpus

CONTENT_TYPE = CONTENT_TYPE_LATEST
disable_created_metrics()  # type: ignore[no-untyped-call]

_WAITS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300)
_STEPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)
_RATIOS = (0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2, 4)

Labelled = TypeVar("Labelled", Counter, Histogram, Summary)


def _at_zero(metric: Labelled, *values: str) -> Labelled:
    """Return a metric of one label with a series at 0 for each known value: a rate needs two points.

    The values of other labels are known to other modules, which make their series when they start.
    """
    for value in values:
        metric.labels(value)
    return metric


# The API's.
REQUESTS = Counter("dit_requests", "Requests by route and outcome", ["route", "outcome"])
REQUEST_SECONDS = Histogram("dit_request_seconds", "Time to answer a request", ["route"], buckets=_WAITS)
REQUESTS_IN_PROGRESS = Gauge(
    "dit_requests_in_progress", "Requests being answered", multiprocess_mode="livesum"
)
CANARY = Counter(
    "dit_canary", "Drawings of the golden image, by outcome: same, drifted, skipped", ["model", "outcome"]
)
CANARY_PSNR = Gauge(
    "dit_canary_psnr_db",
    "Likeness of the last drawing to the golden image",
    ["model"],
    multiprocess_mode="livemin",
)
REFUSED = _at_zero(Counter("dit_refused", "Requests refused, by error code", ["code"]), *ERRORS)
ADMITTED_DEGRADED = Counter("dit_admitted_degraded", "Jobs admitted on a lower rung than asked for", ["rung"])
REUSE = _at_zero(
    Counter(
        "dit_reuse",
        "Requests while images are reused: answered with stored ones (hit), with those of a job that ran "
        "(joined), or drawn (miss)",
        ["outcome"],
    ),
    *("hit", "joined", "miss"),
)
CALLBACKS = _at_zero(
    Counter(
        "dit_callbacks",
        "Callbacks of ended jobs: delivered, failed tries that are made again, and given up",
        ["outcome"],
    ),
    *("delivered", "failed", "given-up"),
)
OFFERED = Counter(
    "dit_offered_worker_seconds",
    "Work asked for, in seconds of one worker: as asked, whether accepted, degraded or refused",
    ["model"],
)
ADMISSION_MARGIN = Gauge(
    "dit_admission_margin",
    "Predicted times are stretched by this before a deadline is promised; it follows broken promises",
    ["model"],
    multiprocess_mode="livemax",
)

# A worker's.
OUTCOMES = ("done", "failed", "cancelled", "lost", "handed-back")
JOBS = _at_zero(Counter("dit_jobs", "Jobs a worker ended, by outcome", ["outcome"]), *OUTCOMES)
IMAGES = _at_zero(Counter("dit_images", "Images made", ["format"]), *CONTENT_TYPES)
QUEUE_WAIT_SECONDS = Histogram("dit_queue_wait_seconds", "Time from submission to first step", buckets=_WAITS)
STEP_SECONDS = Histogram(
    "dit_step_seconds", "Time from the end of one step to the end of the next", ["backend"], buckets=_STEPS
)
BATCH_ROWS = _at_zero(
    Histogram(
        "dit_batch_rows", "Rows of a forward pass, by why it grew no further", ["stop_reason"], buckets=_ROWS
    ),
    *("cap", "idle"),
)
PREDICTION_RATIO = Histogram("dit_step_prediction_ratio", "Actual over predicted step time", buckets=_RATIOS)
DELIVERY_SECONDS = Histogram(
    "dit_delivery_seconds",
    "Time from the last step to the answer, for which promises leave room",
    buckets=_WAITS,
)
DECODE_SECONDS = Histogram("dit_decode_seconds", "Time to decode latents into pixels", buckets=_STEPS)
ENCODE_SECONDS = _at_zero(
    Histogram("dit_encode_seconds", "Time to encode an image file", ["format"], buckets=_STEPS),
    *CONTENT_TYPES,
)
STEPS_REQUESTED = Counter("dit_steps_requested", "Steps that finished samples asked for")
STEPS_EXECUTED = Counter("dit_steps_executed", "Steps that finished samples ran")
DELIVERED_QUALITY = _at_zero(
    Summary(
        "dit_delivered_quality",
        "Measured distance of the rungs that images were asked for on, and drawn on; lower is better",
        ["kind"],
    ),
    *("asked", "drawn"),
)
DEGRADED = Counter("dit_degraded", "Samples finished on a lower rung than asked for", ["rung"])
NUMERICAL_ERRORS = Counter(
    "dit_numerical_errors", "Samples that failed because their numbers were not finite"
)
NETWORK_INFO = Gauge(
    "dit_network_info",
    "1, with what computes the network and in which numbers",
    ["backend", "precision"],
    multiprocess_mode="livemax",
)
CACHE_HITS = Counter("dit_cache_hits", "Condition states found in the cache", ["cache"])
CACHE_MISSES = Counter("dit_cache_misses", "Condition states computed", ["cache"])
CACHE_BYPASS = Counter("dit_cache_bypass", "Condition states computed without asking the cache", ["cache"])
CACHE_EVICTIONS = Counter("dit_cache_evictions", "Condition states given up for others", ["cache"])
CACHE_BYTES = Gauge(
    "dit_cache_bytes", "Memory of the condition caches", ["cache"], multiprocess_mode="livesum"
)
LEASES_EXPIRED = Counter("dit_leases_expired", "Leases that ran out and went back to the queue")

# Every process's.
REDIS_EVICTS = Gauge(
    "dit_redis_evicts", "1 when Redis may evict accepted jobs (maxmemory-policy)", multiprocess_mode="livemax"
)
CLOCK_OFFSET_SECONDS = Gauge(
    "dit_clock_offset_seconds",
    "The clock of this host ahead of that of Redis, which counts",
    multiprocess_mode="livemostrecent",
)
UNREADABLE = _at_zero(
    Counter("dit_unreadable", "Messages of the queue that could not be read, by what they are", ["message"]),
    *("job", "result", "error", "event", "report"),
)
# Activities that last have a series from their beginning on.
FAULTS = _at_zero(
    Counter("dit_faults", "Unforeseen errors that a process went on after", ["activity"]),
    *("working on jobs", "engine command", "observing a step"),
)
RESIDENT_BYTES = Gauge("dit_resident_memory_bytes", "Memory in use", ["role"], multiprocess_mode="livesum")
# All workers of a host report the same GPUs.
GPU_USED_BYTES = Gauge(
    "dit_gpu_memory_used_bytes", "Memory of a GPU in use, by anybody", ["gpu"], multiprocess_mode="livemax"
)
GPU_TOTAL_BYTES = Gauge("dit_gpu_memory_total_bytes", "Memory of a GPU", ["gpu"], multiprocess_mode="livemax")
BUILD_INFO = Gauge(
    "dit_build_info",
    "1, with what is running",
    ["version", "model", "model_version"],
    multiprocess_mode="max",
)


class LoadCollector(Collector):
    """Reports the queue and the workers of each model from `loads`, and whether Redis answers."""

    def __init__(self, loads: Mapping[str, LoadSnapshot], *, redis_up: bool) -> None:
        self._loads, self._redis_up = loads, redis_up

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("dit_redis_up", "1 when Redis answers", value=float(self._redis_up))
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for model, load in self._loads.items():
            for name, (help_text, value) in _figures(load).items():
                kind = CounterMetricFamily if name in _COUNTED else GaugeMetricFamily
                family = families.setdefault(name, kind(name, help_text, labels=["model"]))
                family.add_metric([model], float(value))
        yield from families.values()
        promises = CounterMetricFamily(
            "dit_promises", "Accepted deadlines: kept, broken", labels=["model", "outcome"]
        )
        for model, load in self._loads.items():
            promises.add_metric([model, "kept"], float(load.kept))
            promises.add_metric([model, "broken"], float(load.broken))
        yield promises


class _SharedCollector(Collector):
    """Reports the metrics of all processes that share a folder.

    The library's own takes the folder's path for a pattern, in which "[" and "*" mean something.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Metric]:
        files = [str(file) for file in self._folder.glob("*.db")]
        yield from multiprocess.MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]


# The figures that only grow, and so are counters.
_COUNTED = {"dit_jobs_dead", "dit_orphans"}


def _figures(load: LoadSnapshot) -> dict[str, tuple[str, float]]:
    """Return the help text and the value of each metric."""
    workers = load.workers
    return {
        "dit_queue_depth": ("Jobs waiting", load.queued_jobs),
        "dit_queue_rows": ("Row-steps waiting", load.queued_rows),
        "dit_queue_oldest_age_seconds": ("Age of the oldest waiting job", load.oldest_age_s),
        "dit_workers": ("Workers alive", len(workers)),
        "dit_networks": (
            "Backends and precisions of the workers of one bundle; above 1 a seed is not one image",
            networks(load),
        ),
        "dit_running_samples": ("Samples being denoised", sum(worker.running_samples for worker in workers)),
        "dit_backlog_rows": (
            "Row-steps claimed and not yet run",
            sum(worker.backlog_rows for worker in workers),
        ),
        "dit_backlog_seconds": ("Predicted time to run all that is claimed and waiting", drain_time(load)),
        "dit_backlog_workers": (
            "Workers that would finish by its deadlines all that was accepted",
            backlog_workers(load),
        ),
        "dit_jobs_dead": ("Jobs put aside after too many attempts", load.dead_jobs),
        "dit_orphans": ("Jobs lost because Redis no longer held their record", load.orphans),
    }


def exposition(loads: Mapping[str, LoadSnapshot], *, redis_up: bool, shared: Path | None) -> bytes:
    """Return the metrics in Prometheus' text format.

    They are those of all processes that share the folder `shared` (of this process alone if None), and the
    load of each model.
    """
    registry = CollectorRegistry()
    registry.register(LoadCollector(loads, redis_up=redis_up))
    if shared is None:
        return generate_latest(REGISTRY) + generate_latest(registry)
    registry.register(_SharedCollector(shared))
    return generate_latest(registry)


def forget(pid: int, *, shared: Path) -> None:
    """Drop the live gauges of a process that ended. Its counters and histograms stay."""
    for file in shared.glob(f"gauge_live*_{pid}.db"):
        file.unlink(missing_ok=True)


def observe_memory(role: str) -> None:
    """Record this process's resident memory under `role`, "api" or "worker"; for a worker also its GPUs'.

    Platforms without `/proc` record no resident memory.
    """
    statm = Path("/proc/self/statm")
    if statm.exists():
        RESIDENT_BYTES.labels(role).set(int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    for gpu in gpus() if role == "worker" else ():
        GPU_USED_BYTES.labels(str(gpu.index)).set(gpu.used)
        GPU_TOTAL_BYTES.labels(str(gpu.index)).set(gpu.total)


def serve(port: int, *, address: str = "0.0.0.0") -> None:
    """Serve this process's own metrics from a thread, for a worker on its own host.

    Raises:
        ValueError: the port is taken; the message names the remedy.
    """
    try:
        start_http_server(port, addr=address)
    except OSError as error:
        raise ValueError(
            f"cannot serve metrics on {address}:{port} ({error.strerror}); "
            "choose another with --worker-metrics-port"
        ) from None

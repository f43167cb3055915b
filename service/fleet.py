"""The fleet as its workers report it, and the load that admission sees. Pure.

Frozen dataclasses. A field with a default was added in a later release: a message without it is read with the
default.
"""

from __future__ import annotations

from dataclasses import dataclass

from ditserve.service.wire import Endless, Message, WireError, build, unpack

# A worker that reports a longer step, or a larger pass, is not believed.
LONGEST_STEP_S = 86400.0
MOST_ROWS = 65536


@dataclass(frozen=True, slots=True)
class DemandBucket:
    """Row-steps due at the time `at` (infinite: at no time).

    `rows` counts them as planned, `floor_rows` at the lowest rungs that their requests consent to.
    """

    at: Endless
    rows: int
    floor_rows: int


@dataclass(frozen=True, slots=True)
class Network:
    """The runtime of a worker's network: the backend, its numbers and kernels, and the sizes it can run.

    It runs every size whose height and width are multiples of `size_multiple` latent pixels, and whose frames
    or depth are multiples of `first_multiple`; None: the model's own size only.
    """

    backend: str = ""
    precision: str = ""
    size_multiple: int | None = None
    kernels: str = ""
    first_multiple: int = 1

    def __str__(self) -> str:
        return " ".join(part for part in (self.backend, self.precision, self.kernels) if part)


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """A low-rank adapter that a worker has loaded."""

    name: str
    version: str
    rank: int = 0


@dataclass(frozen=True, slots=True)
class SlowSpell:
    """A slowness to reckon with: over `over_s` seconds passes may take `factor` times the reported time."""

    over_s: float
    factor: float


@dataclass(frozen=True, slots=True)
class WorkerState(Message):
    """A worker's report: its cost model, where a step takes `fixed + per_row·rows` seconds, and its backlog.

    `dues` is the backlog by deadline; it is empty where there is none, or where the worker does not report
    it. `given_rows` are the rows that the queue ever gave to this worker, as its last claim said: rows given
    later are not in the backlog yet. Without a step for `hang_s` seconds it hangs; 0: it does not say.
    `batch_rows` are the rows of its batches while there is enough work, where its costs are exact; 0: it does
    not say. `adapters` are those that it has loaded; None: its backend takes none. `formats` are those that
    it writes beyond the ones that every worker does.
    """

    worker: str
    models: tuple[str, ...]
    max_rows: int
    step_fixed_s: float
    step_per_row_s: float
    decode_s: float
    running_samples: int
    backlog_rows: int
    last_step_age_s: float
    updated_at: float
    network: Network = Network()
    dues: tuple[DemandBucket, ...] = ()
    bundle: str = ""  # digest of the manifest it serves
    given_rows: int = 0
    slow: tuple[SlowSpell, ...] = ()  # the shortest first
    hang_s: float = 0.0
    batch_rows: int = 0
    adapters: tuple[LoadedAdapter, ...] | None = None
    formats: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Starting(Message):
    """A worker's report before it can take jobs: its activity, such as "warming up"."""

    worker: str
    model: str
    doing: str


def read_report(data: bytes) -> WorkerState | Starting:
    """Return what a worker published. Raise `WireError` for anything that is no report to reckon with."""
    fields = unpack(data)
    if "max_rows" not in fields:
        return build(Starting, fields)
    state = build(WorkerState, fields)
    times = (state.step_fixed_s, state.step_per_row_s, state.decode_s)
    if not all(0.0 <= seconds <= LONGEST_STEP_S for seconds in times):
        raise WireError(f"not a worker state: a step of less than 0 or more than {LONGEST_STEP_S:.0f} s")
    if not (1 <= state.max_rows <= MOST_ROWS and 0 <= state.batch_rows <= MOST_ROWS):
        raise WireError(f"not a worker state: passes of {state.batch_rows} to {state.max_rows} rows")
    return state


@dataclass(frozen=True, slots=True)
class LoadSnapshot:
    """The queue and the workers alive at `taken_at`, as admission sees them."""

    queued_jobs: int
    queued_rows: int
    oldest_age_s: float
    workers: tuple[WorkerState, ...]
    taken_at: float
    dead_jobs: int = 0  # put aside since the queue began, whether requeued later or not
    starting: tuple[Starting, ...] = ()  # workers that cannot take jobs yet
    orphans: int = 0  # jobs ever lost: their record was gone while they waited or ran
    kept: int = 0  # deadlines ever kept …
    broken: int = 0  # … and not kept; neither where the job ended before for another reason

"""Fair shares of the machine: which flow is ahead of the others, and which sample therefore has its turn.

A flow is a caller at one priority, as in the queue, and the priority gives its weight. Start-time fair
queueing (Goyal et al. 1996): every pass is charged to the flows whose rows it ran, divided by their weights,
and the flow that was charged least is next. The unit is a row of the bundle's own size in a full pass, and
not a second: a machine that is ten times as slow for a while leaves no debts ten times as large. A flow
starts level with the one furthest behind, so nobody saves up a share that he did not use. Of the sizes of
one flow the one with the earliest deadline is next. Samples without a deadline share their flow's part by
size, weighted by the rows that wait, so that small and large ones advance equally fast.

Deadlines come before shares, but not at any price. A sample without laxity goes first, until its flow is
ahead by so many passes as the shortest sample of another flow has steps, and by `LONGEST_LEAD` at most, or by
`FIRST_STEP_LEAD` if another flow has not begun. From then on its flow has its fair share. So the deadlines of
one caller add no more than its own length to the time that another's sample takes, and a newcomer's first
step comes soon.

Pure: no clock, no arrays.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heapreplace
from itertools import chain
from math import inf
from operator import attrgetter
from typing import Final, Generic, NamedTuple, Protocol, TypeAlias, TypeVar

# The passes by which deadlines may bring a flow ahead of another, and of one that has not begun.
LONGEST_LEAD: Final = 64
FIRST_STEP_LEAD: Final = 4


class Flow(NamedTuple):
    """A caller at one priority, which gives the weight of its share."""

    caller: str
    weight: float


class Shared(Protocol):
    """A sample whose flow shares the machine with others. `taken` and `steps` are steps done, and all."""

    @property
    def flow(self) -> Flow: ...
    @property
    def rows(self) -> int: ...
    @property
    def taken(self) -> int: ...
    @property
    def steps(self) -> int: ...


S_co = TypeVar("S_co", bound=Shared, covariant=True)
S = TypeVar("S", bound=Shared)
K = TypeVar("K", bound=Hashable)


class Turn(NamedTuple, Generic[S_co]):
    """A sample that could step next.

    `size` names the size of its rows. `cost` is that of its next step, and `full_cost` that of a full pass of
    its size. `due` orders the samples of a flow. `urgent`: it has no laxity. `waits`: it loses by waiting,
    which is not so for one that will be in time all the same.
    """

    sample: S_co
    size: Hashable
    due: float
    urgent: bool
    waits: bool
    cost: float
    full_cost: float

    @property
    def patient(self) -> bool:
        """True for a sample without a deadline."""
        return self.waits and not self.urgent


TurnsByFlow: TypeAlias = Mapping[Flow, Sequence[Turn[S]]]


class Leads(Generic[K]):
    """The cost by which each key is ahead of the one furthest behind, per unit of its weight."""

    def __init__(self) -> None:
        self._leads: dict[K, float] = {}  # without those that are level with the one furthest behind

    def __getitem__(self, key: K) -> float:
        return self._leads.get(key, 0.0)

    def charge(self, key: K, cost: float) -> None:
        self._leads[key] = self[key] + cost

    def level(self, present: Iterable[K]) -> None:
        """Measure all leads from that of the one furthest behind among those present."""
        behind = min(self[key] for key in present)
        self._leads = {key: lead - behind for key, lead in self._leads.items() if lead > behind}


class FairShares:
    """The leads of all flows, and of the sizes of each flow. Its methods take all turns by their flow."""

    def __init__(self) -> None:
        self._flows: Leads[Flow] = Leads()
        self._sizes: dict[Flow, Leads[Hashable]] = {}  # of flows that have several sizes

    def first(self, flows: TurnsByFlow[S]) -> set[Flow]:
        """Return the flows whose samples without laxity go before all others.

        Example: caller A has had 48 rows more than B, and a full pass has 8: it is ahead by 6 passes. The
        shortest sample of B has 5 steps, so A's deadlines no longer go first. They would if it had 50.
        """
        if len(flows) == 1:
            return set(flows)
        patience = {flow: _patience(turns) for flow, turns in flows.items()}
        shortest = sorted(patience, key=patience.__getitem__)[:2]
        first = set()
        for flow, turns in flows.items():
            passes = next(patience[other] for other in shortest if other != flow)
            if self._flows[flow] * flow.weight <= passes * turns[0].full_cost:
                first.add(flow)
        return first

    def next_size(self, flows: TurnsByFlow[S], first: Collection[Flow]) -> Hashable:
        """Return the size of the turn that comes before all others."""

        def key(turn: Turn[S]) -> tuple[float, ...]:
            flow = turn.sample.flow
            if turn.urgent and flow in first:
                return 0, turn.due
            return 1, self._flows[flow], not turn.urgent, turn.due

        next_turn = min(chain.from_iterable(flows.values()), key=key)
        if not next_turn.patient:
            return next_turn.size
        flow = next_turn.sample.flow
        leads = self._sizes.get(flow) or Leads()
        patient = (turn for turn in flows[flow] if turn.patient)
        return min(patient, key=lambda turn: (leads[turn.size], turn.due)).size

    def order(self, flows: TurnsByFlow[S], first: Collection[Flow], size: Hashable) -> Iterator[Turn[S]]:
        """Yield the turns of one size in the order in which a pass takes them in.

        Those that go first come by deadline, then the flows by what each would have had.
        """
        going_first: list[Turn[S]] = []
        heads: list[tuple[float, float, int, int, Sequence[Turn[S]]]] = []
        for number, (flow, turns) in enumerate(flows.items()):
            queue = sorted((turn for turn in turns if turn.size == size), key=_in_flow)
            urgent = bisect_left(queue, True, key=lambda turn: not turn.urgent) if flow in first else 0
            going_first += queue[:urgent]
            if len(queue) > urgent:
                lead = self._flows[flow] + sum(turn.cost for turn in queue[:urgent]) / flow.weight
                heads.append((lead, queue[urgent].due, number, urgent, queue))
        yield from sorted(going_first, key=attrgetter("due"))
        heapify(heads)
        while heads:
            lead, _, number, at, waiting = heads[0]
            turn, after = waiting[at], at + 1
            yield turn
            if after < len(waiting):
                ahead = lead + turn.cost / turn.sample.flow.weight
                heapreplace(heads, (ahead, waiting[after].due, number, after, waiting))
            else:
                heappop(heads)

    def charge(
        self, flows: TurnsByFlow[S], chosen: Sequence[Turn[S]], cost: float, slowed: Collection[Flow] = ()
    ) -> None:
        """Charge a pass to the turns chosen, in proportion to their own cost.

        A flow loses by turns that were not chosen, and it loses if it is `slowed`: the pass takes longer than
        its share of the machine allows. One that lost nothing in this pass is charged no less than those that
        did, on average: it had all it could use, and saves nothing up.

        Example: a pass has 8 rows. Flow A has one sample of 2 rows, B and C have many, and 3 rows each of the
        pass. A is charged 3 rows as well, so B and C will not have to wait when A brings more.
        """
        rate = cost / sum(turn.cost for turn in chosen)
        charges = dict.fromkeys(flows, 0.0)
        for turn in chosen:
            charges[turn.sample.flow] += rate * turn.cost
        self._charge_sizes(flows, chosen, rate)
        taken = set(map(id, chosen))
        losing = {flow for flow, turns in flows.items() if flow in slowed or _loses(turns, taken)}
        if not losing or len(flows) == 1:
            self._flows = Leads()
            return
        least = sum(charges[flow] for flow in losing) / sum(flow.weight for flow in losing)
        for flow, charge in charges.items():
            share = charge / flow.weight
            self._flows.charge(flow, share if flow in losing else max(share, least))
        self._flows.level(charges)

    def _charge_sizes(self, flows: TurnsByFlow[S], chosen: Sequence[Turn[S]], rate: float) -> None:
        """Charge a pass to its size in every flow, by what a step of all its patient samples costs."""
        size = chosen[0].size
        several: dict[Flow, Leads[Hashable]] = {}
        for flow, turns in flows.items():
            costs: dict[Hashable, float] = {}
            for turn in turns:
                if turn.patient:
                    costs[turn.size] = costs.get(turn.size, 0.0) + turn.cost
            if len(costs) < 2:
                continue
            leads = several[flow] = self._sizes.get(flow) or Leads()
            taken = sum(turn.cost for turn in chosen if turn.patient and turn.sample.flow == flow)
            if taken:
                leads.charge(size, rate * taken / costs[size])
            leads.level(costs)
        self._sizes = several


def _in_flow(turn: Turn[S]) -> tuple[bool, float]:
    """Return the sort key of the turns of one flow."""
    return not turn.urgent, turn.due


def _begun(turns: Iterable[Turn[S]]) -> bool:
    return any(turn.sample.taken for turn in turns)


def _patience(turns: Sequence[Turn[S]]) -> float:
    """Return the passes for which the deadlines of others may hold up a flow."""
    if not _begun(turns):
        return FIRST_STEP_LEAD
    shortest = min((turn.sample.steps for turn in turns if turn.waits), default=inf)
    return inf if shortest == inf else min(LONGEST_LEAD, shortest)


def _loses(turns: Sequence[Turn[S]], taken: Collection[int]) -> bool:
    """Return whether a flow loses by the turns that are not `taken`."""
    left_out = [turn for turn in turns if id(turn) not in taken]
    return any(turn.waits for turn in left_out) or (bool(left_out) and not _begun(turns))

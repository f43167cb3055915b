"""Fair shares of the machine: which flow is ahead of the others, and which sample therefore has its turn.

A flow is a caller at one priority, as in the queue, and the priority gives its weight. Start-time fair
queueing (Goyal et al. 1996): every pass is charged to the flows whose rows it ran, divided by their weights,
and the flow that was charged least is next. The unit is a row of the bundle's own size in a full pass, and
not a second: a machine that is ten times as slow for a while leaves no debts ten times as large. A flow
starts level with the one furthest behind, so nobody saves up a share that he did not use. The sizes of one
flow share its part in the same way, weighted by the rows that wait, so that samples of small and of large
sizes advance equally fast.

Deadlines come before shares, but not at any price. A sample without laxity goes first, until its flow is
ahead by so many passes as the shortest sample of another flow has steps, and by `LONGEST_LEAD` at most, or by
`FIRST_STEP_LEAD` if another flow has not begun. From then on its flow has its fair share. So the deadlines of
one caller add no more than its own length to the time that another's sample takes, and a newcomer's first
step comes soon.

Pure: no clock, no arrays.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heapreplace
from math import inf
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

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
    """The leads of all flows, and of the sizes of each flow."""

    def __init__(self) -> None:
        self._flows: Leads[Flow] = Leads()
        self._sizes: dict[Flow, Leads[Hashable]] = {}  # of flows that have several sizes

    def first(self, turns: Collection[Turn[S]]) -> set[Flow]:
        """Return the flows whose samples without laxity go before all others.

        Example: caller A has had 48 rows more than B, and a full pass has 8: it is ahead by 6 passes. The
        shortest sample of B has 5 steps, so A's deadlines no longer go first. They would if it had 50.
        """
        patience = self._patience(turns)
        shortest = sorted(patience, key=patience.__getitem__)[:2]
        first = set()
        for flow, full_cost in {turn.sample.flow: turn.full_cost for turn in turns if turn.urgent}.items():
            passes = next((patience[other] for other in shortest if other != flow), inf)
            if self._flows[flow] * flow.weight <= passes * full_cost:
                first.add(flow)
        return first

    def leader(self, turns: Iterable[Turn[S]], first: Collection[Flow]) -> Turn[S]:
        """Return the turn that comes next of all; its size is that of the next pass. There must be one."""

        def key(turn: Turn[S]) -> tuple[float, ...]:
            flow = turn.sample.flow
            if turn.urgent and flow in first:
                return 0, turn.due
            ahead = self._sizes[flow][turn.size] if flow in self._sizes else 0.0
            return 1, self._flows[flow], ahead, not turn.urgent, turn.due

        return min(turns, key=key)

    def order(self, turns: Iterable[Turn[S]], first: Collection[Flow]) -> Iterator[Turn[S]]:
        """Yield the turns of one size in the order in which a pass takes them in.

        Those that go first come by deadline, then the flows by what each would have had.
        """
        leads: dict[Flow, float] = {}
        queues: dict[Flow, list[Turn[S]]] = {}
        for turn in sorted(turns, key=lambda turn: (not turn.urgent, turn.due)):
            flow = turn.sample.flow
            leads.setdefault(flow, self._flows[flow])
            if turn.urgent and flow in first:
                leads[flow] += turn.cost / flow.weight
                yield turn
            else:
                queues.setdefault(flow, []).append(turn)
        heads = [
            (leads[flow], queue[0].due, number, 0, queue)
            for number, (flow, queue) in enumerate(queues.items())
        ]
        heapify(heads)
        while heads:
            lead, _, number, at, queue = heads[0]
            turn, after = queue[at], at + 1
            yield turn
            if after < len(queue):
                ahead = lead + turn.cost / turn.sample.flow.weight
                heapreplace(heads, (ahead, queue[after].due, number, after, queue))
            else:
                heappop(heads)

    def charge(self, turns: Sequence[Turn[S]], chosen: Sequence[Turn[S]], cost: float) -> None:
        """Charge a pass to the turns chosen, in proportion to their own cost.

        A flow that lost nothing in this pass is charged no less than those that did, on average: it had all
        it could use, and saves nothing up.

        Example: a pass has 8 rows. Flow A has one sample of 2 rows, B and C have many, and 3 rows each of the
        pass. A is charged 3 rows as well, so B and C will not have to wait when A brings more.
        """
        rate = cost / sum(turn.cost for turn in chosen)
        taken = set(map(id, chosen))
        begun = _begun(turns)
        charges = {turn.sample.flow: 0.0 for turn in turns}
        losing = set()
        for turn in turns:
            flow = turn.sample.flow
            if id(turn) in taken:
                charges[flow] += rate * turn.cost
            elif turn.waits or flow not in begun:
                losing.add(flow)
        self._charge_sizes(turns, chosen[0].size, charges)
        if not losing:
            self._flows = Leads()
            return
        least = sum(charges[flow] for flow in losing) / sum(flow.weight for flow in losing)
        for flow, charge in charges.items():
            share = charge / flow.weight
            self._flows.charge(flow, share if flow in losing else max(share, least))
        self._flows.level(charges)

    def _charge_sizes(self, turns: Sequence[Turn[S]], size: Hashable, charges: Mapping[Flow, float]) -> None:
        """Charge a pass of one size to that size in every flow, by what a step of all its samples costs."""
        step_cost: dict[Flow, dict[Hashable, float]] = {}
        for turn in turns:
            of_flow = step_cost.setdefault(turn.sample.flow, {})
            of_flow[turn.size] = of_flow.get(turn.size, 0.0) + turn.cost
        self._sizes = {
            flow: self._sizes.get(flow) or Leads() for flow, sizes in step_cost.items() if len(sizes) > 1
        }
        for flow, leads in self._sizes.items():
            if size in step_cost[flow]:
                leads.charge(size, charges[flow] / step_cost[flow][size])
            leads.level(step_cost[flow])

    def _patience(self, turns: Collection[Turn[S]]) -> dict[Flow, float]:
        """Return the passes for which deadlines may hold up each flow that loses by waiting."""
        begun = _begun(turns)
        patience: dict[Flow, float] = {}
        for turn in turns:
            flow = turn.sample.flow
            if flow not in begun:
                patience[flow] = FIRST_STEP_LEAD
            elif turn.waits:
                patience[flow] = min(patience.get(flow, LONGEST_LEAD), turn.sample.steps)
        return patience


def _begun(turns: Iterable[Turn[S]]) -> set[Flow]:
    return {turn.sample.flow for turn in turns if turn.sample.taken}

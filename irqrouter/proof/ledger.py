"""The books of one vector: every event delivered exactly once, or recorded as a fault.

The guest's driver writes a *history* for every vector: what an event may become, one entry per change, in order.
An entry is the counter cell of a (vCPU, guest vector) pair, or :data:`FAULT` (the guest broke the translation),
or :data:`HELD` (masked or removed: nothing may happen). An entry is *acknowledged* once the verb which made it true
has returned.

An event signalled when entry ``a`` was the last acknowledged one, and accounted for when entry ``n`` was the newest
one, may have become what any entry from ``a`` to ``n`` says, once. That one sentence is rules I1, I2, I3 and I7:

* nothing within the time allowed: **lost** (time spent while ``HELD`` is the newest entry does not count);
* a pair, or a fault, which no entry from ``a`` to ``n`` names: **stale**;
* more outcomes than events: **duplicated**.

Events signalled before the previous one was accounted for may coalesce: at least one outcome must come after the last
of them. The books then know less: ``a`` is that of the oldest event which may still be open.

This file is pure: no shared memory, no clock.
"""

import enum
from collections.abc import Sequence
from typing import Final, Protocol, TypeAlias

import msgspec

from irqrouter.errors import InternalError

#: What an event may become: ``HELD``, ``FAULT``, or the number of a counter cell (always above both).
Outcome: TypeAlias = int

HELD: Outcome = 0
FAULT: Outcome = 1

#: History entries that a violation quotes before and after the acknowledged one.
_QUOTED_BEFORE: Final = 6
_QUOTED_AFTER: Final = 12


class Rule(enum.Enum):
    """The rule an event broke."""

    LOST = "lost"
    STALE = "stale"
    DUPLICATED = "duplicated"


class History(Protocol):
    """What the driver wrote about one vector. Entries are numbered from 0."""

    def newest(self) -> int:
        """The newest entry's number."""
        ...

    def acknowledged(self) -> int:
        """The number of the newest entry whose verb has returned."""
        ...

    def entries(self, first: int, last: int) -> Sequence[Outcome] | None:
        """Entries ``first`` to ``last``, both included. None when ``first`` is so old that it is no longer kept."""
        ...


class Violation(msgspec.Struct, frozen=True):
    """One broken rule.

    ``event`` counts the vector's events from 1. ``outcome`` is what happened; None when nothing did.
    ``acknowledged`` and ``newest`` are the ``a`` and ``n`` of the module's sentence; ``entries`` are a few from before
    ``a`` on, the first of which has the number ``first``.
    """

    rule: Rule
    vector: int
    event: int
    outcome: Outcome | None
    acknowledged: int
    newest: int
    first: int
    entries: tuple[Outcome, ...]


class Totals(msgspec.Struct, frozen=True):
    """Sums over events: ``events`` were signalled; ``delivered`` and ``faults`` are the outcomes seen."""

    events: int = 0
    delivered: int = 0
    faults: int = 0
    lost: int = 0
    stale: int = 0
    duplicated: int = 0

    def __add__(self, other: "Totals") -> "Totals":
        mine, theirs = msgspec.structs.astuple(self), msgspec.structs.astuple(other)
        return Totals(*(a + b for a, b in zip(mine, theirs, strict=True)))

    @property
    def coalesced(self) -> int:
        """Events that shared their outcome with another: what is left when all else is accounted for."""
        return self.events - self.lost - (self.delivered + self.faults - self.duplicated)

    @property
    def broken(self) -> bool:
        """Some rule was broken."""
        return bool(self.lost or self.stale or self.duplicated)


class Ledger:
    """The books of device vector ``vector``, kept by the device that fires it.

    An event is lost when nothing came of it in ``patience`` seconds.
    """

    def __init__(self, vector: int, history: History, *, patience: float) -> None:
        self.vector = vector
        self.events = self.delivered = self.faults = 0
        self.lost = self.stale = self.duplicated = 0
        self._history = history
        self._patience = patience
        self._open = 0
        self._due = 0
        self._valid_from = 0
        self._waited = 0.0

    @property
    def settled(self) -> bool:
        """There was an outcome after the last event: none is being waited for."""
        return self.delivered + self.faults >= self._due

    def signal(self) -> None:
        """Book one event. Call it *before* the eventfd is written, with every outcome seen so far counted.

        An acknowledgement between this and the write is not held against the event: the books are lenient by that
        much, and never accuse wrongly.
        """
        if not self._open:
            self._valid_from = self._history.acknowledged()
        self._open += 1
        self._due = self.delivered + self.faults + 1
        self._waited = 0.0
        self.events += 1

    def count(self, outcome: Outcome, times: int = 1) -> list[Violation]:
        """Book ``times`` outcomes just seen. Returns the rules they broke."""
        if outcome == HELD or times < 1:
            raise InternalError(f"vector {self.vector}", f"outcome {outcome} cannot be counted {times} times")
        broken: list[Violation] = []
        # Read after the outcome was seen, so that the entry which led to it is among these.
        allowed = self._history.entries(self._valid_from, self._history.newest())
        if allowed is not None and outcome not in allowed:
            self.stale += times
            broken.append(self._violation(Rule.STALE, outcome))
        if times > self._open:
            self.duplicated += times - self._open
            broken.append(self._violation(Rule.DUPLICATED, outcome))
        self._open -= min(times, self._open)
        if outcome == FAULT:
            self.faults += times
        else:
            self.delivered += times
        return broken

    def wait(self, seconds: float) -> list[Violation]:
        """Book that ``seconds`` more went by without an outcome. Returns the loss when that was too long."""
        if self.settled or self._held():
            return []
        self._waited += seconds
        if self._waited <= self._patience:
            return []
        self.lost += 1
        self._open = 0
        self._due = self.delivered + self.faults
        return [self._violation(Rule.LOST, None)]

    def leftover(self, count: int) -> list[Violation]:
        """Book the ``count`` that the eventfd still holds when everything is at rest, which must be 0.

        It is an event that nobody will deliver, or, when every event was accounted for, one to be delivered twice.
        """
        if not count:
            return []
        if self._open:
            self._open -= 1
            self.lost += 1
            return [self._violation(Rule.LOST, None)]
        self.duplicated += 1
        return [self._violation(Rule.DUPLICATED, None)]

    def totals(self) -> Totals:
        """The books so far."""
        return Totals(self.events, self.delivered, self.faults, self.lost, self.stale, self.duplicated)

    def _violation(self, rule: Rule, outcome: Outcome | None) -> Violation:
        newest = self._history.newest()
        first = max(0, self._valid_from - _QUOTED_BEFORE)
        entries = self._history.entries(first, min(newest, self._valid_from + _QUOTED_AFTER))
        if entries is None:  # too old: the newest will have to do
            first = max(0, newest - _QUOTED_AFTER)
            entries = self._history.entries(first, newest) or ()
        return Violation(rule, self.vector, self.events, outcome, self._valid_from, newest, first, tuple(entries))

    def _held(self) -> bool:
        newest = self._history.newest()
        return self._history.entries(newest, newest) == [HELD]

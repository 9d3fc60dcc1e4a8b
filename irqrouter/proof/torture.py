"""The torture of a service: an agent's VM runs on and every event is followed, while the service is killed or stopped.

The VM, the devices, the guest's driver and the books are those of every run (``scenario.py``); ``chaos.py`` deals the
blows. A run lasts until all of them were dealt, and ends with a service that is up: then every event must have been
delivered, or recorded as a fault, exactly once.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Final

import msgspec

from irqrouter.proof.board import Board
from irqrouter.proof.chaos import Chaos, Intent
from irqrouter.proof.machine import Machine
from irqrouter.proof.scenario import Summary
from irqrouter.proof.served import AgentKind, Opened, Served, attached
from irqrouter.proof.service import ServiceProcess

#: An invalidation that waited for the service may come back so much after its deadline: a timer is not exact, and the
#: agent's lock may be taken. (That its thread finds no CPU is not counted.)
NOISE_MS: Final = 20.0


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The object that ``irqrouter torture --json`` prints."""

    kills: int
    stops: int
    events: int
    delivered: int
    lost: int
    stale: int
    duplicated: int
    coalesced: int
    faults: int
    invalidations: int
    invalidation_p50_us: float
    invalidation_max_us: float
    deadline_ms: float
    longest_wait_ms: float
    over_deadline: int
    reconnects: int
    caught: int
    duration_s: float
    agent: str
    seed: int


class Torture:
    """One torture: hand :meth:`opener` to the run, then ask for the :meth:`result`."""

    def __init__(self, intent: Intent, service: ServiceProcess, kind: AgentKind, *, deadline_ms: float) -> None:
        self.intent = intent
        self.side: Tortured | None = None
        self._service = service
        self._kind = kind
        self._deadline_ms = deadline_ms

    @contextlib.asynccontextmanager
    async def opener(self, machine: Machine, board: Board) -> AsyncGenerator["Tortured"]:
        """The side for a run: an agent, its service, and whoever kills that."""
        async with attached(machine, board, self._service, self._kind, deadline_s=self._deadline_ms / 1000) as opened:
            side = self.side = Tortured(opened, self._service, self.intent, board.events)
            try:
                yield side
            finally:
                await asyncio.to_thread(side.close)

    @property
    def dealt(self) -> int:
        """Blows dealt so far."""
        return 0 if self.side is None else self.side.chaos.kills + self.side.chaos.stops

    @property
    def longest_ms(self) -> float:
        """The longest invalidation so far."""
        return 0.0 if self.side is None else self.side.through.invalidations.longest_us() / 1000

    @property
    def longest_wait_ms(self) -> float:
        """The longest that an invalidation waited for the service so far, until its thread ran again."""
        return 0.0 if self.side is None else self.side.through.invalidations.longest_wait_us() / 1000

    def result(self, summary: Summary) -> Result:
        """What came of it."""
        totals, side = summary.totals, self.side
        assert side is not None, "it was run"
        times = side.through.invalidations
        return Result(
            kills=side.chaos.kills,
            stops=side.chaos.stops,
            events=totals.events,
            delivered=totals.delivered,
            lost=totals.lost,
            stale=totals.stale,
            duplicated=summary.duplicated,
            coalesced=totals.coalesced,
            faults=totals.faults,
            invalidations=summary.invalidations,
            invalidation_p50_us=round(times.median_us(), 1),
            invalidation_max_us=round(times.longest_us(), 1),
            deadline_ms=self._deadline_ms,
            longest_wait_ms=round(self.longest_wait_ms, 1),
            over_deadline=times.held_up_longer_than_us(1000 * (self._deadline_ms + NOISE_MS)),
            reconnects=side.reconnects,
            caught=summary.caught,
            duration_s=round(summary.seconds, 3),
            agent=self._kind.value,
            seed=self.intent.seed,
        )


class Tortured(Served):
    """An agent whose service is dealt blows while the guest's driver works."""

    def __init__(self, opened: Opened, service: ServiceProcess, intent: Intent, events: Callable[[], int]) -> None:
        super().__init__(opened, service)
        self.chaos = Chaos(intent, service, opened.connections, events)
        #: How often the agent told everything to a service anew; known when the side is closed.
        self.reconnects = 0

    def wakeups(self) -> int:
        """See :meth:`Side.wakeups`: the agent's alone; the services' went with them."""
        return self.opened.wakeups()

    def asleep(self, events: int) -> str:
        """See :meth:`Side.asleep`: nothing is known."""
        del events
        return ""

    def check(self) -> None:
        """See :meth:`Side.check`."""
        if self.chaos.error is not None:
            raise self.chaos.error
        super().check()

    def enough(self) -> bool:
        """See :meth:`Side.enough`: every blow was dealt, and the service is up."""
        return self.chaos.finished

    @contextlib.asynccontextmanager
    async def quiet(self, board: Board, devices: int) -> AsyncGenerator[None]:
        """See :meth:`Side.quiet`. There is none here; the blows begin with the first change."""
        del board, devices
        yield
        self.chaos.start()

    def close(self) -> None:
        """No more blows."""
        self.chaos.close()
        self.reconnects = max(0, self.opened.connections_ever() - 1)

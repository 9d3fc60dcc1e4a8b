"""Whoever kills the service, again and again, at moments that the seed decides."""

import enum
import random
import threading
import time
from collections.abc import Callable
from typing import Final

import msgspec

from irqrouter.proof.service import ServiceFailedError, ServiceProcess

#: How often it is looked whether something has come true.
_LOOK_S: Final = 0.001
#: How long the agent and a service that was just started may take to find each other, and an event to be fired.
_ATTACH_S: Final = 30.0
#: The longest that a service is left alone after it was attached; half of the time it is a tenth of that.
_LEFT_ALONE_S: Final = 0.5
#: One start in so many is followed by a blow that does not wait until the agent has attached; and for how long at most.
_EARLY_ONE_IN: Final = 6
_EARLY_S: Final = 0.8


class Blow(enum.Enum):
    """What the service can be dealt."""

    KILL = "kill"
    STOP = "stop"


class Intent(msgspec.Struct, frozen=True, kw_only=True):
    """``kills`` times ``kill -9``, ``stops`` times ``kill -STOP`` for ``stop_s`` seconds, in an order of the seed's."""

    kills: int
    stops: int
    stop_s: float
    seed: int

    def blows(self) -> list[Blow]:
        """What is to be dealt, in order."""
        blows = [Blow.KILL] * self.kills + [Blow.STOP] * self.stops
        random.Random(f"{self.seed}/blows").shuffle(blows)
        return blows


class Chaos:
    """Deals ``intent`` to ``service``, on a thread of its own.

    ``connections()`` tells how often a service came to know everything, or 0 while none does; ``events()`` how many
    were fired. A blow counts when the service knew everything and there were events since the one before. In between
    there are blows that do not count: while the service starts, or is being told.
    """

    def __init__(
        self, intent: Intent, service: ServiceProcess, connections: Callable[[], int], events: Callable[[], int]
    ) -> None:
        self.kills = self.stops = 0
        self.finished = False
        self.error: Exception | None = None
        #: From each kill until an agent was attached again.
        self.outages_s: list[float] = []
        self._intent = intent
        self._service = service
        self._connections = connections
        self._events = events
        self._rng = random.Random(f"{intent.seed}/moments")
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chaos", daemon=True)

    def start(self) -> None:
        """Begin: the service runs, and an agent is attached."""
        self._thread.start()

    def close(self) -> None:
        """Stop. The service may be left in any state. Idempotent."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            for blow in self._intent.blows():
                self._await_events()
                if self._pause(self._delay()):
                    return
                self._await(lambda: self._connections() > 0, _ATTACH_S, "is there, and no agent is attached")
                self._deal(blow)
                if self._closing.is_set():
                    return
            self._await_events()
            self.finished = True
        except Exception as error:  # noqa: BLE001 - handed on by whoever reads `error`, whatever it is
            self.error = error

    def _deal(self, blow: Blow) -> None:
        if blow is Blow.STOP:
            self.stops += 1
            self._stop_and_go_on()
            return
        before, began = self._connections(), time.monotonic()
        self._kill_and_start()
        self.kills += 1
        while not self._rng.randrange(_EARLY_ONE_IN):
            if self._pause(self._rng.uniform(0, _EARLY_S)):
                return
            if self._intent.stops and self._rng.random() < 0.5:
                self._stop_and_go_on()
            else:
                before = max(before, self._connections())
                self._kill_and_start()
        self._await(lambda: self._connections() > before, _ATTACH_S, "was not found by the agent")
        self.outages_s.append(time.monotonic() - began)

    def _kill_and_start(self) -> None:
        self._service.kill()
        self._service.start()

    def _stop_and_go_on(self) -> None:
        self._service.stop()
        self._pause(self._intent.stop_s)
        self._service.go_on()

    def _delay(self) -> float:
        return self._rng.uniform(0, _LEFT_ALONE_S if self._rng.random() < 0.5 else _LEFT_ALONE_S / 10)

    def _await_events(self) -> None:
        """Until the devices have fired: a blow that hits between two events proves nothing."""
        before = self._events()
        self._await(
            lambda: self._connections() > 0 and self._events() > before, _ATTACH_S, "is attached, and nothing fires"
        )

    def _await(self, condition: Callable[[], bool], seconds: float, otherwise: str) -> None:
        deadline = time.monotonic() + seconds
        while not (condition() or self._pause(_LOOK_S)):
            self._service.check()
            if time.monotonic() > deadline:
                raise ServiceFailedError(
                    "the service", f"{otherwise} for {seconds:g} s. It said:\n{self._service.said()}"
                )

    def _pause(self, seconds: float) -> bool:
        """Wait; whether it is over."""
        return self._closing.wait(seconds)

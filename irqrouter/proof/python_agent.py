"""The Python agent, measured: what a run wants to know of an agent and a VMM does not."""

import threading
import time

from irqrouter.agent import Agent
from irqrouter.agent.connection import Connection
from irqrouter.core.ops import SetRoute
from irqrouter.proof.c_agent import Timed
from irqrouter.scope import Scope


class MeasuredAgent(Agent):
    """An agent that measures its waits.

    The clock is read in Python: what it shows includes the interpreter lock, for which every thread of this process
    waits, the guest's driver above all.
    """

    _waited = threading.local()  # .ns: what the thread's last invalidation waited for the service

    def invalidate_timed(self, scope: Scope) -> Timed:
        """:meth:`Agent.invalidate`, measured."""
        self._waited.ns = 0
        began = time.monotonic_ns()
        touched = self.invalidate(scope)
        return Timed(touched, time.monotonic_ns() - began, self._waited.ns)

    def _routes(self, connection: Connection, scope: Scope) -> list[SetRoute]:
        began = time.monotonic_ns()
        try:
            return super()._routes(connection, scope)
        finally:
            self._waited.ns = time.monotonic_ns() - began

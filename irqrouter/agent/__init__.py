"""The agent: a VM whose routing decisions are made by the service, in another process.

:class:`~irqrouter.agent.agent.Agent` has the verbs of :class:`~irqrouter.eventfd_loop.Router` and none of its loop: it
*acts* on the VM, by the same executor, and the service *decides* (``docs/protocol.md``). It needs no event loop; one
thread of its own speaks with the service.
"""

from irqrouter.agent.agent import Agent
from irqrouter.agent.page import PageError, SlotsExhaustedError

__all__ = ["Agent", "PageError", "SlotsExhaustedError"]

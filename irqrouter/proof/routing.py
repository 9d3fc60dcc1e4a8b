"""The routing side of a run: what the guest's driver speaks to, and who may say how it went.

The driver knows the *verbs* alone (:class:`Routing`). A router in this process has them
(:class:`~irqrouter.eventfd_loop.Router`), and so has an agent whose decisions come from a service; a :class:`Side` is
one of them together with what the run wants to know of it. ``served.py`` has the side with a service.
"""

import contextlib
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from irqrouter.core.vectors import VectorStatus
from irqrouter.eventfd_loop import Source
from irqrouter.proof.board import Board
from irqrouter.proof.machine import Machine
from irqrouter.scope import Scope
from irqrouter.x86.msi import Message

#: What ``add`` returns: each kind of routing has its own.
Handle = TypeVar("Handle")


class Routing(Protocol[Handle]):
    """The verbs. Each is true when it has returned."""

    def add(self, eventfd: int, message: Message, *, requester: int, masked: bool = False) -> Handle:
        """Add one vector."""
        ...

    def add_all(self, sources: Iterable[Source], /) -> list[Handle]:
        """Add vectors: all, or none."""
        ...

    def invalidate(self, scope: Scope, /) -> int:
        """Drop every translation in ``scope``."""
        ...

    def mask(self, vector: Handle, /) -> None:
        """The guest masked it."""
        ...

    def unmask(self, vector: Handle, /) -> None:
        """The guest unmasked it."""
        ...

    def program(self, vector: Handle, message: Message, /) -> None:
        """The guest wrote its MSI."""
        ...

    def remove(self, *vectors: Handle) -> None:
        """They are gone."""
        ...

    def vectors(self) -> list[VectorStatus]:
        """A snapshot."""
        ...


class Side(Generic[Handle]):
    """One routing side, for one run. Its figures may take a while: not to be asked for on the event loop's thread."""

    #: Who takes the events that KVM does not deliver, for people.
    catcher = "the loop"

    def __init__(self, routing: Routing[Handle]) -> None:
        self.routing = routing

    def caught(self, vector: Handle) -> int:
        """Events of ``vector`` that were taken and delivered in userspace so far."""
        raise NotImplementedError

    def wakeups(self) -> int:
        """How often an eventfd woke somebody."""
        raise NotImplementedError

    def wakeups_while_assigned(self) -> int:
        """How often one did that belonged to an assigned vector, as far as this side can tell."""
        raise NotImplementedError

    def asleep(self, events: int) -> str:
        """What the figures about wakeups are, and whose, after a run of ``events``; empty: there are none."""
        wakeups = self.wakeups()
        share = wakeups / events if events else 0.0
        return f"the loop woke {wakeups:,} times, for {share:.1%} of the events"

    def check(self) -> None:
        """Raise what went wrong beside the verbs."""

    def enough(self) -> bool:
        """Whether all that this side does during a run has been done."""
        return True

    @contextlib.asynccontextmanager
    async def quiet(self, board: Board, devices: int) -> AsyncGenerator[None]:
        """Around the start of the ``devices``: the drivers start when this has been left."""
        del board, devices
        yield


#: Makes a side for a machine whose books are on the board, and ends it.
Opener: TypeAlias = Callable[[Machine, Board], AbstractAsyncContextManager[Side[Any]]]

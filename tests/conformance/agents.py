"""The agents as targets: each in this process, its deciding side a service that the test plays."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

from irqrouter.core.machine import State
from irqrouter.core.vectors import VectorStatus
from irqrouter.iommu.fault import Fault
from irqrouter.memory import MemoryRegion
from irqrouter.scope import Scope
from irqrouter.service.wire import (
    PREPARED,
    Operation,
    Record,
    Slot,
    SlotState,
)
from irqrouter.x86.msi import Message, Request
from tests.conformance.service import Service
from tests.conformance.target import Hooks, Recorded, Seen, V, once
from tests.kvm.conftest import Bench

#: Small, so that slots are used again.
SLOTS = 16
NAME = "conformance.vm-1"
HOST_ADDRESS_WIDTH = 52
#: How many an agent deassigns without asking, and more.
FEW = 4
MANY = 8
#: How long it waits for the answer. Whoever runs the tests may be slow, a test that waits for it is not much slower.
DEADLINE_S = 1.0

_STATES = {
    State.DEASSIGNED: SlotState.DEASSIGNED,
    State.ASSIGNED: SlotState.ASSIGNED,
    State.MASKED: SlotState.MASKED,
}


class Verbs(Protocol):
    """What both agents offer to a VMM."""

    def add(self, fd: int, message: Message, *, masked: bool) -> tuple[int, object]:
        """The vector's number, and the handle that the other verbs take."""
        ...

    def add_all(self, fds: Sequence[int], message: Message) -> list[tuple[int, object]]: ...

    def invalidate(self, scope: Scope) -> int: ...

    def mask(self, handle: object) -> None: ...

    def unmask(self, handle: object) -> None: ...

    def program(self, handle: object, message: Message) -> None: ...

    def remove(self, handles: Sequence[object]) -> None: ...

    def set_foreign_routes(self, routes: Mapping[int, Message]) -> None: ...

    def set_registers(self, table: int, control: int) -> None:
        """VT-d: IRTA, and GSTS.IRES (bit 0) with GSTS.CFIS (bit 1)."""
        ...

    def set_memory(self, regions: Sequence[MemoryRegion]) -> None: ...

    def vectors(self) -> list[VectorStatus]: ...

    def wait_connected(self) -> bool:
        """Wait until the service knows everything."""
        ...

    def close(self) -> None: ...


class AgentTarget:
    """An agent that is connected to ``service``. After each verb the page must say what the agent says.

    The guest's unit is a VT-d, or, with ``translate``, the VMM's own, whose cookies are VT-d's all the same.
    """

    def __init__(
        self, bench: Bench, hooks: Hooks, service: Service, translate: Callable[[Request], Message | Fault] | None
    ) -> None:
        self.bench = bench
        self.hooks = hooks
        self.service = service
        self.faults: list[Recorded] = []
        self.connected = True
        self.translate = translate
        self._fds: dict[int, int] = {}
        self._verbs: Verbs | None = None

    def start(self, verbs: Verbs) -> None:
        """Go by ``verbs`` from now on."""
        self._verbs = verbs
        self.service.await_session(1)
        assert verbs.wait_connected()

    @property
    def verbs(self) -> Verbs:
        """The agent's own."""
        assert self._verbs is not None
        return self._verbs

    def record(self, number: int, record: Record) -> None:
        """A fault is handed to the VMM. For the agent's ``on_fault``."""
        self.faults.append(Recorded(number, record, self.bench.count(self._fds[number])))

    def add(self, fd: int, message: Message, *, masked: bool = False) -> V:
        number, handle = self.verbs.add(fd, message, masked=masked)
        self._fds[number] = fd
        self.check()
        return V(number, fd, handle)

    def add_all(self, fds: Sequence[int], message: Message) -> list[V]:
        """Several vectors with one call."""
        found = [
            V(number, fd, handle) for fd, (number, handle) in zip(fds, self.verbs.add_all(fds, message), strict=True)
        ]
        self._fds.update((v.number, v.fd) for v in found)
        self.check()
        return found

    def invalidate(self, scope: Scope) -> int:
        touched = self.verbs.invalidate(scope)
        self.check()
        return touched

    def mask(self, v: V) -> None:
        self.verbs.mask(v.handle)
        self.check()

    def unmask(self, v: V) -> None:
        self.verbs.unmask(v.handle)
        self.check()

    def program(self, v: V, message: Message) -> None:
        self.verbs.program(v.handle, message)
        self.check()

    def remove(self, *vectors: V) -> None:
        self.verbs.remove([v.handle for v in vectors])
        self.check()

    def set_foreign_routes(self, routes: Mapping[int, Message]) -> None:
        self.verbs.set_foreign_routes(routes)

    def vectors(self) -> list[Seen]:
        return [
            Seen(
                number=status.id,
                generation=status.generation,
                state=_STATES[status.state],
                gsi=status.gsi,
                message=status.request.message,
                requester=status.request.requester,
                cookie=status.cookie,
                refused=status.assign_errno,
                invalidations=status.invalidations,
                caught=status.caught,
                faults=status.faults,
                stale=status.stale,
                discarded=status.discarded,
            )
            for status in self.verbs.vectors()
        ]

    def run(self, operations: Sequence[Operation]) -> list[int]:
        errnos = self.service.run(operations)
        self.check()
        return errnos

    def slot(self, v: V) -> Slot:
        """What the page says of it."""
        return self.service.slot(v.number)

    def prepared(self, v: V) -> bool:
        """Whether a decision stands."""
        return bool(self.slot(v).state & PREPARED)

    def check(self) -> None:
        """The page says what the agent says. Another thread may be at work: then it does so in the end."""
        if not self.connected:
            return
        if self._on_page() != self.vectors():
            with suppress(AssertionError):
                once(lambda: self._on_page() == self.vectors())
            assert self._on_page() == self.vectors()

    @contextmanager
    def unwatched(self) -> Generator[None]:
        self.connected = False
        yield
        self.connected = True
        self.check()

    def disconnect(self) -> None:
        """The service dies."""
        self.connected = False
        self.service.die()

    def reconnect(self) -> None:
        """The service is there again, and the agent has told it everything."""
        before = len([each for each in self.service.sessions if each.hello])
        self.service.listen()
        self.await_replay(before + 1)

    def await_replay(self, number: int) -> None:
        """Wait for connection ``number``, from 1, and until the agent has told everything over it."""
        session = self.service.await_session(number)
        numbers = {each.number for each in self.vectors()}
        self.service.await_that("every ADD", lambda: {each.vector for each in session.added} >= numbers)
        assert self.verbs.wait_connected()
        self.connected = True
        self.check()

    def close(self) -> None:
        if self._verbs is not None:
            self._verbs.close()

    def _on_page(self) -> list[Seen]:
        header = self.service.page_header()
        slots = [(number, self.service.slot(number)) for number in range(SLOTS)]
        assert all(number < header.slots_used for number, slot in slots if slot.generation)
        return [
            Seen(
                number=number,
                generation=slot.generation,
                state=SlotState(slot.state & 0xF),
                gsi=slot.gsi,
                message=Message(slot.address, slot.data),
                requester=slot.requester,
                cookie=slot.cookie,
                refused=slot.refused,
                invalidations=slot.invalidations,
                caught=slot.caught,
                faults=slot.faults,
                stale=slot.stale,
                discarded=slot.discarded,
            )
            for number, slot in slots
            if slot.state & 0xF
        ]

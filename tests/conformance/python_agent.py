"""The agent in Python as a target."""

from collections.abc import Callable, Mapping, Sequence

import msgspec

from irqrouter.agent import Agent
from irqrouter.core.vectors import Vector, VectorStatus
from irqrouter.eventfd_loop import Source
from irqrouter.iommu.fault import Fault
from irqrouter.iommu.vtd import cookie
from irqrouter.memory import MemoryRegion
from irqrouter.scope import Scope
from irqrouter.service.wire import Record, RemapperKind
from irqrouter.x86.msi import Message, Request
from tests.conformance.agents import DEADLINE_S, FEW, HOST_ADDRESS_WIDTH, NAME, SLOTS, AgentTarget
from tests.conformance.target import REQUESTER, HookedVm


class PythonVerbs:
    """The Python agent's verbs. Its vectors' ids are not the wire's numbers, which are slots."""

    def __init__(self, target: AgentTarget) -> None:
        def on_fault(vector: Vector, record: Record) -> None:
            target.record(self._number(vector), record)

        def translate(request: Request) -> Message | Fault:
            assert target.translate is not None
            return target.translate(request)

        self._slots: dict[int, int] = {}  # by id
        self._agent = Agent(
            HookedVm(target.bench.guest.vm, target.hooks),
            name=NAME,
            path=str(target.service.path),
            remapper=RemapperKind.VMM if target.translate else RemapperKind.VTD,
            on_fault=on_fault,
            translate=translate if target.translate else None,
            cookie=(lambda request: cookie(request.message)) if target.translate else None,
            slots=SLOTS,
            deadline_s=DEADLINE_S,
            few=FEW,
            host_address_width=HOST_ADDRESS_WIDTH,
        )

    def add(self, fd: int, message: Message, *, masked: bool) -> tuple[int, object]:
        return self._added(self._agent.add(fd, message, requester=REQUESTER, masked=masked))

    def add_all(self, fds: Sequence[int], message: Message) -> list[tuple[int, object]]:
        sources = [Source(eventfd=fd, message=message, requester=REQUESTER) for fd in fds]
        return [self._added(vector) for vector in self._agent.add_all(sources)]

    def invalidate(self, scope: Scope) -> int:
        return self._agent.invalidate(scope)

    def mask(self, handle: object) -> None:
        self._agent.mask(_vector(handle))

    def unmask(self, handle: object) -> None:
        self._agent.unmask(_vector(handle))

    def program(self, handle: object, message: Message) -> None:
        self._agent.program(_vector(handle), message)

    def remove(self, handles: Sequence[object]) -> None:
        self._agent.remove(*map(_vector, handles))

    def set_foreign_routes(self, routes: Mapping[int, Message]) -> None:
        self._agent.set_foreign_routes(routes)

    def set_registers(self, table: int, control: int) -> None:
        self._agent.set_registers(table, control)

    def set_memory(self, regions: Sequence[MemoryRegion]) -> None:
        self._agent.set_memory(regions)

    def vectors(self) -> list[VectorStatus]:
        found = [
            msgspec.structs.replace(status, id=self._slots[status.id])
            for status in self._agent.vectors()
            if status.id in self._slots  # one that another thread is adding has no slot yet
        ]
        return sorted(found, key=lambda status: status.id)

    def wait_connected(self) -> bool:
        return self._agent.wait_connected(20)

    def close(self) -> None:
        self._agent.close()

    def _added(self, vector: Vector) -> tuple[int, object]:
        self._slots[vector.id] = self._number(vector)
        return self._slots[vector.id], vector

    def _number(self, vector: Vector) -> int:
        slot = self._agent._shown.slot_of(vector)
        assert slot is not None
        return slot


def _vector(handle: object) -> Vector:
    assert isinstance(handle, Vector)
    return handle


#: Makes the verbs for a target.
verbs: Callable[[AgentTarget], PythonVerbs] = PythonVerbs

"""The executor as a target: the embedded form, where the deciding side is the same process."""

import contextlib
from collections.abc import Mapping, Sequence

from irqrouter.core.machine import State
from irqrouter.core.ops import Assign, Catch, CatchFault, Op, SetRoute
from irqrouter.core.vectors import Vector
from irqrouter.iommu.fault import Fault, RecordedFault
from irqrouter.iommu.vtd import cookie
from irqrouter.kvm.executor import Executor
from irqrouter.scope import Scope
from irqrouter.service.wire import Kind, Operation, SlotState
from irqrouter.x86.msi import Message, Request
from tests.conformance.target import REQUESTER, HookedVm, Hooks, Recorded, Seen, V
from tests.kvm.conftest import Bench, message

_STATES = {
    State.DEASSIGNED: SlotState.DEASSIGNED,
    State.ASSIGNED: SlotState.ASSIGNED,
    State.MASKED: SlotState.MASKED,
}


def op(operation: Operation) -> Op:
    """The wire's operation as the executor has it."""
    number, generation = operation.vector, operation.generation
    message = Message(operation.address, operation.data)
    if operation.kind is Kind.SET_ROUTE:
        return SetRoute(number, generation, message)
    if operation.kind is Kind.CATCH:
        return Catch(number, generation, message)
    if operation.kind is Kind.CATCH_FAULT:
        low, high = operation.record
        fault = RecordedFault(requester=REQUESTER, recorded=operation.flag, low=low, high=high)
        return CatchFault(number, generation, fault)
    assert operation.kind is Kind.ASSIGN
    return Assign(number, generation, delivering=operation.flag)


class ExecutorTarget:
    """The executor on the bench's guest, on either kernel."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.hooks = Hooks()
        self.faults: list[Recorded] = []
        self._fds: dict[int, int] = {}
        self._executor = Executor(
            HookedVm(bench.guest.vm, self.hooks), record_fault=self._record, translate=self._translate
        )

    def add(self, fd: int, message: Message, *, masked: bool = False) -> V:
        vector, _ = self._executor.add(fd, Request(message, REQUESTER), cookie(message), masked=masked)
        self._fds[vector.id] = fd
        return V(vector.id, fd, vector)

    def invalidate(self, scope: Scope) -> int:
        return self._executor.invalidate(scope)

    def mask(self, v: V) -> None:
        self._executor.mask(_vector(v))

    def unmask(self, v: V) -> None:
        self._executor.unmask(_vector(v))

    def program(self, v: V, message: Message) -> None:
        self._executor.program(_vector(v), Request(message, REQUESTER), cookie(message))

    def remove(self, *vectors: V) -> None:
        self._executor.remove(self._executor.known(map(_vector, vectors)))

    def set_foreign_routes(self, routes: Mapping[int, Message]) -> None:
        self._executor.set_foreign_routes(routes)

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
            for status in self._executor.status()
        ]

    def run(self, operations: Sequence[Operation]) -> list[int]:
        return self._executor.run([op(each) for each in operations])

    def unwatched(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def close(self) -> None:
        self._executor.close()

    def _record(self, vector: Vector, fault: Fault) -> None:
        assert isinstance(fault, RecordedFault)
        self.faults.append(Recorded(vector.id, fault.record(), self.bench.count(self._fds[vector.id])))

    def _translate(self, request: Request) -> Message | Fault:
        return message(1, 0x41)  # for an invalidation of a vector that keeps losing the race


def _vector(v: V) -> Vector:
    assert isinstance(v.handle, Vector)
    return v.handle

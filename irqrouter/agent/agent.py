"""Agent: the verbs of a Router, for a VM whose interrupts the service routes."""

import errno
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Final, Self

import structlog

from irqrouter.agent.connection import Connection, UnansweredError
from irqrouter.agent.link import Link
from irqrouter.agent.page import Shown
from irqrouter.core.machine import State
from irqrouter.core.ops import Assign, Catch, CatchFault, SetRoute
from irqrouter.core.vectors import Vector, VectorStatus
from irqrouter.errors import CallerError, KernelError, SpecError
from irqrouter.eventfd_loop import Source
from irqrouter.iommu import vtd
from irqrouter.iommu.fault import Fault, RecordedFault
from irqrouter.kvm.executor import Executor
from irqrouter.kvm.port import Vm
from irqrouter.memory import MemoryRegion
from irqrouter.scope import EVERYTHING, UNINDEXED, Cookie, Scope
from irqrouter.service import wire
from irqrouter.service.wire import Kind, Operation, Record, RemapperKind, WireError
from irqrouter.x86.msi import Message, Request, checked, checked_requester

log = structlog.get_logger("irqrouter")

#: Outcomes of routing and assigning that are no refusal by the kernel.
_NOT_REFUSED: Final = frozenset({0, errno.ESTALE, errno.EALREADY, errno.ECANCELED, errno.EINPROGRESS})
#: What stands for "no record" where the wire has a record: hardware writes none that is 0.
_NO_RECORD: Final = (0, 0)


class Agent:
    """Routes the interrupts of ``vm`` as the service at the socket ``path`` decides; ``name`` is what it calls the VM.

    ``remapper`` says whose tables the service reads: it wants to know the guest's memory (:meth:`set_memory`) and the
    unit's registers (:meth:`set_registers`). With ``RemapperKind.VMM`` it asks ``translate(request)`` instead, on the
    agent's thread. ``cookie(request)`` is what an invalidation names, as in :class:`~irqrouter.iommu_remap.Remapper`;
    by default the IRTE's index (VT-d), the requester id (AMD-Vi), and otherwise nothing but a global one.

    ``on_fault(vector, record)`` is called with the low and high quadword of a fault as hardware writes it (with
    ``RemapperKind.VMM``: what ``translate``'s fault has for a record), before its event is consumed and with a lock
    held: it must only store. Neither callback may call the agent.

    An invalidation that touches more than ``few`` vectors asks the service for all their routes at once, and waits for
    ``deadline_s``. Everything else goes on without the service: what is assigned stays so, invalidations deassign, and
    events wait in their eventfds until it is back. The agent connects in the background, and again, for ever.

    Verbs may be called from any thread and are true when they return. They raise what Router's do, and
    :class:`~irqrouter.service.wire.WireError` where the service refuses.

    The agent offers WIDE and not PREPARE: a Python thread of the VMM's would catch no sooner than the service does.
    ``host_address_width`` is VT-d's, as the DMAR table tells the guest.
    """

    def __init__(
        self,
        vm: Vm,
        *,
        name: str,
        path: str,
        remapper: RemapperKind,
        on_fault: Callable[[Vector, Record], None],
        translate: Callable[[Request], Message | Fault] | None = None,
        cookie: Callable[[Request], Cookie] | None = None,
        slots: int = 4096,
        deadline_s: float = 0.05,
        few: int = 4,
        host_address_width: int = 52,
    ) -> None:
        if (translate is not None) != (remapper is RemapperKind.VMM):
            raise CallerError("translate", "is for RemapperKind.VMM, which needs it")
        if not 1 <= slots <= wire.SLOTS_MAX:
            raise CallerError(f"{slots} slots", f"must be 1 to {wire.SLOTS_MAX}")
        self._remapper = remapper
        self._on_fault = on_fault
        self._translate = translate
        self._cookie_of = cookie or _COOKIES[remapper]
        self._deadline_s = deadline_s
        self._few = few
        self._shown = Shown(slots)
        self._executor = Executor(vm, record_fault=self._record, translate=None, mirror=self._shown)
        hello = wire.Hello(
            name=name,
            slots=slots,
            remapper=remapper,
            host_address_width=host_address_width if remapper is RemapperKind.VTD else 0,
            features=wire.Feature.WIDE,
        )
        self._link = Link(
            path,
            hello,
            self._shown,
            self._executor,
            carry_out=self._carry_out,
            translated=None if translate is None else self._translated,
        )
        self._link.start()

    @property
    def connected(self) -> bool:
        """Whether there is a service, and it knows all there is to know."""
        return self._link.connected

    @property
    def times_connected(self) -> int:
        """How often a service came to know all there was to know; above 1 it was another, or the same again."""
        return self._link.times_connected

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait for that; whether it has come."""
        return self._link.wait_connected(timeout_s)

    def close(self) -> None:
        """Leave the service, deassign every irqfd, drop every route of ours, close every descriptor. Idempotent."""
        self._link.close()
        self._executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- verbs ---------------------------------------------------------------------------------------------------

    def add(
        self,
        eventfd: int,
        message: Message,
        *,
        requester: int,
        masked: bool = False,
        device: str | None = None,
    ) -> Vector:
        """Add one vector; see :class:`~irqrouter.eventfd_loop.Source` and :meth:`add_all`."""
        return self.add_all(
            [Source(eventfd=eventfd, message=message, requester=requester, masked=masked, device=device)]
        )[0]

    def add_all(self, sources: Iterable[Source]) -> list[Vector]:
        """Add vectors with one table write. All are added, or none.

        Those that the service translates at once are assigned. Without a service they are added all the same, and it is
        told of them when it comes. Raises what ``Router.add_all`` does,
        :class:`~irqrouter.agent.page.SlotsExhaustedError`, and :class:`~irqrouter.service.wire.WireError` where the
        service refuses them (a quota, an eventfd that is a vector of another VM).
        """
        added: list[Vector] = []
        try:
            for source in sources:
                request = self._request(source.message, source.requester)
                cookie = self._cookie(request)
                vector, _ = self._executor.add(
                    source.eventfd, request, cookie, masked=source.masked, device=source.device
                )
                added.append(vector)
            connection = self._link.seat(added)
            if connection is not None and added:
                self._introduce(connection, added)
        except BaseException:
            self._forget(added)
            raise
        return added

    def invalidate(self, scope: Scope) -> int:
        """Drop every translation in ``scope`` and return how many vectors that touched.

        Only when this has returned may the guest see its invalidation completed: no event signalled from then on is
        delivered by an older translation.
        """
        connection = None if self._remapper is RemapperKind.VMM else self._link.wide()
        if connection is None or self._executor.matches(scope) <= self._few:
            return self._executor.invalidate(scope)
        wide = self._executor.begin_wide(scope)
        routes: list[SetRoute] = []
        try:
            if len(wide.left) > self._few:
                routes = self._routes(connection, scope)
        finally:  # whatever it was, nothing may stay as it is
            touched = self._executor.finish_wide(wide, routes)
        return touched

    def mask(self, vector: Vector) -> None:
        """Mask ``vector``. Its events wait in its eventfd, as in a pending bit; nothing is delivered meanwhile."""
        self._executor.mask(vector)

    def unmask(self, vector: Vector) -> None:
        """Unmask ``vector``. What waited goes through a fresh translation."""
        self._executor.unmask(vector)

    def program(self, vector: Vector, message: Message) -> None:
        """Give ``vector`` another MSI address and data, masked or not. Its next event is translated afresh."""
        request = self._request(message, vector.request.requester)
        self._executor.program(vector, request, self._cookie(request))

    def remove(self, *vectors: Vector) -> None:
        """Remove ``vectors``. When this returns KVM knows nothing of them; what is pending stays in your eventfds.

        Raises :class:`~irqrouter.core.vectors.VectorGoneError` for one that was removed before.
        """
        self._forget(self._executor.known(vectors))

    def remove_device(self, device: str) -> int:
        """Remove every vector that was added for ``device``; return how many there were."""
        gone = [vector for vector in self._executor.vectors() if vector.device == device]
        self._forget(gone)
        return len(gone)

    def set_foreign_routes(self, routes: Mapping[int, Message]) -> None:
        """Replace the VMM's own routes (GSI to message). The table is the agent's: they must go in through here."""
        self._executor.set_foreign_routes(routes)

    def set_memory(self, regions: Sequence[MemoryRegion]) -> None:
        """Say where guest memory is, all of it: memfds, or other shmem or hugetlbfs files.

        The guest must have them mapped ``MAP_SHARED``; a region does not show it, so nobody can check it here: what
        the guest writes to a private mapping never reaches the file, and its tables would look empty.

        Raises :class:`~irqrouter.memory.RegionError`, and :class:`~irqrouter.service.wire.WireError` where the service
        refuses.
        """
        self._link.set_memory(regions)

    def set_registers(self, table: int, control: int) -> int:
        """Show the unit's registers to the service and invalidate everything; how many vectors that touched.

        VT-d: ``table`` is IRTA as SIRTP latched it; ``control`` has GSTS.IRES in bit 0 and GSTS.CFIS in bit 1. AMD-Vi:
        the Device Table Base Address and Control registers. Call it before the guest may see the change.
        Raises :class:`~irqrouter.errors.SpecError` for what does not fit 64 bits.
        """
        if not (0 <= table < 1 << 64 and 0 <= control < 1 << 64):
            raise SpecError(f"registers {table:#x} and {control:#x}", "must fit 64 bits")
        self._shown.set_registers(table, control)
        return self.invalidate(EVERYTHING)

    def vectors(self) -> list[VectorStatus]:
        """A snapshot of every vector.

        ``id`` is that of the handle, and never given again; the service, its logs and its tools know a vector by the
        number of its slot, which is.
        """
        return self._executor.status()

    # --- what the service decides --------------------------------------------------------------------------------

    def _introduce(self, connection: Connection, added: Sequence[Vector]) -> None:
        """Tell the service of new vectors, and carry out what it says, with one table write."""
        try:
            operations = self._link.introduce(connection, added)
        except UnansweredError:
            return  # the next connection will be told
        # Routes first, or each assignment would have a table write of its own.
        batch = [self._operation(op) for op in sorted(operations, key=lambda op: op.kind is Kind.ASSIGN)]
        results = self._executor.run(batch)
        self._shown.ring()
        ours = {vector.id for vector in added}
        for op, result in zip(batch, results, strict=True):
            if result not in _NOT_REFUSED and op.vector in ours:
                call = "KVM_IRQFD" if isinstance(op, Assign) else "KVM_SET_GSI_ROUTING"
                raise KernelError(result, call, f"vector {op.vector}")

    def _routes(self, connection: Connection, scope: Scope) -> list[SetRoute]:
        """The routes for a wide invalidation, as far as the service has any."""
        try:
            operations = self._link.invalidate(connection, wire.encode_scope(scope), self._deadline_s)
        except (UnansweredError, WireError) as error:
            log.info("deassigning instead", scope=scope.describe(), reason=str(error))
            return []
        return [op for op in map(self._operation, operations) if isinstance(op, SetRoute)]

    def _carry_out(self, operations: Sequence[Operation]) -> list[int]:
        return self._executor.run([self._operation(op) for op in operations])

    def _operation(self, op: Operation) -> SetRoute | Catch | CatchFault | Assign:
        """An operation of the wire as the executor knows it: it means the vector that has the slot now, or nobody."""
        vector = self._shown.vector_at(op.vector)
        number = -1 - op.vector if vector is None else vector.id
        if op.kind is Kind.CATCH_FAULT:
            low, high = op.record
            recorded = op.flag and op.record != _NO_RECORD
            requester = 0 if vector is None else vector.request.requester
            return CatchFault(
                number, op.generation, RecordedFault(requester=requester, recorded=recorded, low=low, high=high)
            )
        if op.kind is Kind.ASSIGN:
            return Assign(number, op.generation, delivering=op.flag)
        message = Message(op.address, op.data)
        return (SetRoute if op.kind is Kind.SET_ROUTE else Catch)(number, op.generation, message)

    def _record(self, vector: Vector, fault: Fault) -> None:
        record = fault.record()
        assert record is not None  # it is one that came by the wire
        try:
            self._on_fault(vector, record)
        except Exception as error:  # the embedder's: nothing has been consumed, and the service will come again
            log.exception("a fault could not be recorded", vector=vector.id)
            raise KernelError(errno.EIO, "on_fault", f"vector {vector.id}") from error

    def _translated(self, operations: Sequence[Operation]) -> list[Operation]:
        return [self._translated_one(op) for op in operations]

    def _translated_one(self, op: Operation) -> Operation:
        vector = self._shown.vector_at(op.vector)
        # The generation first, the tables second: C1.
        if vector is None or vector.generation != op.generation or vector.state is State.REMOVED:
            return op
        assert self._translate is not None
        try:
            outcome = self._translate(vector.request)
        except Exception:  # the embedder's: the event stays where it is
            log.exception("a request could not be translated", vector=vector.id)
            return op
        if isinstance(outcome, Message):
            return Operation(Kind.UPDATE, op.vector, op.generation, outcome.address, outcome.data)
        record = outcome.record() if outcome.recorded else None
        return Operation(Kind.FAULT, op.vector, op.generation, record=record or _NO_RECORD)

    # --- small parts ---------------------------------------------------------------------------------------------

    def _request(self, message: Message, requester: int) -> Request:
        return Request(checked(message), checked_requester(requester))

    def _cookie(self, request: Request) -> Cookie:
        cookie = self._cookie_of(request)
        if not 0 <= cookie <= UNINDEXED:
            raise SpecError(f"cookie {cookie:#x}", f"must be at most {UNINDEXED:#x}")
        return cookie

    def _forget(self, vectors: Sequence[Vector]) -> None:
        try:
            self._executor.remove(vectors)
        finally:
            self._shown.unseat(vectors)


_COOKIES: Final[Mapping[RemapperKind, Callable[[Request], Cookie]]] = {
    RemapperKind.NONE: lambda _: UNINDEXED,
    RemapperKind.VTD: lambda request: vtd.cookie(request.message),
    RemapperKind.AMDVI: lambda request: request.requester,
    RemapperKind.VMM: lambda _: UNINDEXED,
}

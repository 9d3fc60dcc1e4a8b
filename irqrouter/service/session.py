"""One VM, as the service serves it: what its agent says, what the guest's tables say, and what follows.

The agent's truth is in the state page; its doorbell says that it changed. For every vector that is deassigned the
service either has a decision standing at the agent (``PREPARE``) or watches the eventfd::

    doorbell rings: the vector was invalidated         -> translate, quietly
        it translates                                  -> PREPARE: the agent serves the next events by itself
        it does not, or nobody waits for such vectors  -> watch
    the eventfd fires                                  -> translate
        it translates                                  -> PREPARE; the pending event is served at once
        it does not                                    -> read again after a pause, then CATCH_FAULT, and watch

An agent without ``PREPARE`` is told ``CATCH`` and ``SET_ROUTE`` at the first event, and ``ASSIGN`` at the next. The
service never reads a vector's eventfd: if it dies at any point, the event is still there or delivered.

A vector has one decision on its way at most. Everything a decision rests on is read after the generation it carries,
so one that comes too late is refused (``ESTALE``), and the vector is looked at again.
"""

import asyncio
import errno
import itertools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final, NamedTuple

import structlog

from irqrouter.errors import CallerError, IrqrouterError, KernelError
from irqrouter.iommu.fault import Fault
from irqrouter.iommu_remap import AmdviRemapper, NoRemapping, Remapper, VtdRemapper
from irqrouter.kvm.eventfd import EpollWatchSet, KvmEventfd
from irqrouter.memory import MemfdMemory, MemoryRegion
from irqrouter.scope import Scope
from irqrouter.service import wire
from irqrouter.service.channel import Channel, GoneError, Packet, is_eventfd
from irqrouter.service.config import Limits
from irqrouter.service.page import StatePage
from irqrouter.service.shares import FrameShare, LogShare, TimeShare
from irqrouter.service.status import Happenings, VectorReport, VmStatus, What
from irqrouter.service.wire import (
    Code,
    Command,
    Feature,
    Frame,
    Hello,
    Kind,
    Operation,
    Record,
    RemapperKind,
    Slot,
    SlotState,
    WireError,
)
from irqrouter.x86.msi import Message, Request

#: How long after a failed translation the entry is read again, before the fault is caught. A guest's driver writes the
#: two halves of an entry within nanoseconds; a vCPU that is preempted between them takes longer.
SECOND_READING_S: Final = 0.0005
#: How many fired eventfds one turn of the loop takes of one VM; the rest come in the next.
HARVEST_MAX: Final = 256
#: An event that cannot be delivered is tried again after this, doubling up to the second.
BACK_OFF_MIN_S: Final = 0.001
BACK_OFF_MAX_S: Final = 1.0
#: After so many decisions in a row that were invalidated before any event came, the next waits for an event.
VAIN_MAX: Final = 2
#: How many vectors one turn of the loop looks at for one VM.
LOOKS_MAX: Final = 64
#: How many packets of one VM one turn of the loop takes.
PACKETS_MAX: Final = 16
#: How many operations of one VM may be unanswered; those of vectors that are gone meanwhile count as well.
OPERATIONS_MAX: Final = 2 * wire.SLOTS_MAX


#: Answers that are no refusal: the vector is assigned already, or an operation before this one was refused.
_NO_REFUSAL: Final = frozenset({errno.EALREADY, errno.ECANCELED})
#: Answers that time alone will change: a deassign on its way, a route not accepted yet, an event that came too late.
_PASSING: Final = frozenset({errno.EINPROGRESS, errno.ENXIO, errno.EAGAIN})


#: The order within a batch. ASSIGN is sent for routes that KVM has accepted, so it waits for no table write; SET_ROUTE
#: is what causes one, and comes after its vector's CATCH.
_ORDER: Final = {Kind.ASSIGN: 0, Kind.CATCH: 1, Kind.CATCH_FAULT: 1, Kind.PREPARE: 1, Kind.SET_ROUTE: 2}


class Peer(NamedTuple):
    """Who is at the other end of a connection, as the kernel told (``SO_PEERCRED``, ``SO_PEERGROUPS``)."""

    pid: int
    uid: int
    gid: int
    groups: Sequence[int] = ()


class _Watched:
    """A vector of the VM, as the service knows it; all else is in its slot."""

    __slots__ = (
        "again", "born", "busy", "caught", "delay", "eventfd", "number", "observed", "prepared", "route", "vain",
    )  # fmt: skip

    def __init__(self, number: int, born: int, eventfd: KvmEventfd) -> None:
        self.number = number
        self.born = born
        self.eventfd = eventfd
        #: A decision is on its way; and: look again when it has been answered.
        self.busy = False
        self.again = False
        #: The generation that was prepared last, how many events had been caught then, and how many in a row had none.
        self.prepared = 0
        self.caught = 0
        self.vain = 0
        self.delay = BACK_OFF_MIN_S
        self.route: Message | None = None
        self.observed = Slot()


class _Sent(NamedTuple):
    """An operation and the vector it is about."""

    operation: Operation
    watched: _Watched


class _Asked(NamedTuple):
    """A translation that the VMM is asked for, and whether an event waits for it."""

    watched: _Watched
    generation: int
    fired: bool


class Claims:
    """Which eventfds are vectors, of any VM: one that were two vectors would give each the other's events."""

    def __init__(self) -> None:
        self._claimed: dict[int, Session] = {}

    def claim(self, eventfd: KvmEventfd, session: "Session") -> bool:
        """Claim ``eventfd`` for ``session``; False where it is claimed already, by a vector that is still there."""
        former = self._claimed.get(eventfd.identity)
        if former is not None:
            former.forget_removed()
            if eventfd.identity in self._claimed:
                return False
        self._claimed[eventfd.identity] = session
        return True

    def give_back(self, eventfd: KvmEventfd) -> None:
        """It is no vector any more."""
        self._claimed.pop(eventfd.identity, None)


class Session:
    """The VM of one agent, from its ``HELLO`` to its end. Owns ``channel`` and the descriptors it was given."""

    def __init__(
        self,
        hello: Hello,
        peer: Peer,
        channel: Channel,
        batches: Channel,
        doorbell: KvmEventfd,
        *,
        limits: Limits,
        prefetch: bool,
        claims: Claims,
        happenings: Happenings,
        has_company: Callable[[], bool],
    ) -> None:
        self.hello = hello
        self.peer = peer
        self.limits = limits
        self.prefetch = prefetch
        self.has_company = has_company
        self._log: structlog.stdlib.BoundLogger = structlog.get_logger("irqrouter").bind(
            vm=hello.name, pid=peer.pid, uid=peer.uid
        )
        self._loop = asyncio.get_running_loop()
        self._since = time.monotonic()
        self._requests = channel
        self._batches = batches
        self._doorbell = doorbell
        self._claims = claims
        self._happenings = happenings
        self._failure: asyncio.Future[None] = self._loop.create_future()
        self._closed = False
        self._vectors: dict[int, _Watched] = {}
        self._by_fd: dict[int, _Watched] = {}
        self._memory: MemfdMemory | None = None
        self._registers: tuple[int, int] | None = None
        self._remapper: Remapper = NoRemapping()
        # Who is to be looked at, and who will be at the next ring whatever the page says then: the agent will have
        # carried out what ADD was answered with, or a slot may look as it did before the decision was carried out.
        self._to_look: dict[_Watched, None] = {}
        self._at_next_ring: dict[_Watched, None] = {}
        self._looking_on = False  # a turn of the loop will look at the rest
        self._paused = False
        # What waits to be sent: at most one decision for each vector.
        self._outbox: dict[_Watched, list[Operation]] = {}
        self._to_translate: dict[_Watched, _Asked] = {}
        self._unanswered: dict[int, tuple[Command, int, Callable[[Frame], None]]] = {}
        self._last_id = 0
        self._on_their_way = 0  # operations that are unanswered
        self._stuck = False  # the agent does not read its batches
        self._lines = LogShare()
        self._time = TimeShare()
        self._owes = 0.0  # how long the next request has to wait for what the last one took of that
        self.frames = self.bytes = self.operations = self.stale = self.faults = self.doorbells = self.wakeups = 0
        self._page = StatePage(hello.slots)
        try:
            self._watch_set = EpollWatchSet()
        except BaseException:
            self._page.close()
            raise

    @property
    def name(self) -> str:
        """The VM's."""
        return self.hello.name

    # --- life ----------------------------------------------------------------------------------------------------

    async def run(self, welcome: Frame) -> None:
        """Answer ``HELLO`` with ``welcome`` and serve until the agent goes away or breaks the protocol.

        Whatever happens, everything is released when this returns or is cancelled. Raises
        :class:`~irqrouter.service.channel.GoneError`, and :class:`WireError` where the agent broke a rule after which
        the connection cannot go on.
        """
        ended: Exception | None = None
        try:
            await self._requests.send(welcome, [self._page.fd])
            self._listen()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._serve_requests())
                group.create_task(self._fail_with_callbacks())
        except* (GoneError, WireError) as errors:
            ended = errors.exceptions[0]  # raised below: before 3.11.4 Python makes a group of what is raised here
        finally:
            self.close()
        if ended is not None:
            raise ended

    def close(self) -> None:
        """Release everything. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._ignore()
        for watched in list(self._vectors.values()):
            self._forget(watched)
        self._watch_set.close()
        self._doorbell.close()
        self._requests.close()
        self._batches.close()
        self._page.close()
        if self._memory is not None:
            self._memory.close()

    def end(self, why: str) -> None:
        """Make :meth:`run` end, soon."""
        self._fail(GoneError(f"VM {self.name}", why))

    def _fail(self, error: Exception) -> None:
        if not self._failure.done():
            self._failure.set_exception(error)

    def _guarded(self, callback: Callable[..., None], *arguments: object) -> None:
        """Run a callback of the loop's; what it raises ends this session, and no other."""
        if self._closed:
            return
        began = time.thread_time()  # what others make us wait for is not its doing
        try:
            callback(*arguments)
        except Exception as error:  # noqa: BLE001 - handed on by run(), whatever it is
            self._fail(error)
        self._charge(began)

    def _charge(self, began: float) -> float:
        """The loop has worked for the VM since ``began`` of the thread's time; returns for how long it pauses now."""
        used = time.thread_time() - began
        pause = self._time.spend(used, time.monotonic()) if self.has_company() else 0.0
        if pause:
            self._pause(pause)
        return pause

    def _listen(self) -> None:
        """Be called when something happens."""
        self._paused = False
        if not self._closed:
            self._look_on_later()
            self._loop.add_reader(self._doorbell.fileno(), self._guarded, self._on_doorbell)
            self._loop.add_reader(self._watch_set.fileno(), self._guarded, self._on_fired)
            self._batches.on_readable(partial(self._guarded, self._on_batch_replies))

    def _pause(self, seconds: float) -> None:
        """Leave the loop to others. What happens meanwhile waits: it is all level-triggered."""
        if not self._closed and not self._paused:
            self._paused = True
            self._ignore()
            self._loop.call_later(seconds, self._listen)

    def _ignore(self) -> None:
        self._loop.remove_reader(self._doorbell.fileno())
        self._loop.remove_reader(self._watch_set.fileno())
        self._batches.ignore()

    async def _fail_with_callbacks(self) -> None:
        await self._failure

    # --- requests ------------------------------------------------------------------------------------------------

    async def _serve_requests(self) -> None:
        share = FrameShare()
        while True:
            packet = await self._requests.receive()
            self.frames += 1
            self.bytes += len(packet.data)
            try:
                await self._serve(packet)
            finally:
                closed = packet.close()
            if closed is not None:
                await closed
            # To the others after every frame; and to nobody but the others when a share is used up.
            pause, self._owes = max(self._owes, share.spend(len(packet.data), self.limits)), 0.0
            await asyncio.sleep(pause)

    async def _serve(self, packet: Packet) -> None:
        id = command = 0  # noqa: A001 - the field's name
        try:
            frame = packet.frame(with_descriptors=True)
            id, command = frame.id, frame.command  # noqa: A001 - as above
            for reply in await self._answer(frame, packet):
                await self._requests.send(reply)
        except WireError as error:
            self._complain("refused", command=command, why=str(error))
            await self._requests.send(wire.error_frame(id, command, error))
            if error.code in (Code.FRAME, Code.INTERNAL):
                raise

    async def _answer(self, frame: Frame, packet: Packet) -> Sequence[Frame]:
        if frame.reply:
            raise WireError(Code.FRAME, f"frame {frame.id}", "is a reply; the request socket takes commands")
        if frame.command not in (Command.MEMORY, Command.ADD) and packet.descriptors:
            raise WireError(Code.FRAME, f"frame {frame.id} of command {frame.command}", "has descriptors")
        match frame.command:
            case Command.MEMORY | Command.ADD:  # milliseconds, where it has hundreds of descriptors
                began = time.thread_time()
                try:
                    return self._take_in(frame, packet)
                finally:
                    self._owes = self._charge(began)
            case Command.INVALIDATE:
                if not self.hello.features & Feature.WIDE:
                    raise WireError(Code.COMMAND, "INVALIDATE", "is for agents that offered WIDE")
                return _replies(frame, await self._retranslate(wire.decode_scope(frame.payload)))
            case Command.PING:
                if frame.payload:
                    raise WireError(Code.PAYLOAD, "PING", f"has {len(frame.payload)} bytes, must have none")
                return [_reply(frame)]
            case Command.HELLO:
                raise WireError(Code.ORDER, "HELLO", "was said already")
            case _:
                raise WireError(Code.COMMAND, f"command {frame.command}", "is not defined")

    def _take_in(self, frame: Frame, packet: Packet) -> Sequence[Frame]:
        if frame.command == Command.MEMORY:
            self._set_memory(wire.decode_memory(frame.payload, len(packet.descriptors)), packet)
            return [_reply(frame)]
        return _replies(frame, self._add(wire.decode_add(frame.payload, len(packet.descriptors)), packet))

    def _set_memory(self, regions: Sequence[wire.Region], packet: Packet) -> None:
        if self.hello.remapper in (RemapperKind.NONE, RemapperKind.VMM):
            raise WireError(Code.ORDER, "MEMORY", "is for agents whose guest's tables the service reads")
        if len(regions) > self.limits.regions:
            raise WireError(Code.QUOTA, f"{len(regions)} regions", f"must be at most {self.limits.regions}")
        try:
            memory = MemfdMemory(
                MemoryRegion(gpa=each.gpa, size=each.size, fd=packet.descriptors[each.descriptor], offset=each.offset)
                for each in regions
            )
        except KernelError as error:
            raise WireError(Code.MEMORY, error.object, error.rule, errno=error.errno) from error
        except CallerError as error:
            raise WireError(Code.MEMORY, error.object, error.rule) from error
        before, self._memory = self._memory, memory
        self._registers = None
        if before is not None:
            before.close()

    def _add(self, added: Sequence[wire.Added], packet: Packet) -> list[Operation]:
        self._refuse_new(added)
        vectors: list[_Watched] = []
        try:
            for index, each in enumerate(added):
                vectors.append(_Watched(each.vector, each.born, self._adopt(packet.descriptors[index], index)))
        except BaseException:
            for watched in vectors:
                self._release(watched.eventfd)
            raise
        operations: list[Operation] = []
        for watched, each in zip(vectors, added, strict=True):
            if (former := self._vectors.get(watched.number)) is not None:
                self._forget(former)
            self._vectors[watched.number] = watched
            self._by_fd[watched.eventfd.fileno()] = watched
            self._happenings.tell(self.name, What.ADDED, watched.number, watched.born)
            decided = self._first_decision(watched) if each.new else []
            operations += decided
            if decided:  # the agent carries that out and rings: what is deassigned still is looked at then
                self._at_next_ring[watched] = None
            else:
                self._look_at(watched)
        self._look_on()
        operations.sort(key=lambda op: op.kind is Kind.ASSIGN)  # every route first, so that one table write will do
        return operations

    def _refuse_new(self, added: Sequence[wire.Added]) -> None:
        for index, each in enumerate(added):
            if each.vector >= self.hello.slots:
                raise WireError(
                    Code.VECTOR, f"vector {each.vector}", f"must be below {self.hello.slots} slots", index=index
                )
            if self._page.slot(each.vector).born != each.born:
                raise WireError(
                    Code.VECTOR, f"vector {each.vector}", f"the state page does not say born {each.born}", index=index
                )
        if self._are_too_many(added) and not (self.forget_removed() and not self._are_too_many(added)):
            raise WireError(
                Code.QUOTA, f"{len(added)} more vectors", f"{len(self._vectors)} of {self.limits.vectors} are there"
            )

    def _are_too_many(self, added: Sequence[wire.Added]) -> bool:
        new = sum(each.vector not in self._vectors for each in added)
        return len(self._vectors) + new > self.limits.vectors

    def _adopt(self, fd: int, index: int) -> KvmEventfd:
        if not is_eventfd(fd):
            raise WireError(Code.DESCRIPTOR, f"descriptor {index}", "is not an eventfd", index=index)
        try:
            eventfd = KvmEventfd(fd)
        except CallerError as error:
            raise WireError(Code.DESCRIPTOR, f"descriptor {index}", error.rule, index=index) from error
        except KernelError as error:
            raise WireError(
                Code.DESCRIPTOR, f"descriptor {index}", error.rule, errno=error.errno, index=index
            ) from error
        if not self._claims.claim(eventfd, self):
            eventfd.close()
            raise WireError(
                Code.DESCRIPTOR, f"descriptor {index}", "is a vector's already", errno=errno.EBUSY, index=index
            )
        return eventfd

    def forget_removed(self) -> bool:
        """Forget the vectors that the page says are gone, if there are any: their doorbell may not have been heard."""
        gone = [
            watched for watched in self._vectors.values() if self._is_gone(watched, self._page.slot(watched.number))
        ]
        for watched in gone:
            self._forget(watched)
        return bool(gone)

    def _is_gone(self, watched: _Watched, slot: Slot) -> bool:
        return slot.born != watched.born or slot.is_in(SlotState.FREE)

    def _first_decision(self, watched: _Watched) -> list[Operation]:
        """A new vector, translated quietly: its route and irqfd, if that succeeds."""
        slot = self._page.slot(watched.number)
        if not slot.is_in(SlotState.DEASSIGNED) or self.hello.remapper == RemapperKind.VMM:
            return []
        outcome = self._translate(slot)
        if not isinstance(outcome, Message):
            return []
        watched.route = outcome
        return [
            _with_message(Kind.SET_ROUTE, watched, slot.generation, outcome),
            Operation(Kind.ASSIGN, watched.number, slot.generation),
        ]

    async def _retranslate(self, scope: Scope) -> list[Operation]:
        """A wide invalidation: new routes for those in ``scope`` that are assigned, quietly."""
        operations: list[Operation] = []
        if self.hello.remapper == RemapperKind.VMM:
            return operations
        for count, watched in enumerate(list(self._vectors.values()), 1):
            slot = self._page.slot(watched.number)
            if slot.cookie in scope and slot.is_in(SlotState.ASSIGNED) and slot.born == watched.born:
                outcome = self._translate(slot)
                if isinstance(outcome, Message):
                    watched.route = outcome
                    operations.append(_with_message(Kind.SET_ROUTE, watched, slot.generation, outcome))
            if not count % LOOKS_MAX and self.has_company():
                await asyncio.sleep(0)
        self._happenings.tell(self.name, What.RENEWED, detail=f"{scope.describe()}: {len(operations)} rerouted")
        return operations

    # --- what happened -------------------------------------------------------------------------------------------

    def _on_doorbell(self) -> None:
        self._doorbell.read()
        self.doorbells += 1
        self._look_at(*self._at_next_ring, *filter(None, map(self._vectors.get, self._page.changed())))
        self._at_next_ring.clear()
        self._look_on()

    def _look_at(self, *vectors: _Watched) -> None:
        """Look at ``vectors`` when :meth:`_look_on` comes to them."""
        self._to_look.update(dict.fromkeys(vectors))

    def _look_on(self) -> None:
        """Look at some of those that changed, and at the rest in the next turn: they may be thousands."""
        for watched in list(itertools.islice(self._to_look, LOOKS_MAX)):
            del self._to_look[watched]
            self._look(watched)
        self._flush()
        self._look_on_later()

    def _look_on_later(self) -> None:
        """See to it that one turn of the loop, the next or the first after a pause, looks at the rest."""
        if self._to_look and not self._looking_on and not self._paused:
            self._looking_on = True
            self._loop.call_soon(self._guarded, self._look_on_now)

    def _look_on_now(self) -> None:
        self._looking_on = False
        if not self._paused:
            self._look_on()

    def _on_fired(self) -> None:
        for fd in self._watch_set.harvest(HARVEST_MAX):
            watched = self._by_fd.get(fd)
            if watched is not None:
                self.wakeups += 1
                self._happenings.tell(self.name, What.FIRED, watched.number)
                self._look(watched, fired=True)
        self._flush()

    def _look(self, watched: _Watched, *, fired: bool = False, second_reading: bool = False) -> None:
        """Look at a vector whose slot changed or whose eventfd ``fired``, and decide what it needs now, if anything."""
        if watched.busy:
            watched.again = True
            return
        if self._vectors.get(watched.number) is not watched:
            return
        slot = self._page.slot(watched.number)
        if self._is_gone(watched, slot):
            self._forget(watched)
            return
        if not slot.waits():
            return
        if not fired and not self._worth_preparing(watched, slot):
            self._watch(watched)
            return
        if fired and slot.state & wire.ROUTED and not slot.refused:
            self._post(watched, Operation(Kind.ASSIGN, watched.number, slot.generation, flag=True))
            return
        if self.hello.remapper == RemapperKind.VMM:
            watched.busy = True
            self._to_translate[watched] = _Asked(watched, slot.generation, fired)
            return
        outcome = self._translate(slot)
        if isinstance(outcome, Message):
            self._deliver(watched, slot.generation, outcome)
        elif not fired:
            self._watch(watched)
        elif outcome is None:
            self._back_off(watched)
        elif not second_reading:
            watched.busy = True
            self._loop.call_later(SECOND_READING_S, self._guarded, self._read_again, watched)
        else:
            self._catch_fault(watched, slot.generation, outcome.record() if outcome.recorded else None)

    def _worth_preparing(self, watched: _Watched, slot: Slot) -> bool:
        """Whether to translate before an event asks for it."""
        if not (self.prefetch and self.hello.features & Feature.PREPARE):
            return False
        if watched.prepared and watched.prepared != slot.generation:
            watched.vain = watched.vain + 1 if slot.caught == watched.caught else 0
            watched.prepared = 0
        return watched.vain < VAIN_MAX and not slot.refused

    def _translate(self, slot: Slot) -> Message | Fault | None:
        """What the slot's request translates to now; None where that cannot be said."""
        header = self._page.header()
        if self._registers != (header.table, header.control):
            self._set_registers(header)
        try:
            return self._remapper.translate(Request(Message(slot.address, slot.data), slot.requester))
        except IrqrouterError as error:
            self._complain("cannot translate", why=str(error))
            return None

    def _set_registers(self, header: wire.PageHeader) -> None:
        """Make the remapper what the page's header says it is; it covers every generation read from now on."""
        self._registers = (header.table, header.control)
        memory = self._memory or MemfdMemory(())
        if self.hello.remapper == RemapperKind.VTD:
            vtd = VtdRemapper(memory, host_address_width=self.hello.host_address_width)
            vtd.set_interrupt_remap_table(header.table)
            vtd.set_remapping(enabled=bool(header.control & 1))
            vtd.set_compatibility_format(allowed=bool(header.control & 2))
            self._remapper = vtd
        elif self.hello.remapper == RemapperKind.AMDVI:
            amdvi = AmdviRemapper(memory)
            amdvi.set_device_table(header.table)
            amdvi.set_control(header.control)
            self._remapper = amdvi

    def _deliver(self, watched: _Watched, generation: int, message: Message) -> None:
        slot = self._page.slot(watched.number)
        watched.route = message
        if slot.refused:  # KVM takes no route or irqfd of this generation: every event is caught
            self._post(watched, _with_message(Kind.CATCH, watched, generation, message))
        elif self.hello.features & Feature.PREPARE:
            watched.prepared, watched.caught = generation, slot.caught
            self._post(watched, _with_message(Kind.PREPARE, watched, generation, message))
        else:
            self._post(watched, _with_message(Kind.CATCH, watched, generation, message))
            self._post(watched, _with_message(Kind.SET_ROUTE, watched, generation, message))

    def _catch_fault(self, watched: _Watched, generation: int, record: Record | None) -> None:
        self.faults += 1
        self._post(
            watched,
            Operation(Kind.CATCH_FAULT, watched.number, generation, record=record or (0, 0), flag=record is not None),
        )

    def _read_again(self, watched: _Watched) -> None:
        watched.busy = watched.again = False
        self._look(watched, fired=True, second_reading=True)
        self._flush()

    def _watch(self, watched: _Watched) -> None:
        """Be told when the eventfd is readable, once; at once where it is."""
        try:
            self._watch_set.arm(watched.eventfd)
        except KernelError as error:  # EINVAL: it is in too many epoll sets; ENOSPC: our user watches too much
            self._complain("cannot watch", vector=watched.number, why=str(error))
            self._back_off(watched)

    def _back_off(self, watched: _Watched) -> None:
        """Look again later: never spin on an event that cannot be delivered."""
        if watched.busy:  # something is on its way already, one is enough
            return
        watched.busy = True
        self._loop.call_later(watched.delay, self._guarded, self._after_back_off, watched)
        watched.delay = min(2 * watched.delay, BACK_OFF_MAX_S)

    def _after_back_off(self, watched: _Watched) -> None:
        again = watched.again
        watched.busy = watched.again = False
        if again:
            self._look(watched)
            self._flush()
        else:
            self._watch_if_deassigned(watched)

    def _watch_if_deassigned(self, watched: _Watched) -> None:
        if self._vectors.get(watched.number) is watched and self._page.slot(watched.number).waits():
            self._watch(watched)

    def _forget(self, watched: _Watched) -> None:
        if self._vectors.get(watched.number) is watched:
            del self._vectors[watched.number]
        for waiting in (self._to_look, self._at_next_ring, self._outbox, self._to_translate):
            waiting.pop(watched, None)
        del self._by_fd[watched.eventfd.fileno()]
        self._release(watched.eventfd)
        self._happenings.tell(self.name, What.REMOVED, watched.number, watched.born)

    def _release(self, eventfd: KvmEventfd) -> None:
        self._claims.give_back(eventfd)
        eventfd.close()

    # --- batches -------------------------------------------------------------------------------------------------

    def _post(self, watched: _Watched, operation: Operation) -> None:
        watched.busy = True
        self._outbox.setdefault(watched, []).append(operation)

    def _flush(self) -> None:
        """Send what was decided, unless the agent does not read; then, as soon as it does."""
        while self._outbox and self._may_send():
            batch: list[_Sent] = []
            for watched, operations in self._outbox.items():
                if len(batch) + len(operations) > wire.OPERATIONS_MAX:
                    break
                batch += [_Sent(operation, watched) for operation in operations]
            batch.sort(key=lambda sent: _ORDER[sent.operation.kind])
            if not self._command(Command.BATCH, [sent.operation for sent in batch], partial(self._carried_out, batch)):
                return
            for sent in batch:
                self._outbox.pop(sent.watched, None)
            self.operations += len(batch)
        while self._to_translate and self._may_send():
            asked = list(itertools.islice(self._to_translate.values(), wire.OPERATIONS_MAX))
            misses = [Operation(Kind.MISS, each.watched.number, each.generation) for each in asked]
            if not self._command(Command.TRANSLATE, misses, partial(self._translated, asked)):
                return
            for each in asked:
                del self._to_translate[each.watched]

    def _may_send(self) -> bool:
        return not self._stuck and len(self._unanswered) < wire.UNANSWERED_MAX and self._on_their_way < OPERATIONS_MAX

    def _command(self, command: Command, operations: Sequence[Operation], on_reply: Callable[[Frame], None]) -> bool:
        """Send a command whose reply goes to ``on_reply``; False where that must wait, for :meth:`_flush`."""
        self._last_id = (self._last_id + 1) & 0xFFFF
        while self._last_id in self._unanswered:
            self._last_id = (self._last_id + 1) & 0xFFFF
        if not self._batches.send_now(Frame(self._last_id, command, wire.encode_operations(operations))):
            self._stuck = True
            self._batches.when_writable(partial(self._guarded, self._unstick))
            return False
        self._unanswered[self._last_id] = command, len(operations), on_reply
        self._on_their_way += len(operations)
        return True

    def _unstick(self) -> None:
        self._stuck = False
        self._flush()

    def _on_batch_replies(self) -> None:
        for _ in range(PACKETS_MAX):
            packet = self._batches.receive_now()
            if packet is None:
                break
            try:
                self._on_batch_reply(packet.frame())
            finally:
                packet.close()
        self._look_on()

    def _on_batch_reply(self, frame: Frame) -> None:
        command, operations, on_reply = self._unanswered.pop(frame.id, (None, 0, None))
        if on_reply is None or frame.command != command or not frame.reply or frame.more or frame.errno:
            raise WireError(Code.FRAME, f"frame {frame.id} of command {frame.command}", "answers no command of ours")
        self._on_their_way -= operations
        on_reply(frame)

    def _carried_out(self, batch: Sequence[_Sent], frame: Frame) -> None:
        errnos = wire.decode_errnos(frame.payload, len(batch))
        for sent in batch:
            sent.watched.busy = False
        for (operation, watched), error in zip(batch, errnos, strict=True):
            if self._vectors.get(watched.number) is watched:
                self._answered(operation, watched, error)
        self._look_again(sent.watched for sent in batch)

    def _look_again(self, vectors: Iterable[_Watched]) -> None:
        """Look at those of ``vectors`` that changed while their decision was on its way."""
        for watched in vectors:
            if watched.again and not watched.busy:
                watched.again = False
                self._look_at(watched)

    def _answered(self, operation: Operation, watched: _Watched, error: int) -> None:
        """Go on after the agent carried out ``operation``, or did not."""
        kind = operation.kind
        if error == errno.ESTALE:
            self.stale += 1
            self._happenings.tell(self.name, What.STALE, watched.number, operation.generation, kind.name)
            if self._page.generation(watched.number) == operation.generation:
                self._back_off(watched)  # the page contradicts it, and would lead to the same decision
            else:
                watched.again = True
        elif error == errno.EAGAIN and not watched.eventfd.pending():
            self._watch(watched)  # somebody else had the event
        elif error in _PASSING:
            self._back_off(watched)
        elif error and error not in _NO_REFUSAL:
            self._complain("not carried out", op=kind.name, vector=watched.number, why=_name(error))
            if kind is not Kind.SET_ROUTE:  # without a route every event is caught
                self._back_off(watched)
        elif not error:
            watched.delay = BACK_OFF_MIN_S
            if kind is Kind.PREPARE and self._happenings:
                self._observe(watched)  # the page is behind what is told here by up to one look
                self._happenings.tell(self.name, What.PREPARED, watched.number, operation.generation)
            if kind in (Kind.CATCH, Kind.CATCH_FAULT):
                self._watch(watched)
            elif kind is not Kind.SET_ROUTE:
                # When it is taken back within this generation, as by the end of a wide invalidation, the slot is again
                # what it was when it was looked at last, and the ring tells nothing. That may have been already.
                self._at_next_ring[watched] = None
                self._watch_if_deassigned(watched)

    def _translated(self, asked: Sequence[_Asked], frame: Frame) -> None:
        operations = wire.decode_operations(frame.payload, wire.IN_TRANSLATED)
        if len(operations) != len(asked):
            raise WireError(Code.PAYLOAD, "TRANSLATE's reply", f"must have {len(asked)} operations")
        for each, answer in zip(asked, operations, strict=True):
            watched = each.watched
            watched.busy = False
            if self._vectors.get(watched.number) is not watched:
                continue
            if answer.vector != watched.number:
                raise WireError(Code.PAYLOAD, "TRANSLATE's reply", "must be in the order of the command")
            if answer.kind is Kind.UPDATE:
                self._deliver(watched, answer.generation, Message(answer.address, answer.data))
            elif answer.kind is Kind.FAULT and each.fired:
                self._catch_fault(watched, answer.generation, answer.record)
            elif answer.kind is Kind.FAULT:
                self._watch(watched)
            elif self._page.generation(watched.number) == each.generation:
                self._back_off(watched)  # the VMM cannot say just now
            else:
                self._look(watched, fired=each.fired)
        self._look_again(each.watched for each in asked)

    # --- for people ----------------------------------------------------------------------------------------------

    def status(self) -> VmStatus:
        """A snapshot of the VM."""
        slots = [self._page.slot(number) for number in self._vectors]
        return VmStatus(
            name=self.name,
            pid=self.peer.pid,
            uid=self.peer.uid,
            attached_s=time.monotonic() - self._since,
            remapper=self.hello.remapper.name,
            features=[feature.name or "" for feature in self.hello.features],
            vectors=len(slots),
            assigned=sum(slot.is_in(SlotState.ASSIGNED) for slot in slots),
            deassigned=sum(slot.is_in(SlotState.DEASSIGNED) for slot in slots),
            masked=sum(slot.is_in(SlotState.MASKED) for slot in slots),
            prepared=sum(bool(slot.state & wire.PREPARED) for slot in slots),
            regions=0 if self._memory is None else self._memory.regions,
            # Two sockets, the doorbell, the epoll set, the page and the duplicate that its map holds.
            descriptors=len(slots) + 6 + (0 if self._memory is None else self._memory.descriptors),
            frames=self.frames,
            bytes=self.bytes,
            operations=self.operations,
            stale=self.stale,
            faults=self.faults,
            doorbells=self.doorbells,
            wakeups=self.wakeups,
        )

    def vectors(self) -> list[VectorReport]:
        """A snapshot of every vector, in the order of their numbers."""
        return [self._report(self._vectors[number]) for number in sorted(self._vectors)]

    def _report(self, watched: _Watched) -> VectorReport:
        slot = self._page.slot(watched.number)
        return VectorReport(
            vm=self.name,
            vector=watched.number,
            gsi=slot.gsi,
            state=_state_name(slot),
            prepared=bool(slot.state & wire.PREPARED),
            generation=slot.generation,
            requester=slot.requester,
            message=Message(slot.address, slot.data),
            cookie=slot.cookie,
            route=watched.route,
            invalidations=slot.invalidations,
            caught=slot.caught,
            faults=slot.faults,
            stale=slot.stale,
            discarded=slot.discarded,
            refused=slot.refused,
            last_catch_us=slot.last_catch_ns / 1000 if slot.last_catch_ns else None,
        )

    def observe(self, *, tell: bool = True) -> None:
        """Tell what the page says has happened since the last time, which nothing else in the service needs to know."""
        for watched in self._vectors.values():
            self._observe(watched, tell=tell)

    def _observe(self, watched: _Watched, *, tell: bool = True) -> None:
        slot, before = self._page.slot(watched.number), watched.observed
        if slot != before:
            watched.observed = slot
            if tell:
                self._tell(watched.number, slot, before)

    def _tell(self, vector: int, slot: Slot, before: Slot) -> None:
        if slot.generation != before.generation:
            self._happenings.tell(self.name, What.RENEWED, vector, slot.generation, _state_name(slot))
        for what, times in ((What.CAUGHT, slot.caught - before.caught), (What.FAULTED, slot.faults - before.faults)):
            if times & 0xFFFF_FFFF:
                detail = f"{times & 0xFFFF_FFFF} times" if times != 1 else ""
                self._happenings.tell(self.name, what, vector, slot.generation, detail)
        if slot.is_in(SlotState.ASSIGNED) and not before.is_in(SlotState.ASSIGNED):
            self._happenings.tell(self.name, What.ASSIGNED, vector, slot.generation)

    def _complain(self, event: str, **fields: object) -> None:
        """A line in the log, unless this VM has had its share of this second."""
        if self._lines.take():
            self._log.warning(event, suppressed=self._lines.forget_suppressed(), **fields)


def _name(error: int) -> str:
    """The errno's text; the agent may have answered any number."""
    return os.strerror(error) if error in errno.errorcode else f"errno {error}"


def _state_name(slot: Slot) -> str:
    state = slot.state & wire.STATE_MASK
    return SlotState(state).name.lower() if state <= SlotState.MASKED else f"unknown ({state})"


def _with_message(kind: Kind, watched: _Watched, generation: int, message: Message) -> Operation:
    return Operation(kind, watched.number, generation, message.address, message.data)


def _reply(frame: Frame, payload: bytes = b"", *, more: bool = False) -> Frame:
    return Frame(frame.id, frame.command, payload, reply=True, more=more)


def _replies(frame: Frame, operations: Sequence[Operation]) -> list[Frame]:
    """The reply that carries ``operations``, in as many frames as that takes."""
    parts = [operations[at : at + wire.OPERATIONS_MAX] for at in range(0, max(1, len(operations)), wire.OPERATIONS_MAX)]
    return [_reply(frame, wire.encode_operations(part), more=part is not parts[-1]) for part in parts]

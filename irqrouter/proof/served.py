"""The side with a service: an agent in this process acts, ``irqrouter serve`` in another one decides.

The VMM is this process: it made the VM, so KVM takes its ioctls only. Its agent (in C, or in Python) owns eventfds,
states and the routing table. What an event should become is decided by the service (``docs/protocol.md``).
"""

import array
import asyncio
import contextlib
import enum
import os
import statistics
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Generic, Protocol, TypeAlias

import msgspec

from irqrouter.core.machine import State
from irqrouter.core.vectors import VectorStatus
from irqrouter.errors import CallerError
from irqrouter.eventfd_loop import Source
from irqrouter.iommu.vtd import cookie
from irqrouter.kvm.vm import KvmVm
from irqrouter.memory import MemoryRegion
from irqrouter.proof.board import Board
from irqrouter.proof.c_agent import Timed
from irqrouter.proof.driver import IRTA, SLOTS
from irqrouter.proof.guest import RAM_SIZE
from irqrouter.proof.machine import Machine
from irqrouter.proof.routing import Handle, Routing, Side
from irqrouter.proof.scenario import StalledError
from irqrouter.proof.service import ServiceFailedError, ServiceProcess
from irqrouter.scope import Scope
from irqrouter.service.admin_client import AdminError, connected
from irqrouter.service.status import VmStatus
from irqrouter.service.wire import Record, RemapperKind
from irqrouter.x86.msi import Message

#: How long agent and service may take to find each other at the beginning.
_ATTACH_S: Final = 30.0
#: Events before the first change of anything: while they are fired nobody may wake.
_QUIET_EVENTS: Final = 1000
_QUIET_S: Final = 20.0
_LOOK_S: Final = 0.005
#: GSTS.IRES, as ``set_registers`` takes it: interrupt remapping is on.
_REMAPPING_ON: Final = 1

#: Told of a fault: the vector's handle, and the Fault Recording Register.
OnFault: TypeAlias = Callable[[object, Record], None]


class AgentKind(enum.Enum):
    """Which agent the VMM uses."""

    C = "c"
    PYTHON = "python"


class Agent(Routing[Handle], Protocol[Handle]):
    """What both agents have beyond the verbs."""

    @property
    def connected(self) -> bool:
        """A service knows everything."""
        ...

    def set_memory(self, regions: Sequence[MemoryRegion], /) -> None:
        """Guest memory, whole."""
        ...

    def set_registers(self, table: int, control: int, /) -> object:
        """The remapping unit's registers."""
        ...

    def wait_connected(self, timeout_s: float, /) -> bool:
        """Wait until a service knows everything."""
        ...

    def close(self) -> None:
        """Remove every vector and end."""
        ...


class Held(Generic[Handle]):
    """An agent's handle, and what the run knows of its vector."""

    __slots__ = ("caught", "cookie", "handle")

    def __init__(self, handle: Handle, cookie: int) -> None:
        self.handle = handle
        self.cookie = cookie
        #: As last seen: of a vector that was removed, just before that.
        self.caught = 0


class Invalidations:
    """How long each invalidation took, and how much of that the service held it up."""

    def __init__(self) -> None:
        # Appended to by several threads, each under the interpreter lock.
        self._ns = array.array("Q")
        self._waited_ns = array.array("Q")
        self._held_up_ns = array.array("Q")

    def add(self, timed: Timed, *, without_a_cpu_ns: int) -> None:
        """One more, during which its thread was ready to run and had no CPU for so long: nobody's fault here."""
        self._ns.append(timed.ns)
        self._waited_ns.append(timed.waited_ns)
        self._held_up_ns.append(max(0, timed.waited_ns - without_a_cpu_ns))

    def __len__(self) -> int:
        return len(self._ns)

    def median_us(self) -> float:
        """The median; 0 without any."""
        return statistics.median(self._ns) / 1000 if self._ns else 0.0

    def longest_us(self) -> float:
        """The longest; 0 without any."""
        return max(self._ns, default=0) / 1000

    def longest_wait_us(self) -> float:
        """The longest wait for the service, until the thread ran again; 0 without any."""
        return max(self._waited_ns, default=0) / 1000

    def held_up_longer_than_us(self, limit_us: float) -> int:
        """How many the service held up for longer."""
        return sum(ns > 1000 * limit_us for ns in self._held_up_ns)


def _without_a_cpu_ns() -> int:
    """How long this thread has been ready to run and had no CPU, ever (Documentation/scheduler/sched-stats.rst)."""
    return int(Path("/proc/thread-self/schedstat").read_text("ascii").split()[1])


class ThroughAgent(Generic[Handle]):
    """The verbs, said to an agent: measures its invalidations and remembers what was caught.

    ``timed(scope)`` invalidates, measured.
    """

    def __init__(self, agent: Agent[Handle], timed: Callable[[Scope], Timed]) -> None:
        self.invalidations = Invalidations()
        self._agent = agent
        self._timed = timed

    def add(self, eventfd: int, message: Message, *, requester: int, masked: bool = False) -> Held[Handle]:
        """See :meth:`Routing.add`."""
        return Held(self._agent.add(eventfd, message, requester=requester, masked=masked), cookie(message))

    def add_all(self, sources: Iterable[Source], /) -> list[Held[Handle]]:
        """See :meth:`Routing.add_all`."""
        added = list(sources)
        handles = self._agent.add_all(added)
        return [Held(handle, cookie(source.message)) for handle, source in zip(handles, added, strict=True)]

    def invalidate(self, scope: Scope, /) -> int:
        """See :meth:`Routing.invalidate`."""
        late = _without_a_cpu_ns()
        timed = self._timed(scope)
        self.invalidations.add(timed, without_a_cpu_ns=_without_a_cpu_ns() - late)
        return timed.touched

    def mask(self, vector: Held[Handle], /) -> None:
        """See :meth:`Routing.mask`."""
        self._agent.mask(vector.handle)

    def unmask(self, vector: Held[Handle], /) -> None:
        """See :meth:`Routing.unmask`."""
        self._agent.unmask(vector.handle)

    def program(self, vector: Held[Handle], message: Message, /) -> None:
        """See :meth:`Routing.program`."""
        self._agent.program(vector.handle, message)
        vector.cookie = cookie(message)

    def remove(self, *vectors: Held[Handle]) -> None:
        """See :meth:`Routing.remove`."""
        for vector in vectors:
            self.look(vector)
        self._agent.remove(*(vector.handle for vector in vectors))

    def vectors(self) -> list[VectorStatus]:
        """See :meth:`Routing.vectors`."""
        return self._agent.vectors()

    def look(self, vector: Held[Handle]) -> None:
        """See how many events were caught; of a vector that is gone, nothing changes."""
        for status in self._agent.vectors():
            if status.cookie == vector.cookie:
                vector.caught = status.caught


class Served(Side[Held[Any]]):
    """An agent that does what a service decides.

    Where a figure comes from: what was *caught*, and how often a *prepared* vector woke somebody, the agent counts; how
    often an eventfd woke the service, that service tells (``irqrouter status`` shows the same), and another one that
    replaced it knows nothing of. Nobody can count wakeups of assigned vectors alone, because an event that is noticed
    may have been delivered a moment later; so they are counted while nothing else can happen (:meth:`quiet`).
    """

    catcher = "the agent"

    def __init__(self, opened: "Opened", service: ServiceProcess) -> None:
        self.through = ThroughAgent(opened.agent, opened.timed)
        super().__init__(self.through)
        self.opened = opened
        self.service = service
        self._quiet_events = 0
        self._woken_while_quiet = (0, 0)

    def caught(self, vector: Held[Any]) -> int:
        """See :meth:`Side.caught`. Counted by the agent; of a vector that was removed, a moment before that."""
        self.through.look(vector)
        return vector.caught

    def wakeups(self) -> int:
        """See :meth:`Side.wakeups`: the service's, as it tells, and the agent's."""
        return sum(self._woken())

    def wakeups_while_assigned(self) -> int:
        """See :meth:`Side.wakeups_while_assigned`: those while every vector was assigned and nothing changed."""
        return sum(self._woken_while_quiet)

    def asleep(self, events: int) -> str:
        """See :meth:`Side.asleep`."""
        service, agent = self._woken()
        share = (service + agent) / events if events else 0.0
        quiet_service, quiet_agent = self._woken_while_quiet
        return (
            f"{self._quiet_events:,} events with all vectors assigned woke the service {quiet_service} times (it says) "
            f"and the agent {quiet_agent}; all in all {service:,} and {agent:,}, for {share:.1%} of the events"
        )

    def check(self) -> None:
        """See :meth:`Side.check`."""
        for error in self.opened.errors:
            raise error
        self.service.check()

    @contextlib.asynccontextmanager
    async def quiet(self, board: Board, devices: int) -> AsyncGenerator[None]:
        """Let devices fire while every vector is assigned and nothing changes, and see who wakes."""
        await self._all_assigned()
        before = await asyncio.to_thread(self._woken)
        yield
        deadline = time.monotonic() + _QUIET_S
        while board.events() < _QUIET_EVENTS and not (board.drained(devices) or board.violated):
            if time.monotonic() > deadline:
                raise StalledError("the devices", f"fired {board.events()} events in {_QUIET_S:.0f} s")
            await asyncio.sleep(_LOOK_S)
        self._quiet_events = board.events()
        after = await asyncio.to_thread(self._woken)
        self._woken_while_quiet = (after[0] - before[0], after[1] - before[1])

    async def _all_assigned(self) -> None:
        deadline = time.monotonic() + _ATTACH_S
        while not all(vector.state is State.ASSIGNED for vector in self.routing.vectors()):
            if time.monotonic() > deadline:
                raise StalledError("new vectors", f"were not assigned in {_ATTACH_S:.0f} s")
            await asyncio.sleep(_LOOK_S)

    def _woken(self) -> tuple[int, int]:
        """How often an eventfd woke the service, and the agent."""
        return asyncio.run(self._status()).wakeups, self.opened.wakeups()

    async def _status(self) -> VmStatus:
        async with connected(self.service.admin_path) as client:
            for vm in await client.vms():
                if vm.name == self.opened.name:
                    return vm
        raise AdminError(f"VM {self.opened.name}", "is not attached to the service that was started for it")


class Opened(msgspec.Struct, frozen=True):
    """An agent, and what only its kind can tell."""

    name: str
    agent: Agent[Any]
    #: Invalidates, measured.
    timed: Callable[[Scope], Timed]
    #: How often a service came to know everything; 0 while none does.
    connections: Callable[[], int]
    #: The same, of which there is at least one.
    connections_ever: Callable[[], int]
    #: How often the eventfd of a prepared vector woke the agent.
    wakeups: Callable[[], int]
    #: What callbacks raised that C cannot hand on.
    errors: Sequence[BaseException] = ()


@contextlib.asynccontextmanager
async def attached(
    machine: Machine, board: Board, service: ServiceProcess, kind: AgentKind, *, deadline_s: float = 0.05
) -> AsyncGenerator[Opened]:
    """Start ``service``, and an agent for the machine's VM that is attached to it."""
    if not isinstance(machine.vm, KvmVm):
        raise CallerError("a service", "needs /dev/kvm: the eventfds of a simulated kernel exist in one process only")
    service.start()
    make = _c_agent if kind is AgentKind.C else _python_agent
    opened = await asyncio.to_thread(make, machine.vm, service.path, _recorder(board), deadline_s)
    try:
        await asyncio.to_thread(_introduce, machine, opened.agent, service)
        yield opened
    finally:
        await asyncio.to_thread(opened.agent.close)


@contextlib.asynccontextmanager
async def served(machine: Machine, board: Board, *, service: ServiceProcess, kind: AgentKind) -> AsyncGenerator[Served]:
    """A side whose service is left in peace. ``service`` is started; ending it is the caller's."""
    async with attached(machine, board, service, kind) as opened:
        yield Served(opened, service)


def _c_agent(vm: KvmVm, path: str, on_fault: OnFault, deadline_s: float) -> Opened:
    from irqrouter.proof.c_agent import CAgent

    name = f"proof-{os.getpid()}"
    agent = CAgent(vm, name=name, path=path, remapper=RemapperKind.VTD, on_fault=on_fault, deadline_s=deadline_s)
    return Opened(
        name=name,
        agent=agent,
        timed=agent.invalidate_timed,
        connections=lambda: agent.stats().connections if agent.connected else 0,
        connections_ever=lambda: agent.stats().connections,
        wakeups=lambda: agent.stats().wakeups,
        errors=agent.callback_errors,
    )


def _python_agent(vm: KvmVm, path: str, on_fault: OnFault, deadline_s: float) -> Opened:
    from irqrouter.proof.python_agent import MeasuredAgent

    name = f"proof-{os.getpid()}"
    agent = MeasuredAgent(vm, name=name, path=path, remapper=RemapperKind.VTD, on_fault=on_fault, deadline_s=deadline_s)
    return Opened(
        name=name,
        agent=agent,
        timed=agent.invalidate_timed,
        connections=lambda: agent.times_connected if agent.connected else 0,
        connections_ever=lambda: agent.times_connected,
        wakeups=lambda: 0,  # it watches no eventfd: the service does
    )


def _introduce(machine: Machine, agent: Agent[Any], service: ServiceProcess) -> None:
    agent.set_memory([MemoryRegion(gpa=0, size=RAM_SIZE, fd=machine.ram.fd, offset=0)])
    agent.set_registers(IRTA, _REMAPPING_ON)
    deadline = time.monotonic() + _ATTACH_S
    while not agent.wait_connected(0.1):
        service.check()
        if time.monotonic() > deadline:
            raise ServiceFailedError("the service", f"took no agent in {_ATTACH_S:.0f} s. It said:\n{service.said()}")


def _recorder(board: Board) -> OnFault:
    """The fault record: it counts each fault for the vector whose IRTE it names."""
    histories = [board.history(number) for number in range(board.vectors)]

    def record(vector: object, fault: Record) -> None:
        del vector
        low, _ = fault
        histories[(low >> 48) // SLOTS].say_fault()  # FRCD.FI, bits 63:12: the index stands in its bits 63:48

    return record

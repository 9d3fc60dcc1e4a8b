"""The VMs that are compared: those that irqrouter works on, and bare ones that only system calls touch.

Each has one vCPU with its local APIC enabled, so that KVM accepts MSIs. It never runs, so what arrived stays in its
IRR.
"""

import abc
import asyncio
import contextlib
import ctypes
import os
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Final, Self

from irqrouter.core.machine import State
from irqrouter.core.vectors import Vector
from irqrouter.eventfd_loop import Router, Source
from irqrouter.iommu.fault import Fault
from irqrouter.iommu_remap import VtdRemapper, entry
from irqrouter.kvm.abi import KVM_IRQ_ROUTING_ENTRY_STRUCT, KVM_IRQ_ROUTING_MSI, KVM_IRQ_ROUTING_STRUCT
from irqrouter.kvm.vcpu import Vcpu
from irqrouter.kvm.vm import KvmVm
from irqrouter.memory import MemfdMemory, MemoryRegion
from irqrouter.proof.c_agent import CAgent, CVector, Library
from irqrouter.service.session import VAIN_MAX
from irqrouter.service.wire import RemapperKind
from irqrouter.x86.msi import Message

#: The two vectors between which every interrupt is moved, so that each invalidation really changes something.
VECTORS: Final = (0x41, 0x52)
#: What the remapping makes of an entry, and so what a bare VM signals: physical destination 0, fixed, edge, assert.
ADDRESS: Final = 0xFEE00000
_ASSERT: Final = 1 << 14

_TABLE_GPA: Final = 0x10000
_IRTA: Final = _TABLE_GPA | 11  # 2^(11+1) entries
_RAM_SIZE: Final = _TABLE_GPA + (16 << 12)
_REQUESTER: Final = 0x18
_REMAPPING_ON: Final = 1  # GSTS.IRES, as the agent's set_registers() takes it
_WAIT_S: Final = 10.0
#: The service has long looked at a vector after this, and sleeps.
_SETTLE_S: Final = 0.002


def data(vector: int) -> int:
    """The MSI data for the guest's interrupt vector ``vector``."""
    return _ASSERT | vector


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Look every 100 µs; :class:`TimeoutError` after ten seconds."""
    deadline = time.monotonic() + _WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {_WAIT_S:g} s for {what}")
        time.sleep(0.0001)


class TimedVm(KvmVm):
    """A VM that notes when the last MSI had been signalled. Nothing else differs."""

    injected_ns = 0

    def signal_msi(self, message: Message) -> int:
        """See :meth:`KvmVm.signal_msi`."""
        taken = super().signal_msi(message)
        self.injected_ns = time.perf_counter_ns()
        return taken


class OurVm(abc.ABC):
    """A VM with a VT-d unit and ``n`` interrupt sources, each with an entry of its own, which irqrouter assigns."""

    def __init__(self, n: int, vm: KvmVm, opened: contextlib.ExitStack) -> None:
        """``opened`` closes what is opened here; a subclass attaches its vectors and keeps it as ``_opened``."""
        self._current = [VECTORS[0]] * n
        self._opened = contextlib.ExitStack()
        self._vcpu = opened.enter_context(Vcpu(vm, 0))
        self._ram = os.memfd_create("irqrouter-bench", os.MFD_CLOEXEC)
        opened.callback(os.close, self._ram)
        os.ftruncate(self._ram, _RAM_SIZE)
        self._regions = [MemoryRegion(0, _RAM_SIZE, self._ram, 0)]
        self.eventfds = [_eventfd(opened) for _ in range(n)]
        self._sources: list[Source] = []
        for index, eventfd in enumerate(self.eventfds):
            self._write_entry(index)
            message = Message(_remappable(index), 0)
            self._sources.append(Source(eventfd=eventfd, message=message, requester=_REQUESTER))

    @abc.abstractmethod
    def attach(self) -> int:
        """Add every source. Nanoseconds until all were assigned."""

    @abc.abstractmethod
    def detach(self) -> None:
        """Remove every vector."""

    @abc.abstractmethod
    def invalidate(self, index: int) -> int:
        """As the guest's driver does after :meth:`move`. Nanoseconds the calling thread was busy with it."""

    @abc.abstractmethod
    def wait_until_ready(self, index: int) -> None:
        """After an invalidation: wait until all is as it is to be when the next event comes."""

    @abc.abstractmethod
    def wait_until_caught(self, index: int) -> None:
        """After an event on a deassigned vector: wait for its delivery, and its new route."""

    @abc.abstractmethod
    def is_assigned(self, index: int) -> bool:
        """Whether KVM delivers the events."""

    @abc.abstractmethod
    def injected_ns(self, index: int) -> int:
        """When (``perf_counter_ns``) the last event that was caught had been delivered."""

    def move(self, index: int) -> None:
        """As the guest's driver does first: write the entry, so that the interrupt goes to the other vector."""
        self._current[index] = VECTORS[self._current[index] == VECTORS[0]]
        self._write_entry(index)

    def assign_again(self, index: int) -> None:
        """After :meth:`wait_until_caught`: signal again, which assigns the vector."""
        os.eventfd_write(self.eventfds[index], 1)
        wait_until(lambda: self.is_assigned(index), f"source {index} to be assigned again")

    def irr(self) -> frozenset[int]:
        """The vectors that arrived."""
        return self._vcpu.irr()

    def _write_entry(self, index: int) -> None:
        os.pwrite(self._ram, struct.pack("<QQ", 1 | self._current[index] << 16, 0), _TABLE_GPA + 16 * index)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened.close()


class RoutedVm(OurVm):
    """A VM whose vectors a router in this process assigns; its loop has a thread of its own."""

    def __init__(self, n: int, new_event_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
        with contextlib.ExitStack() as opened:
            self.vm = opened.enter_context(TimedVm.create())
            super().__init__(n, self.vm, opened)
            remapper = VtdRemapper(opened.enter_context(MemfdMemory(self._regions)))
            remapper.set_interrupt_remap_table(_IRTA)
            remapper.set_remapping(True)
            self.router = opened.enter_context(_RunningRouter(self.vm, remapper, new_event_loop))
            self.vectors: list[Vector] = []
            self.attach()
            self._opened = opened.pop_all()

    def attach(self) -> int:
        """See :meth:`OurVm.attach`."""
        start = time.perf_counter_ns()
        self.vectors = self.router.add_all(self._sources)
        return time.perf_counter_ns() - start

    def detach(self) -> None:
        """See :meth:`OurVm.detach`."""
        self.router.remove(*self.vectors)

    def invalidate(self, index: int) -> int:
        """See :meth:`OurVm.invalidate`."""
        start = time.perf_counter_ns()
        self.router.invalidate(entry(index))
        return time.perf_counter_ns() - start

    def wait_until_ready(self, index: int) -> None:
        """Nothing is done before the event comes."""

    def wait_until_caught(self, index: int) -> None:
        """See :meth:`OurVm.wait_until_caught`."""
        vector = self.vectors[index]
        wait_until(lambda: vector.accepted_generation == vector.generation, f"{vector} to have its route")

    def is_assigned(self, index: int) -> bool:
        """See :meth:`OurVm.is_assigned`."""
        return self.vectors[index].state is State.ASSIGNED

    def injected_ns(self, index: int) -> int:
        """See :meth:`OurVm.injected_ns`; of whichever source."""
        del index
        return self.vm.injected_ns


class TimedAgent(CAgent):
    """A C agent of which is known how long its last ``add`` took, without the Python around it."""

    add_ns = 0

    def _call(self, name: str, *arguments: object) -> int:
        start = time.perf_counter_ns()
        result = super()._call(name, *arguments)
        if name == "add":
            self.add_ns = time.perf_counter_ns() - start
        return result


class ServedVm(OurVm):
    """A VM whose vectors the agent in C assigns, as the service at the socket ``path`` decides.

    ``name`` is the VM's name on that service; ``library`` is the agent's, by default the sources' as they are now.
    """

    def __init__(
        self, n: int, path: str, *, name: str = "bench", wait_s: float = _WAIT_S, library: Library | str = ""
    ) -> None:
        with contextlib.ExitStack() as opened:
            vm = opened.enter_context(KvmVm.create())
            super().__init__(n, vm, opened)
            agent = TimedAgent(vm, name=name, path=path, remapper=RemapperKind.VTD, library=library)
            self.agent = opened.enter_context(agent)
            agent.set_memory(self._regions)
            agent.set_registers(_IRTA, _REMAPPING_ON)
            if not agent.wait_connected(wait_s):
                raise TimeoutError(f"waited {wait_s:g} s for the service")
            self._vectors: list[CVector] = []
            self.attach()
            self._opened = opened.pop_all()

    def attach(self) -> int:
        """See :meth:`OurVm.attach`."""
        self._vectors = self.agent.add_all(self._sources)
        return self.agent.add_ns

    def detach(self) -> None:
        """See :meth:`OurVm.detach`."""
        self.agent.remove(*self._vectors)

    def invalidate(self, index: int) -> int:
        """See :meth:`OurVm.invalidate`; timed in C."""
        touched, ns, _ = self.agent.invalidate_timed(entry(index))
        assert touched == 1, f"an invalidation of entry {index} touched {touched} vectors"
        return ns

    def wait_until_ready(self, index: int) -> None:
        """The service has translated, and told the agent what to do with the next event."""
        vector = self._vectors[index]
        wait_until(lambda: self.agent.prepared(vector), f"{vector} to be prepared")

    def wait_until_caught(self, index: int) -> None:
        """See :meth:`OurVm.wait_until_caught`."""
        vector, route = self._vectors[index], Message(ADDRESS, data(self._current[index]))
        wait_until(lambda: self.agent.status(vector).route == route, f"{vector} to have its route")

    def is_assigned(self, index: int) -> bool:
        """See :meth:`OurVm.is_assigned`."""
        return self.agent.status(self._vectors[index]).state is State.ASSIGNED

    def injected_ns(self, index: int) -> int:
        """See :meth:`OurVm.injected_ns`."""
        return self.agent.caught_at_ns(self._vectors[index])


class ColdServedVm(ServedVm):
    """The same, but the service does not translate before the event comes."""

    def wait_until_ready(self, index: int) -> None:
        """The service has prepared the vector so often in vain that it waits for an event now."""
        vector = self._vectors[index]
        for _ in range(VAIN_MAX):
            super().wait_until_ready(index)
            self.invalidate(index)
        time.sleep(_SETTLE_S)
        assert not self.agent.prepared(vector), f"{vector} is prepared"


class BareVm:
    """A VM with ``n`` eventfds, each assigned by ``KVM_IRQFD`` to a route of its own, and nobody watching."""

    def __init__(self, n: int) -> None:
        self._current = [VECTORS[0]] * n
        with contextlib.ExitStack() as opened:
            self.vm = opened.enter_context(KvmVm.create())
            self._vcpu = opened.enter_context(Vcpu(self.vm, 0))
            self.eventfds = [_eventfd(opened) for _ in range(n)]
            #: The same, for the C functions.
            self.eventfd_array = (ctypes.c_int * n)(*self.eventfds)
            self.gsis = [self.vm.pins + index for index in range(n)]
            self.vm.set_gsi_routing({gsi: self.message(index) for index, gsi in enumerate(self.gsis)})
            size = KVM_IRQ_ROUTING_STRUCT.size + n * KVM_IRQ_ROUTING_ENTRY_STRUCT.size
            #: ``struct kvm_irq_routing``: the whole table, for the C functions.
            self.table = ctypes.create_string_buffer(size)
            KVM_IRQ_ROUTING_STRUCT.pack_into(self.table, 0, n, 0)
            for index, eventfd in enumerate(self.eventfds):
                self._write_entry(index)
                with self.vm.adopt(eventfd) as duplicate:
                    self.vm.irqfd_assign(duplicate, self.gsis[index])
            self._opened = opened.pop_all()

    def message(self, index: int) -> Message:
        """What is to be delivered for eventfd number ``index``."""
        return Message(ADDRESS, data(self._current[index]))

    def move(self, index: int) -> None:
        """Change the route in :attr:`table`, which the kernel does not know yet."""
        self._current[index] = VECTORS[self._current[index] == VECTORS[0]]
        self._write_entry(index)

    def irr(self) -> frozenset[int]:
        """The vectors that arrived."""
        return self._vcpu.irr()

    def _write_entry(self, index: int) -> None:
        message = self.message(index)
        KVM_IRQ_ROUTING_ENTRY_STRUCT.pack_into(
            self.table,
            KVM_IRQ_ROUTING_STRUCT.size + index * KVM_IRQ_ROUTING_ENTRY_STRUCT.size,
            self.gsis[index],
            KVM_IRQ_ROUTING_MSI,
            0,
            message.address,
            0,
            message.data,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened.close()


class _RunningRouter:
    """A router on a loop that runs on a thread of its own, as long as the ``with`` block lasts."""

    def __init__(
        self, vm: KvmVm, remapper: VtdRemapper, new_event_loop: Callable[[], asyncio.AbstractEventLoop]
    ) -> None:
        self._vm = vm
        self._remapper = remapper
        self._new_event_loop = new_event_loop
        self._running: Future[tuple[Router, asyncio.AbstractEventLoop]] = Future()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="bench-loop")

    def __enter__(self) -> Router:
        self._thread.start()
        router, self._loop = self._running.result()
        return router

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=self._new_event_loop) as runner:
            try:
                runner.run(self._main())
            except BaseException as error:  # to whoever waits for the router
                if self._running.done():
                    raise
                self._running.set_exception(error)

    async def _main(self) -> None:
        async with Router(self._vm, self._remapper, on_fault=_unexpected) as router:
            self._running.set_result((router, asyncio.get_running_loop()))
            await self._stop.wait()


def _unexpected(vector: Vector, fault: Fault) -> None:
    raise AssertionError(f"{vector}: {fault.describe()}")


def _eventfd(opened: contextlib.ExitStack) -> int:
    eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    opened.callback(os.close, eventfd)
    return eventfd


def _remappable(index: int) -> int:
    """The address of a remappable-format MSI without a subhandle for table entry ``index``, below 2^15."""
    return 0xFEE00010 | index << 5

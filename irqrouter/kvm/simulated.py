"""A simulated kernel: eventfds, irqfds, routing tables and local APICs in memory, behaving as Linux 6.17 and later do.

It implements ``kvm/port.py`` for hosts without ``/dev/kvm``, for the race explorer and for faults that a real kernel
will not produce on demand. It is also the kernel as irqrouter understands it, written down::

    kernel = SimulatedKernel()
    vm = kernel.vm(vcpus=[0, 1])            # a port.Vm; two vCPUs with APIC ids 0 and 1
    fd = kernel.eventfd()                   # the VMM's descriptor
    eventfd = vm.adopt(fd)                  # ours
    vm.set_gsi_routing({24: Message(0xFEE01000, 0x41)})
    vm.irqfd_assign(eventfd, 24)
    kernel.signal(fd)                       # the device
    assert vm.irr(1) == {0x41}

First come the kernel's own objects, named as in Linux (``eventfd_ctx``, ``kvm_kernel_irqfd``, ``kvm``); they run under
one lock. Below them are the system calls on these objects, which take the lock, count and fail on request.
``tests/kvm/test_kernel_contract.py`` holds this file and the real kernel to the same tests.

Not simulated: that KVM_IRQFD looks at the count without its lock (core/ops.py, Assign), xAPIC mode, priorities in the
local APIC, EOI, and kernels older than 6.17.
"""

import errno
import functools
import heapq
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Literal, Self, TypeAlias

import msgspec

from irqrouter.errors import CallerError, KernelError, SpecError
from irqrouter.kvm.port import BlockingEventfdError, Eventfd, NotAnEventfdError, SemaphoreEventfdError
from irqrouter.kvm.vm import ForeignVmError
from irqrouter.x86.msi import CompatibilityAddress, CompatibilityData, Message, checked

#: System calls that can be made to fail and are counted: ``KernelError.call``'s names for them.
Call: TypeAlias = Literal[
    "KVM_IRQFD",
    "KVM_IRQFD with KVM_IRQFD_FLAG_DEASSIGN",
    "KVM_SET_GSI_ROUTING",
    "KVM_SIGNAL_MSI",
    "read",
    "write",
]

#: Told of each vector that a local APIC accepts: its APIC id and the vector.
OnDelivery: TypeAlias = Callable[[int, int], None]

# One above the largest descriptor number a process can have by default (fs.nr_open): a simulated number that strays
# into a real system call is EBADF there, not somebody's file.
_FIRST_DESCRIPTOR = 1 << 20
_COUNT_MAX = (1 << 64) - 2  # eventfd(2)
_X2APIC_BROADCAST = 0xFFFFFFFF
_DELIVERIES_KEPT = 1 << 16


# --- The kernel's objects -------------------------------------------------------------------------------------------


class _Host:
    """What all VMs share: the lock, the table of descriptors, the system work queue."""

    def __init__(self, *, deferred: bool) -> None:
        self.deferred = deferred
        self.files: dict[int, _EventfdCtx] = {}
        self.last_identity = 0
        self.work: deque[_Irqfd] = deque()
        self.notices: list[Callable[[], None]] = []
        self.calls: Counter[Call] = Counter()
        self.failures: dict[Call, deque[int]] = {}
        self._free: list[int] = []  # a heap; all numbers below the largest ever given out that are not in use
        self._lock = threading.Lock()

    @contextmanager
    def locked(self) -> Generator[None]:
        """Hold the lock; when it has been released, make the callbacks that became due in the meantime."""
        notices: list[Callable[[], None]] = []
        try:
            with self._lock:
                try:
                    yield
                finally:
                    notices, self.notices = self.notices, []
        finally:
            for notify in notices:
                notify()

    def enter(self, call: Call) -> int:
        """Count a system call; the errno it was asked to fail with, or 0."""
        self.calls[call] += 1
        failures = self.failures.get(call)
        return failures.popleft() if failures else 0

    def install(self, ctx: "_EventfdCtx") -> int:
        """Give ``ctx`` the lowest free descriptor number, as every Unix does: numbers are reused at once."""
        if not self._free:
            self._free.append(_FIRST_DESCRIPTOR + len(self.files))
        fd = heapq.heappop(self._free)
        self.files[fd] = ctx
        ctx.descriptors += 1
        return fd

    def uninstall(self, fd: int) -> None:
        """Close a descriptor; with its last one an eventfd's file goes, and EPOLLHUP detaches the irqfd."""
        ctx = self.files.pop(fd)
        heapq.heappush(self._free, fd)
        ctx.descriptors -= 1
        if not ctx.descriptors and ctx.irqfd is not None:
            ctx.irqfd.shutdown()

    def schedule_work(self, irqfd: "_Irqfd") -> None:
        """Run ``irqfd``'s inject work later; work that is queued already stays queued once (schedule_work)."""
        if irqfd not in self.work:
            self.work.append(irqfd)
        if not self.deferred:
            self.run_work()

    def flush_work(self, irqfd: "_Irqfd") -> None:
        """Run ``irqfd``'s inject work now if it is queued (flush_work)."""
        if irqfd in self.work:
            self.work.remove(irqfd)
            irqfd.inject()

    def run_work(self) -> int:
        """Run all that is queued; how many items there were."""
        done = 0
        while self.work:
            self.work.popleft().inject()
            done += 1
        return done


class _EventfdCtx:
    """``struct eventfd_ctx``: the count and, in the order they are woken, the waiters (fs/eventfd.c)."""

    def __init__(self, identity: int, count: int, flags: int) -> None:
        self.identity = identity
        self.count = count
        self.flags = flags
        self.descriptors = 0
        #: The exclusive priority waiter at the queue's head, where there is room for one.
        self.irqfd: _Irqfd | None = None
        #: The watch sets that poll this eventfd, by the descriptor they know it by.
        self.watched_by: dict[int, _Epoll] = {}

    def signal(self, count: int) -> None:
        """Add ``count`` and wake the first waiter (eventfd_write, eventfd_signal).

        The irqfd's wakeup function returns 1, which ends the walk: nobody behind it is woken (__wake_up_common). A
        count of 0 wakes as well.
        """
        self.count += count
        if self.irqfd is not None:
            self.irqfd.wakeup()
        self.poll()

    def take(self) -> int:
        """Return the whole count and leave 0 (eventfd_ctx_do_read)."""
        count, self.count = self.count, 0
        self.poll()
        return count

    def poll(self) -> None:
        """Let the watch sets see the count as it is now."""
        for fd, epoll in self.watched_by.items():
            epoll.update(fd, readable=self.count > 0)


class _Irqfd:
    """``struct kvm_kernel_irqfd``: binds an eventfd to a GSI of a VM (virt/kvm/eventfd.c)."""

    def __init__(self, kvm: "_Kvm", ctx: _EventfdCtx, gsi: int) -> None:
        """kvm_irqfd_assign, kvm_irqfd_register: cache the route, queue up, and only then look at the count."""
        self.kvm = kvm
        self.ctx = ctx
        self.gsi = gsi
        self.irq_entry: Message | None = None
        self.update()
        ctx.irqfd = self
        kvm.irqfds.append(self)
        if ctx.count:  # it is injected, and not taken
            kvm.host.schedule_work(self)

    def update(self) -> None:
        """Cache the GSI's route as the table last accepted has it (irqfd_update)."""
        self.irq_entry = self.kvm.routes.get(self.gsi)

    def wakeup(self) -> None:
        """In the signaller's context: take the count, inject by the cached route (irqfd_wakeup).

        No route, or one that cannot be resolved in atomic context (a broadcast; kvm_irq_delivery_to_apic_fast):
        the injection is deferred.
        """
        self.ctx.count = 0
        if self.irq_entry is None or _interrupt(self.irq_entry).destination == _X2APIC_BROADCAST:
            self.kvm.host.schedule_work(self)
        else:
            self.kvm.deliver(self.irq_entry)

    def inject(self) -> None:
        """The deferred work: inject by the table as it is when the work runs; without a route drop the event.

        irqfd_inject, virt/kvm/irqchip.c:kvm_set_irq.
        """
        route = self.kvm.routes.get(self.gsi)
        if route is not None:
            self.kvm.deliver(route)

    def shutdown(self) -> None:
        """Leave the wait queue, zeroing the count, and finish the inject work (irqfd_shutdown).

        What is zeroed has been injected: it is a count that was pending at assign.
        """
        self.kvm.irqfds.remove(self)
        self.ctx.irqfd = None
        self.ctx.take()
        self.kvm.host.flush_work(self)


class _Kvm:
    """``struct kvm``: routes, irqfds and the local APICs' interrupt request registers."""

    def __init__(self, host: _Host, apic_ids: Sequence[int], on_delivery: OnDelivery | None) -> None:
        self.host = host
        self.routes: dict[int, Message] = {}
        self.irqfds: list[_Irqfd] = []
        self.irr: dict[int, set[int]] = {apic_id: set() for apic_id in apic_ids}
        self.deliveries: deque[tuple[int, int]] = deque(maxlen=_DELIVERIES_KEPT)
        self.on_delivery = on_delivery

    def set_routes(self, routes: dict[int, Message]) -> None:
        """Replace the table; the irqfds cache their new routes before anyone else runs (kvm_irq_routing_update)."""
        self.routes = routes
        for irqfd in self.irqfds:
            irqfd.update()

    def deliver(self, message: Message) -> int:
        """Deliver an MSI; how many vCPUs took it (kvm_irq_delivery_to_apic, __apic_accept_irq).

        Fixed and lowest priority set an IRR bit, which coalesces with one that is set. Of the rest NMI, INIT and
        start-up are taken and leave no trace here; nobody takes an SMI (KVM without SMM) or an ExtINT.
        """
        interrupt = _interrupt(message)
        targets = self._targets(interrupt)
        if interrupt.mode in (_SMI, _EXTINT):
            return 0
        if interrupt.mode in (_FIXED, _LOWEST_PRIORITY):
            for apic_id in targets:
                self.irr[apic_id].add(interrupt.vector)
                self.deliveries.append((apic_id, interrupt.vector))
                if self.on_delivery is not None:
                    self.host.notices.append(functools.partial(self.on_delivery, apic_id, interrupt.vector))
        return len(targets)

    def _targets(self, interrupt: "_Interrupt") -> list[int]:
        """The APIC ids that ``interrupt`` is for (arch/x86/kvm/lapic.c:kvm_apic_map_get_dest_lapic).

        A logical destination is a cluster in bits 31:16 and a mask of its 16 ids in bits 15:0. Lowest priority picks
        one of the ids by the vector (kvm_vector_to_index): of a mask also one that does not exist, and then nobody
        takes it.
        """
        destination = interrupt.destination
        if destination == _X2APIC_BROADCAST:
            named = list(self.irr)
        elif interrupt.logical:
            cluster = destination >> 16 << 4
            highest = max(self.irr, default=-1)
            named = [cluster | bit for bit in range(16) if destination >> bit & 1 and cluster | bit <= highest]
        else:
            named = [destination]
        if interrupt.lowest_priority and named:
            named = [named[interrupt.vector % len(named)]]
        return [apic_id for apic_id in named if apic_id in self.irr]


_FIXED, _LOWEST_PRIORITY, _SMI, _EXTINT = 0, 1, 2, 7


class _Interrupt(msgspec.Struct, frozen=True):
    """``struct kvm_lapic_irq``: what KVM reads in an MSI."""

    destination: int
    logical: bool
    lowest_priority: bool
    mode: int
    vector: int


@functools.lru_cache(maxsize=4096)
def _interrupt(message: Message) -> _Interrupt:
    """arch/x86/kvm/irq.c:kvm_set_msi_irq, with 32-bit x2APIC ids. The address' prefix FEEh is not looked at."""
    address = CompatibilityAddress.decode(message.address)
    data = CompatibilityData.decode(message.data)
    return _Interrupt(
        destination=address.destination_31_8 << 8 | address.destination,
        logical=bool(address.dm),
        lowest_priority=bool(address.rh) or data.delivery_mode == _LOWEST_PRIORITY,
        mode=data.delivery_mode,
        vector=data.vector,
    )


def _invalid(message: Message) -> bool:
    """arch/x86/kvm/irq.c:kvm_msi_route_invalid: with 32-bit ids address bits 39:32 are reserved."""
    return bool(checked(message).address >> 32 & 0xFF)


class _Epoll:
    """An epoll set whose members are simulated, and whose own descriptor is real."""

    def __init__(self) -> None:
        #: Readable, by having a count, exactly while the set has something to report.
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.members: dict[int, _EventfdCtx] = {}
        self.armed: set[int] = set()
        self.ready: dict[int, None] = {}  # in the order of becoming ready

    def arm(self, fd: int, ctx: _EventfdCtx) -> None:
        """EPOLL_CTL_ADD or EPOLL_CTL_MOD with EPOLLONESHOT; both poll at once (fs/eventpoll.c:ep_modify)."""
        self.members[fd] = ctx
        ctx.watched_by[fd] = self
        self.armed.add(fd)
        ctx.poll()

    def update(self, fd: int, *, readable: bool) -> None:
        """Member ``fd`` was woken, or is polled."""
        was_ready = bool(self.ready)
        if readable and fd in self.armed:
            self.ready[fd] = None
        else:
            self.ready.pop(fd, None)
        self._show(was_ready)

    def harvest(self, limit: int) -> list[int]:
        """epoll_wait without waiting."""
        fds = list(self.ready)[:limit]
        for fd in fds:
            self.armed.discard(fd)
            self.update(fd, readable=False)
        return fds

    def forget(self, fd: int) -> None:
        """EPOLL_CTL_DEL."""
        self.armed.discard(fd)
        self.update(fd, readable=False)
        del self.members.pop(fd).watched_by[fd]

    def close(self) -> None:
        for fd in list(self.members):
            self.forget(fd)
        os.close(self.fd)
        self.fd = -1

    def _show(self, was_ready: bool) -> None:
        if self.ready and not was_ready:
            os.eventfd_write(self.fd, 1)
        elif was_ready and not self.ready:
            os.eventfd_read(self.fd)


# --- The system calls -----------------------------------------------------------------------------------------------


class SimulatedKernel:
    """One host. Its descriptors are plain integers in a number space of their own, shared by all its VMs.

    Thread-safe: every call takes the one lock. Callbacks are made on the calling thread after it was released.

    ``deferred``: whether the work that the kernel hands to its work queue waits for :meth:`run_deferred`. By default
    it runs before the call that queued it returns.
    """

    def __init__(self, *, deferred: bool = False) -> None:
        self._host = _Host(deferred=deferred)

    # What a VMM, a device or another process does.

    def eventfd(self, initial: int = 0, flags: int = os.EFD_NONBLOCK | os.EFD_CLOEXEC) -> int:
        """``eventfd2``: the descriptor of a new eventfd. ``flags`` are the ``os.EFD_*``.

        Raises :class:`SpecError` for an ``initial`` that does not fit 32 bits, :class:`KernelError` (``EINVAL``) for
        an unknown flag.
        """
        if not 0 <= initial < 1 << 32:
            raise SpecError(f"eventfd count {initial}", "must fit 32 bits at first")
        if flags & ~(os.EFD_NONBLOCK | os.EFD_CLOEXEC | os.EFD_SEMAPHORE):
            raise KernelError(errno.EINVAL, "eventfd2", f"flags {flags:#x}")
        host = self._host
        with host.locked():
            host.last_identity += 1
            return host.install(_EventfdCtx(host.last_identity, initial, flags))

    def signal(self, fd: int, count: int = 1) -> None:
        """Write ``count`` to the eventfd, as a device or another process does. ``EBADF``; ``EAGAIN`` when full."""
        with self._host.locked():
            _write(self._ctx(fd, "write"), count, fd)

    def count(self, fd: int) -> int:
        """The eventfd's count, which stays (``eventfd-count`` in fdinfo)."""
        with self._host.locked():
            return self._ctx(fd, "fdinfo").count

    def trigger(self, fd: int) -> Callable[[], None]:
        """What VFIO or vhost keeps of an eventfd: a function that signals it, and does not keep its file open.

        (eventfd_ctx_fdget, eventfd_signal. The file's last descriptor detaches KVM, and the device goes on.)
        """
        with self._host.locked():
            ctx = self._ctx(fd, "eventfd_ctx_fdget")

        def signal() -> None:
            with self._host.locked():
                ctx.signal(1 if ctx.count <= _COUNT_MAX else 0)

        return signal

    def dup(self, fd: int) -> int:
        """``dup``: another descriptor of the same eventfd."""
        with self._host.locked():
            return self._host.install(self._ctx(fd, "dup"))

    def close(self, fd: int) -> None:
        """``close``. An eventfd's last descriptor detaches its irqfd."""
        with self._host.locked():
            self._ctx(fd, "close")
            self._host.uninstall(fd)

    def vm(
        self,
        *,
        pins: int = 24,
        routes_max: int = 4096,
        vcpus: Sequence[int] = (0,),
        on_delivery: OnDelivery | None = None,
    ) -> "SimulatedVm":
        """A new VM with a split irqchip. ``vcpus`` are the APIC ids; their local APICs are on, in x2APIC mode.

        ``on_delivery`` is called with the APIC id and the vector whenever one accepts a vector.
        """
        if not 0 <= pins <= routes_max:
            raise CallerError(f"{pins} pins", f"must be between 0 and {routes_max}")
        if len(set(vcpus)) != len(vcpus):
            raise CallerError("vCPUs", "must have APIC ids of their own")
        for apic_id in vcpus:
            if not 0 <= apic_id < _X2APIC_BROADCAST:
                raise SpecError(f"APIC id {apic_id:#x}", "must fit 32 bits and not be the broadcast")
        return SimulatedVm(self._host, pins, routes_max, _Kvm(self._host, vcpus, on_delivery))

    # What a test does.

    @property
    def deferred(self) -> bool:
        """Whether queued work waits for :meth:`run_deferred`."""
        return self._host.deferred

    @deferred.setter
    def deferred(self, deferred: bool) -> None:
        with self._host.locked():
            self._host.deferred = deferred
            if not deferred:
                self._host.run_work()

    def run_deferred(self) -> int:
        """Let the system work queue run empty; how many items it held."""
        with self._host.locked():
            return self._host.run_work()

    def fail_next(self, call: Call, code: int) -> None:
        """Make the next ``call`` that irqrouter makes fail with errno ``code``, having done nothing. These queue up."""
        with self._host.locked():
            self._host.failures.setdefault(call, deque()).append(code)

    def calls(self, call: Call) -> int:
        """How often irqrouter made ``call``, failed ones included."""
        with self._host.locked():
            return self._host.calls[call]

    def descriptors(self) -> frozenset[int]:
        """The descriptors that are open."""
        with self._host.locked():
            return frozenset(self._host.files)

    def _ctx(self, fd: int, call: str) -> _EventfdCtx:
        ctx = self._host.files.get(fd)
        if ctx is None:
            raise KernelError(errno.EBADF, call, f"eventfd {fd}")
        return ctx


class SimulatedEventfd:
    """An eventfd of the simulated kernel (:class:`irqrouter.kvm.port.Eventfd`), made by :meth:`SimulatedVm.adopt`."""

    def __init__(self, host: _Host, ctx: _EventfdCtx, fd: int) -> None:
        self._host = host
        self._ctx = ctx
        self._fd = fd

    @property
    def identity(self) -> int:
        """Equal for two descriptors of one eventfd, and never given to another."""
        return self._ctx.identity

    def fileno(self) -> int:
        """The duplicate's number; -1 once closed."""
        return self._fd

    def pending(self) -> bool:
        """Whether the count is above zero, without taking it."""
        with self._host.locked():
            self._check("poll", 0)
            return self._ctx.count > 0

    def read(self) -> int:
        """Take and return the whole count; 0 when it was empty."""
        with self._host.locked():
            self._check("read", self._host.enter("read"))
            return self._ctx.take()

    def write(self, count: int) -> None:
        """Add ``count``. ``EAGAIN`` when the sum would pass 2**64 - 2; :class:`SpecError` when ``count`` does."""
        with self._host.locked():
            self._check("write", self._host.enter("write"))
            _write(self._ctx, count, self._fd)

    def close(self) -> None:
        """Leave the watch set, then close the duplicate. Idempotent."""
        with self._host.locked():
            fd, self._fd = self._fd, -1
            if fd < 0:
                return
            epoll = self._ctx.watched_by.get(fd)
            if epoll is not None:
                epoll.forget(fd)
            self._host.uninstall(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def arm_in(self, epoll: _Epoll) -> None:
        """Be reported once by ``epoll``: what :meth:`SimulatedWatchSet.arm` does."""
        with self._host.locked():
            if self._fd < 0:
                return
            if epoll.fd < 0:
                raise KernelError(errno.EBADF, "epoll_ctl", f"eventfd {self._fd}")
            if self._ctx.watched_by.get(self._fd, epoll) is not epoll:
                raise CallerError(f"eventfd {self._fd}", "is in another watch set")
            epoll.arm(self._fd, self._ctx)

    def bind(self, host: _Host) -> _EventfdCtx | None:
        """The eventfd's context, for ``KVM_IRQFD``; None once closed. The lock is held."""
        if host is not self._host:
            raise CallerError(f"eventfd {self._fd}", "belongs to another kernel")
        return self._ctx if self._fd >= 0 else None

    def _check(self, call: str, code: int) -> None:
        if self._fd < 0:
            code = errno.EBADF
        if code:
            raise KernelError(code, call, f"eventfd {self._fd}")


class SimulatedWatchSet:
    """A watch set of the simulated kernel (:class:`irqrouter.kvm.port.WatchSet`)."""

    def __init__(self, host: _Host) -> None:
        self._host = host
        self._epoll = _Epoll()

    def fileno(self) -> int:
        """A real descriptor, which any loop can watch: readable while the set has something to report."""
        return self._epoll.fd

    def arm(self, eventfd: Eventfd) -> None:
        """Watch ``eventfd``, once, from now on; a pending count is reported. A closed one is left alone."""
        _simulated(eventfd).arm_in(self._epoll)

    def harvest(self, limit: int) -> list[int]:
        """The descriptor numbers that became readable, at most ``limit`` (1 or more). Does not wait."""
        if limit < 1:
            raise CallerError("watch set", f"cannot harvest at most {limit}")
        with self._host.locked():
            if self._epoll.fd < 0:
                raise KernelError(errno.EBADF, "epoll_wait", "watch set")
            return self._epoll.harvest(limit)

    def close(self) -> None:
        """Close the set. The eventfds stay open and may enter another. Idempotent."""
        with self._host.locked():
            if self._epoll.fd >= 0:
                self._epoll.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class SimulatedVm:
    """A VM of the simulated kernel (:class:`irqrouter.kvm.port.Vm`); :meth:`SimulatedKernel.vm` makes them."""

    def __init__(self, host: _Host, pins: int, routes_max: int, kvm: _Kvm) -> None:
        self._host = host
        self._pins = pins
        self._routes_max = routes_max
        self._kvm = kvm
        self._closed = False
        #: Set it, and every ioctl fails with EIO, as when the VM belongs to another process (kvm_vm_ioctl).
        self.foreign = False

    @property
    def pins(self) -> int:
        """GSIs below this belong to I/OAPIC pins."""
        return self._pins

    @property
    def routes_max(self) -> int:
        """How many routes, and GSIs, the VM can have."""
        return self._routes_max

    def adopt(self, fd: int) -> SimulatedEventfd:
        """Duplicate ``fd`` and own the duplicate."""
        what = f"descriptor {fd}"
        with self._host.locked():
            ctx = self._host.files.get(fd)
            if ctx is None:
                raise NotAnEventfdError(what, "is closed")
            if ctx.flags & os.EFD_SEMAPHORE:
                raise SemaphoreEventfdError(what, "was made with EFD_SEMAPHORE")
            if not ctx.flags & os.EFD_NONBLOCK:
                raise BlockingEventfdError(what, "lacks EFD_NONBLOCK")
            return SimulatedEventfd(self._host, ctx, self._host.install(ctx))

    def watch_set(self) -> SimulatedWatchSet:
        """A new, empty watch set."""
        return SimulatedWatchSet(self._host)

    def irqfd_assign(self, eventfd: Eventfd, gsi: int) -> None:
        """``KVM_IRQFD``. A pending count is injected, by deferred work, and stays. ``gsi`` needs no route.

        ``EBUSY``: the eventfd has an irqfd, of this or of another VM (virt/kvm/eventfd.c:kvm_irqfd_register,
        kernel/sched/wait.c:add_wait_queue_priority_exclusive).
        """
        what = _irqfd_name(eventfd, gsi)
        with self._host.locked():
            self._enter("KVM_IRQFD", what)
            ctx = self._bound("KVM_IRQFD", eventfd, what)
            if ctx.irqfd is not None:
                raise _refusal(errno.EBUSY, "KVM_IRQFD", what)
            _Irqfd(self._kvm, ctx, gsi)

    def irqfd_deassign(self, eventfd: Eventfd, gsi: int) -> None:
        """``KVM_IRQFD`` with ``KVM_IRQFD_FLAG_DEASSIGN``. When it returns, deferred injections of the pair are done."""
        call: Call = "KVM_IRQFD with KVM_IRQFD_FLAG_DEASSIGN"
        what = _irqfd_name(eventfd, gsi)
        with self._host.locked():
            self._enter(call, what)
            irqfd = self._bound(call, eventfd, what).irqfd
            if irqfd is not None and irqfd.kvm is self._kvm and irqfd.gsi == gsi:
                irqfd.shutdown()

    def set_gsi_routing(self, changes: Mapping[int, Message | None]) -> None:
        """``KVM_SET_GSI_ROUTING``: the whole table as last accepted, with ``changes`` (None drops a GSI).

        Raises :class:`CallerError` for a GSI beyond ``routes_max`` and for address bits 39:32 that are not zero.
        """
        for gsi, message in changes.items():
            if not 0 <= gsi < self._routes_max:
                raise CallerError(f"gsi {gsi}", f"must be below {self._routes_max}")
            if message is not None and _invalid(message):
                raise CallerError(f"gsi {gsi}", f"bits 39:32 of {message.address:#x} must be zero")
        with self._host.locked():
            routes = {gsi: route for gsi, route in self._kvm.routes.items() if gsi not in changes}
            routes.update((gsi, route) for gsi, route in changes.items() if route is not None)
            self._enter("KVM_SET_GSI_ROUTING", f"{len(routes)} routes")
            self._kvm.set_routes(routes)

    def signal_msi(self, message: Message) -> int:
        """``KVM_SIGNAL_MSI``: deliver now. Returns how many vCPUs took it. ``EINVAL``: address bits 39:32 are not 0."""
        what = f"MSI {checked(message).describe()}"
        with self._host.locked():
            self._enter("KVM_SIGNAL_MSI", what)
            if _invalid(message):
                raise _refusal(errno.EINVAL, "KVM_SIGNAL_MSI", what)
            return self._kvm.deliver(message)

    def close(self) -> None:
        """Close the VM: its irqfds go (kvm_irqfd_release). Idempotent."""
        with self._host.locked():
            self._closed = True
            for irqfd in list(self._kvm.irqfds):
                irqfd.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # What the guest and the tests see.

    def irr(self, apic_id: int) -> frozenset[int]:
        """The vectors requested at that local APIC and not accepted yet."""
        with self._host.locked():
            return frozenset(self._vcpu(apic_id))

    def accept(self, apic_id: int) -> int | None:
        """The vCPU takes the highest vector out of its IRR and has handled it; None when there is none."""
        with self._host.locked():
            irr = self._vcpu(apic_id)
            if not irr:
                return None
            vector = max(irr)
            irr.remove(vector)
            return vector

    def deliveries(self) -> list[tuple[int, int]]:
        """APIC id and vector of the last 65,536 interrupts that set an IRR bit or found it set, in order."""
        with self._host.locked():
            return list(self._kvm.deliveries)

    def routes(self) -> dict[int, Message]:
        """The routing table, by GSI."""
        with self._host.locked():
            return dict(self._kvm.routes)

    def irqfds(self) -> dict[int, int]:
        """The GSI of each assigned irqfd, by the identity of its eventfd."""
        with self._host.locked():
            return {irqfd.ctx.identity: irqfd.gsi for irqfd in self._kvm.irqfds}

    def _enter(self, call: Call, what: str) -> None:
        code = self._host.enter(call)
        if self._closed:
            code = errno.EBADF
        elif self.foreign:
            code = errno.EIO
        if code:
            raise _refusal(code, call, what)

    def _bound(self, call: Call, eventfd: Eventfd, what: str) -> _EventfdCtx:
        ctx = _simulated(eventfd).bind(self._host)
        if ctx is None:
            raise _refusal(errno.EBADF, call, what)
        return ctx

    def _vcpu(self, apic_id: int) -> set[int]:
        irr = self._kvm.irr.get(apic_id)
        if irr is None:
            raise CallerError(f"APIC id {apic_id}", "is none of the VM's")
        return irr


def _simulated(eventfd: Eventfd) -> SimulatedEventfd:
    if not isinstance(eventfd, SimulatedEventfd):
        raise CallerError(f"eventfd {eventfd.fileno()}", "is not the simulated kernel's")
    return eventfd


def _write(ctx: _EventfdCtx, count: int, fd: int) -> None:
    if not 0 <= count <= _COUNT_MAX:
        raise SpecError(f"eventfd count {count}", "must be between 0 and 2**64 - 2")
    if ctx.count + count > _COUNT_MAX:
        raise KernelError(errno.EAGAIN, "write", f"eventfd {fd}")
    ctx.signal(count)


def _irqfd_name(eventfd: Eventfd, gsi: int) -> str:
    name = f"eventfd {eventfd.fileno()} at gsi {gsi}"
    if not 0 <= gsi < 1 << 32:
        raise SpecError(name, "does not fit the argument of KVM_IRQFD")
    return name


def _refusal(code: int, call: Call, what: str) -> KernelError:
    return ForeignVmError(call, what) if code == errno.EIO else KernelError(code, call, what)

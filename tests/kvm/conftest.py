"""Benches: a host with two VMs on it, the real kernel's and the simulated one's, for tests that run on both."""

import contextlib
import ctypes
import functools
import os
import struct
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from irqrouter.errors import KernelError
from irqrouter.kvm.eventfd import kernel_error
from irqrouter.kvm.port import Vm
from irqrouter.kvm.probes import one_irqfd_per_eventfd
from irqrouter.kvm.simulated import SimulatedKernel, SimulatedVm
from irqrouter.kvm.vcpu import Vcpu
from irqrouter.kvm.vm import KvmVm
from irqrouter.x86.msi import Message, remapped

NONBLOCK = os.EFD_NONBLOCK | os.EFD_CLOEXEC

#: APIC ids: two in a row, a gap, and one that needs more than 8 bits.
VCPUS = (0, 1, 3, 300)
#: APIC id and vector.
Delivered = set[tuple[int, int]]


class Guest(Protocol):
    """A VM with vCPUs :data:`VCPUS` that do not run, so that what arrives stays in their IRRs."""

    @property
    def vm(self) -> Vm: ...

    def delivered(self) -> Delivered:
        """What is in the IRRs at this moment; they are empty afterwards."""
        ...

    def errno_in_another_process(self, action: Callable[[Vm], object]) -> int:
        """The errno that ``action`` fails with when another process does it; 0 when it succeeds."""
        ...


class Bench(Protocol):
    """One host, two VMs. What is opened on it is closed with it."""

    @property
    def guest(self) -> Guest: ...

    @property
    def neighbour(self) -> Guest: ...

    @property
    def exclusive(self) -> bool:
        """Whether an eventfd takes one irqfd host-wide (Linux 6.17)."""
        ...

    def eventfd(self, initial: int = 0, flags: int = NONBLOCK) -> int:
        """A new eventfd's descriptor, as a VMM would have it."""
        ...

    def signal(self, fd: int, count: int = 1) -> None:
        """What another process does. Raises :class:`KernelError`."""
        ...

    def trigger(self, fd: int) -> Callable[[], None]:
        """What a device keeps: a function that signals once, and does not keep the eventfd's file open."""
        ...

    def count(self, fd: int) -> int: ...

    def dup(self, fd: int) -> int: ...

    def close(self, fd: int) -> None: ...

    def descriptors(self) -> frozenset[int]:
        """All that are open."""
        ...

    def settle(self) -> None:
        """Return when the work that the kernel has deferred so far is done."""
        ...


class SimulatedGuest:
    def __init__(self, vm: SimulatedVm) -> None:
        self.vm = vm

    def delivered(self) -> Delivered:
        taken: Delivered = set()
        for apic_id in VCPUS:
            while (vector := self.vm.accept(apic_id)) is not None:
                taken.add((apic_id, vector))
        return taken

    def errno_in_another_process(self, action: Callable[[Vm], object]) -> int:
        self.vm.foreign = True
        try:
            return errno_of(lambda: action(self.vm))
        finally:
            self.vm.foreign = False


class SimulatedBench:
    exclusive = True

    def __init__(self, *, deferred: bool) -> None:
        self.kernel = SimulatedKernel(deferred=deferred)
        self.guest = SimulatedGuest(self.kernel.vm(vcpus=VCPUS))
        self.neighbour = SimulatedGuest(self.kernel.vm(vcpus=VCPUS))
        self.eventfd = self.kernel.eventfd
        self.signal = self.kernel.signal
        self.trigger = self.kernel.trigger
        self.count = self.kernel.count
        self.dup = self.kernel.dup
        self.close = self.kernel.close
        self.descriptors = self.kernel.descriptors

    def settle(self) -> None:
        self.kernel.run_deferred()


class KvmGuest:
    def __init__(self, stack: contextlib.ExitStack, vcpus: tuple[int, ...] = VCPUS) -> None:
        self.vm = stack.enter_context(KvmVm.create())
        self.vcpus = [stack.enter_context(Vcpu(self.vm, apic_id)) for apic_id in vcpus]

    def delivered(self) -> Delivered:
        taken = {(vcpu.apic_id, vector) for vcpu in self.vcpus for vector in vcpu.irr()}
        for vcpu in self.vcpus:
            if any(apic_id == vcpu.apic_id for apic_id, _ in taken):
                vcpu.clear_irr()
        return taken

    def errno_in_another_process(self, action: Callable[[Vm], object]) -> int:
        child = os.fork()
        if not child:
            try:
                os._exit(errno_of(lambda: action(self.vm)))
            finally:
                os._exit(255)  # `action` raised something else
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)


class KvmBench:
    """On the real kernel. The thread that made it stays on one CPU, so that :meth:`settle` can rely on an order."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        affinity = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(affinity)})
        stack.callback(os.sched_setaffinity, 0, affinity)
        stack.callback(self._close_all)
        self._opened: set[int] = set()
        self._aio: _Aio | None = None
        self._stack = stack
        self.guest = KvmGuest(stack)
        self.neighbour = KvmGuest(stack)
        # A third VM, where an event that KVM can only inject through deferred work (a broadcast) marks the end of
        # what was queued before it: a CPU's work items are taken in order (kernel/workqueue.c).
        marker = KvmGuest(stack, vcpus=(0,))
        marker.vm.set_gsi_routing(
            {24: remapped(destination=0xFFFFFFFF, dm=0, rh=0, vector=0x20, delivery_mode=0, tm=0)}
        )
        self._marker = marker
        self._mark = marker.vm.adopt(self.eventfd())
        stack.callback(self._mark.close)
        marker.vm.irqfd_assign(self._mark, 24)

    @property
    def exclusive(self) -> bool:
        return _exclusive()

    def eventfd(self, initial: int = 0, flags: int = NONBLOCK) -> int:
        return self._open(os.eventfd(initial, flags))

    def signal(self, fd: int, count: int = 1) -> None:
        try:
            os.eventfd_write(fd, count)
        except OSError as error:
            raise kernel_error(error, "write", f"eventfd {fd}") from error

    def trigger(self, fd: int) -> Callable[[], None]:
        if self._aio is None:
            self._aio = _Aio()
            self._stack.callback(self._aio.close)
        return self._aio.trigger(fd)

    def count(self, fd: int) -> int:
        fields = dict(line.split(":") for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines())
        return int(fields["eventfd-count"], 16)

    def dup(self, fd: int) -> int:
        return self._open(os.dup(fd))

    def close(self, fd: int) -> None:
        self._opened.remove(fd)
        os.close(fd)

    def descriptors(self) -> frozenset[int]:
        # The directory lists the descriptor that lists it, too; its link is gone by now.
        return frozenset(int(entry.name) for entry in list(Path("/proc/self/fd").iterdir()) if entry.is_symlink())

    def settle(self) -> None:
        self._mark.write(1)
        until(lambda: bool(self._marker.delivered()))

    def _open(self, fd: int) -> int:
        self._opened.add(fd)
        return fd

    def _close_all(self) -> None:
        for fd in self._opened:
            os.close(fd)


@functools.cache
def _exclusive() -> bool:
    return one_irqfd_per_eventfd()


class _Aio:
    """A holder of eventfd contexts: io_submit takes the context of ``aio_resfd`` and not its file, as VFIO does.

    fs/aio.c:io_submit_one, aio_complete. The request waits for a pipe; the write to it signals before it returns.
    """

    _IO_SETUP, _IO_DESTROY, _IO_SUBMIT = 206, 207, 209  # arch/x86/entry/syscalls/syscall_64.tbl
    # struct iocb (linux/aio_abi.h): data, key, rw_flags, lio_opcode, reqprio, fildes, buf, nbytes, offset, reserved2,
    # flags, resfd.
    _IOCB = struct.Struct("<QIIHhIQQqQII")
    _IOCB_CMD_POLL = 5
    _IOCB_FLAG_RESFD = 1
    _POLLIN = 1

    def __init__(self) -> None:
        self._pipes: list[int] = []
        self._context = ctypes.c_ulong(0)
        self._syscall(self._IO_SETUP, 64, ctypes.byref(self._context))

    def trigger(self, fd: int) -> Callable[[], None]:
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        self._pipes += read_end, write_end
        request = self._IOCB.pack(
            0, 0, 0, self._IOCB_CMD_POLL, 0, read_end, self._POLLIN, 0, 0, 0, self._IOCB_FLAG_RESFD, fd
        )
        requests = (ctypes.c_char_p * 1)(request)
        self._syscall(self._IO_SUBMIT, self._context, 1, requests)

        def signal() -> None:
            os.write(write_end, b"!")

        return signal

    def close(self) -> None:
        self._syscall(self._IO_DESTROY, self._context)
        for fd in self._pipes:
            os.close(fd)

    def _syscall(self, number: int, *arguments: object) -> None:
        if ctypes.CDLL(None, use_errno=True).syscall(number, *arguments) < 0:
            raise OSError(ctypes.get_errno(), f"system call {number}")


def errno_of(action: Callable[[], object]) -> int:
    """The errno that ``action`` fails with, or 0."""
    try:
        action()
    except KernelError as error:
        return error.errno
    return 0


def until(true: Callable[[], bool]) -> None:
    """Wait for something that the kernel's workers make true, and that no descriptor tells of."""
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline, "the kernel's deferred work has not run for 10 s"
        os.sched_yield()


def message(apic_id: int, vector: int) -> Message:
    """A fixed, physical, edge-triggered interrupt."""
    return remapped(destination=apic_id, dm=0, rh=0, vector=vector, delivery_mode=0, tm=0)


@contextlib.contextmanager
def open_bench(kernel: str) -> Generator[Bench]:
    """``kernel``: ``simulated``, ``simulated, deferred`` (work waits for ``settle``) or ``kvm``."""
    with contextlib.ExitStack() as stack:
        yield KvmBench(stack) if kernel == "kvm" else SimulatedBench(deferred=kernel != "simulated")


@pytest.fixture(params=["simulated", "simulated, deferred", "kvm"])
def bench(request: pytest.FixtureRequest, nothing_leaks: None) -> Iterator[Bench]:
    del nothing_leaks
    kernel: str = request.param
    if kernel == "kvm" and not Path("/dev/kvm").exists():
        pytest.skip("there is no /dev/kvm")
    with open_bench(kernel) as opened:
        yield opened

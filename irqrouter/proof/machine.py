"""The VM under proof: on KVM, with devices in processes of their own; or simulated, with devices on a thread."""

import contextlib
import os
import threading
from types import TracebackType
from typing import Protocol, Self

from irqrouter.kvm.port import Vm
from irqrouter.kvm.simulated import SimulatedKernel
from irqrouter.kvm.vcpu import Vcpu
from irqrouter.kvm.vm import KvmVm
from irqrouter.proof.board import Board
from irqrouter.proof.devices import DeviceProcess, Devices, DeviceThread, Plan
from irqrouter.proof.guest import ENTRY_POINT, RAM_SIZE, Ram, cell, data_segment, stack


class Machine(Protocol):
    """A VM whose guest runs and counts. Closed by leaving its ``with`` block."""

    @property
    def backend(self) -> str:
        """``kvm`` or ``simulated``."""
        ...

    @property
    def vm(self) -> Vm:
        """What the router gets."""
        ...

    @property
    def ram(self) -> Ram:
        """The guest's memory."""
        ...

    def eventfd(self) -> int:
        """A new non-blocking eventfd, to be closed with :meth:`close_eventfd`."""
        ...

    def close_eventfd(self, fd: int) -> None:
        """Close an eventfd."""
        ...

    def devices(self, plan: Plan, board: Board) -> Devices:
        """Start devices."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class KvmMachine:
    """A VM on ``/dev/kvm`` whose vCPUs run. Raises what ``KvmVm.create`` and ``Vcpu`` do."""

    backend = "kvm"

    def __init__(self, vcpus: int) -> None:
        with contextlib.ExitStack() as opened:
            self.ram = opened.enter_context(Ram.create(vcpus))
            self.vm = KvmVm.create()
            opened.callback(self.vm.close)
            self.vm.set_user_memory_region(0, 0, RAM_SIZE, self.ram.address())
            for number in range(vcpus):
                vcpu = Vcpu(self.vm, number, entry=ENTRY_POINT, stack=stack(number), data=data_segment(number))
                opened.enter_context(vcpu).start()
            self._opened = opened.pop_all()

    def eventfd(self) -> int:
        """See :meth:`Machine.eventfd`."""
        return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def close_eventfd(self, fd: int) -> None:
        """See :meth:`Machine.close_eventfd`."""
        os.close(fd)

    def devices(self, plan: Plan, board: Board) -> Devices:
        """See :meth:`Machine.devices`: a process."""
        del board  # the process maps it by the plan's descriptor
        return DeviceProcess(plan)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()


class SimulatedMachine:
    """A VM of the simulated kernel. Its guest takes every interrupt at once, and counts it."""

    backend = "simulated"

    def __init__(self, vcpus: int) -> None:
        self._vcpus = vcpus
        self._counting = threading.Lock()
        self._kernel = SimulatedKernel()
        self.ram = Ram.create(vcpus)
        self.vm = self._kernel.vm(vcpus=range(vcpus), on_delivery=self._take_interrupts)

    def eventfd(self) -> int:
        """See :meth:`Machine.eventfd`."""
        return self._kernel.eventfd()

    def close_eventfd(self, fd: int) -> None:
        """See :meth:`Machine.close_eventfd`."""
        self._kernel.close(fd)

    def devices(self, plan: Plan, board: Board) -> Devices:
        """See :meth:`Machine.devices`: a thread."""
        return DeviceThread(plan, self.ram, board, signal=self._kernel.signal, pending=self._kernel.count)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ram.close()

    def _take_interrupts(self, apic_id: int, vector: int) -> None:
        """What a vCPU does when it is kicked: take whatever is in its IRR, which may be more than ``vector``."""
        del vector
        with self._counting:
            while (taken := self.vm.accept(apic_id)) is not None:
                self.ram.cells[cell(apic_id, taken, self._vcpus)] += 1

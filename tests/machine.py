"""A VM on the real KVM with vCPUs that do not run, a guest's VT-d table in a memfd, and a router over them."""

import asyncio
import os
import struct
import time
from asyncio import to_thread
from collections import Counter
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from irqrouter.core.machine import State
from irqrouter.core.vectors import Vector
from irqrouter.errors import KernelError
from irqrouter.eventfd_loop import Router
from irqrouter.iommu.fault import Fault
from irqrouter.iommu_remap import VtdRemapper, entry
from irqrouter.kvm.port import Eventfd
from irqrouter.kvm.vcpu import Vcpu
from irqrouter.kvm.vm import KvmVm
from irqrouter.memory import MemfdMemory, MemoryRegion
from irqrouter.x86.msi import Message

RAM_BYTES = 1 << 20
TABLE = 0x1000
ENTRIES = 512
REQUESTER = 0x18


class CountingVm(KvmVm):
    """The real VM, which counts the calls made of it and refuses those it is told to."""

    def __init__(self, vm_fd: int, *, pins: int = 24) -> None:
        super().__init__(vm_fd, pins=pins)
        self.calls: Counter[str] = Counter()
        self.refusals: dict[str, list[int]] = {}

    def irqfd_assign(self, eventfd: Eventfd, gsi: int) -> None:
        self._count("assign")
        super().irqfd_assign(eventfd, gsi)

    def irqfd_deassign(self, eventfd: Eventfd, gsi: int) -> None:
        self._count("deassign")
        super().irqfd_deassign(eventfd, gsi)

    def set_gsi_routing(self, changes: Mapping[int, Message | None]) -> None:
        self._count("routing")
        super().set_gsi_routing(changes)

    def signal_msi(self, message: Message) -> int:
        self._count("msi")
        return super().signal_msi(message)

    def refuse(self, call: str, *errnos: int) -> None:
        """The next calls fail with these errnos."""
        self.refusals[call] = list(errnos)

    def _count(self, call: str) -> None:
        self.calls[call] += 1
        if refusals := self.refusals.get(call):
            raise KernelError(refusals.pop(0), call, "told to")


class Machine:
    """``async with Machine() as machine``: 2 vCPUs, ``machine.router`` over ``machine.vm``, faults in a list."""

    def __init__(self) -> None:
        self.vm = CountingVm.create()
        self.cpus = [Vcpu(self.vm, number) for number in range(2)]
        self.ram = os.memfd_create("guest-ram", os.MFD_CLOEXEC)
        os.ftruncate(self.ram, RAM_BYTES)
        self.memory = MemfdMemory([MemoryRegion(0, RAM_BYTES, self.ram, 0)])
        self.remapper = VtdRemapper(self.memory)
        self.remapper.set_interrupt_remap_table(TABLE | 8)  # 512 entries
        self.remapper.set_remapping(True)
        self.faults: list[tuple[Vector, Fault]] = []
        self.on_fault_raises = 0
        self.router = Router(self.vm, self.remapper, on_fault=self._on_fault)
        self.eventfds: list[int] = []

    def _on_fault(self, vector: Vector, fault: Fault) -> None:
        if self.on_fault_raises:
            self.on_fault_raises -= 1
            raise RuntimeError("told to")
        self.faults.append((vector, fault))

    def eventfd(self, flags: int = os.EFD_NONBLOCK) -> int:
        """An eventfd that is closed with the machine."""
        fd = os.eventfd(0, flags | os.EFD_CLOEXEC)
        self.eventfds.append(fd)
        return fd

    def write_irte(self, index: int, vector: int, cpu: int = 0, *, present: bool = True, fpd: bool = False) -> None:
        """The guest writes an entry: fixed, physical, edge, xAPIC destination."""
        low = present | fpd << 1 | vector << 16 | cpu << 40
        os.pwrite(self.ram, struct.pack("<QQ", low, 0), TABLE + 16 * index)

    def arrived(self) -> list[tuple[int, int]]:
        """What KVM put into the vCPUs' IRRs since the last call, as (vCPU, vector)."""
        found = [(cpu.apic_id, vector) for cpu in self.cpus for vector in sorted(cpu.irr())]
        for cpu in self.cpus:
            cpu.clear_irr()
        return found

    async def __aenter__(self) -> Self:
        await self.router.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self.router.aclose()
        finally:
            for fd in self.eventfds:
                os.close(fd)
            for cpu in self.cpus:
                cpu.close()
            self.vm.close()
            self.memory.close()
            os.close(self.ram)


def message_of(index: int) -> Message:
    """The MSI of the table's entry ``index``: remappable format, SHV=0."""
    return Message(0xFEE00010 | index << 5, 0)


async def eventually(condition: Callable[[], object], what: str = "it") -> None:
    """Let the loop run until ``condition`` holds."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        await asyncio.sleep(0)


async def add(
    machine: Machine, index: int, vector: int, cpu: int = 0, *, masked: bool = False, device: str | None = None
) -> tuple[Vector, int]:
    """Add a vector that goes by the table's entry ``index``, which is written first; return its eventfd as well."""
    machine.write_irte(index, vector, cpu)
    fd = machine.eventfd()
    message = message_of(index)
    added = await to_thread(machine.router.add, fd, message, requester=REQUESTER, masked=masked, device=device)
    return added, fd


async def move(machine: Machine, index: int, vector: int, cpu: int = 0) -> None:
    """The guest rewrites the entry of one vector and invalidates it."""
    machine.write_irte(index, vector, cpu)
    assert await to_thread(machine.router.invalidate, entry(index)) == 1


async def is_served(machine: "Machine", vector: Vector) -> None:
    """Let the loop run until an event was caught and the route is in place: the next event has ``vector`` assigned."""
    await eventually(
        lambda: vector.accepted_generation == vector.generation and not machine.router._watched._unanswered,
        f"{vector!r} served",
    )


async def is_assigned(vector: Vector) -> None:
    """Let the loop run until ``vector`` is assigned."""
    await eventually(lambda: vector.state is State.ASSIGNED, f"{vector!r} assigned")


async def next_arrived(machine: Machine) -> list[tuple[int, int]]:
    """Let the loop run until something arrives."""
    # Looked at without clearing: what KVM's work item injects between the look and the clearing would be wiped out.
    await eventually(lambda: any(cpu.irr() for cpu in machine.cpus), "a delivery")
    return machine.arrived()

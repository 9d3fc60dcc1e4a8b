"""A device's interrupt moves to another vCPU: invalidate, catch once, and the kernel delivers again."""

import asyncio
import os
import struct

import uvloop

from irqrouter import KvmVm, MemfdMemory, MemoryRegion, Message, Router, Vcpu, VtdRemapper, entry


async def main() -> None:
    ram = os.memfd_create("guest-ram")
    os.ftruncate(ram, 1 << 20)

    def guest_writes_irte(index: int, vector: int, apic_id: int) -> None:
        os.pwrite(ram, struct.pack("<QQ", 1 | vector << 16 | apic_id << 40, 0), 0x1000 + 16 * index)

    with KvmVm.create() as vm, Vcpu(vm, 0) as cpu0, Vcpu(vm, 1) as cpu1:
        remapper = VtdRemapper(MemfdMemory([MemoryRegion(gpa=0, size=1 << 20, fd=ram, offset=0)]))
        remapper.set_interrupt_remap_table(0x1000 | 7)  # IRTA: 256 entries at 1000h
        remapper.set_remapping(enabled=True)
        guest_writes_irte(5, vector=0x41, apic_id=0)
        device = os.eventfd(0, os.EFD_NONBLOCK)
        async with Router(vm, remapper, on_fault=print) as router:
            msi = Message(0xFEE000B0, 0)  # remappable format, entry 5
            vector = await asyncio.to_thread(router.add, device, msi, requester=0x0018)
            os.eventfd_write(device, 1)
            print("kernel delivered", cpu0.irr(), "- the loop woke", router.wakeups, "times")
            guest_writes_irte(5, vector=0x52, apic_id=1)
            await asyncio.to_thread(router.invalidate, entry(5))  # now the guest may go on
            os.eventfd_write(device, 1)
            while not vector.caught:
                await asyncio.sleep(0)
            print("caught and delivered", cpu1.irr(), "- the loop woke", router.wakeups, "times")


uvloop.run(main())

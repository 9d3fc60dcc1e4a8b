"""KVM's user-space ABI as irqrouter uses it: ioctl numbers, constants and structure layouts.

Everything is named as in ``<linux/kvm.h>``, ``<asm/kvm.h>`` and ``<asm-generic/ioctl.h>``, and
``tests/kvm/test_abi.py`` compares every number, size and offset with what the C compiler says. Structures that go in
by value are :class:`struct.Struct` packers, as these calls are hot; register files, which are read, edited and written
back, are :mod:`ctypes` mirrors. x86-64 only.
"""

# ruff: noqa: N801 - the structures keep their C names

import ctypes
from struct import Struct
from typing import Final

# Linux reads the direction from user space's side: _IOW is "user space writes" (include/uapi/asm-generic/ioctl.h).
_IOC_NONE: Final = 0
_IOC_WRITE: Final = 1
_IOC_READ: Final = 2
_KVMIO: Final = 0xAE


def _ioc(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | _KVMIO << 8 | number


def _io(number: int) -> int:
    return _ioc(_IOC_NONE, number, 0)


def _iow(number: int, size: int) -> int:
    return _ioc(_IOC_WRITE, number, size)


def _ior(number: int, size: int) -> int:
    return _ioc(_IOC_READ, number, size)


def _iowr(number: int, size: int) -> int:
    return _ioc(_IOC_READ | _IOC_WRITE, number, size)


# Structures passed by value. Each comment lists the C members in the packer's order.

#: ``struct kvm_irqfd``: fd, gsi, flags, resamplefd.
KVM_IRQFD_STRUCT: Final = Struct("<iIII16x")
#: ``struct kvm_msi``: address_lo, address_hi, data, flags, devid.
KVM_MSI_STRUCT: Final = Struct("<IIIII12x")
#: ``struct kvm_irq_level``: irq, level.
KVM_IRQ_LEVEL_STRUCT: Final = Struct("<II")
#: ``struct kvm_irq_routing``: nr, flags; the entries follow.
KVM_IRQ_ROUTING_STRUCT: Final = Struct("<II")
#: ``struct kvm_irq_routing_entry`` of type MSI: gsi, type, flags, u.msi.address_lo, u.msi.address_hi, u.msi.data.
KVM_IRQ_ROUTING_ENTRY_STRUCT: Final = Struct("<III4xIII20x")
#: ``struct kvm_userspace_memory_region``: slot, flags, guest_phys_addr, memory_size, userspace_addr.
KVM_USERSPACE_MEMORY_REGION_STRUCT: Final = Struct("<IIQQQ")
#: ``struct kvm_enable_cap``: cap, flags, args[0].
KVM_ENABLE_CAP_STRUCT: Final = Struct("<IIQ88x")
#: ``struct kvm_mp_state``: mp_state.
KVM_MP_STATE_STRUCT: Final = Struct("<I")
#: ``struct kvm_signal_mask``: len; the kernel's 8-byte sigset follows.
KVM_SIGNAL_MASK_STRUCT: Final = Struct("<I")

KVM_IRQFD_FLAG_DEASSIGN: Final = 1 << 0
KVM_IRQ_ROUTING_MSI: Final = 2
KVM_X2APIC_API_USE_32BIT_IDS: Final = 1 << 0
KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK: Final = 1 << 1
KVM_MP_STATE_RUNNABLE: Final = 0
KVM_API_VERSION: Final = 12

KVM_CAP_IRQ_ROUTING: Final = 25
KVM_CAP_IRQFD: Final = 32
KVM_CAP_SIGNAL_MSI: Final = 77
KVM_CAP_SPLIT_IRQCHIP: Final = 121
KVM_CAP_X2APIC_API: Final = 129


# Register files.


class kvm_segment(ctypes.Structure):
    """``struct kvm_segment`` (arch/x86/include/uapi/asm/kvm.h)."""

    base: int
    limit: int
    selector: int
    _fields_ = (
        ("base", ctypes.c_uint64),
        ("limit", ctypes.c_uint32),
        ("selector", ctypes.c_uint16),
        ("type", ctypes.c_uint8),
        ("present", ctypes.c_uint8),
        ("dpl", ctypes.c_uint8),
        ("db", ctypes.c_uint8),
        ("s", ctypes.c_uint8),
        ("l", ctypes.c_uint8),
        ("g", ctypes.c_uint8),
        ("avl", ctypes.c_uint8),
        ("unusable", ctypes.c_uint8),
        ("padding", ctypes.c_uint8),
    )


class kvm_dtable(ctypes.Structure):
    """``struct kvm_dtable``."""

    _fields_ = (("base", ctypes.c_uint64), ("limit", ctypes.c_uint16), ("padding", ctypes.c_uint16 * 3))


class kvm_sregs(ctypes.Structure):
    """``struct kvm_sregs``: segments, tables, control registers and the APIC base."""

    cs: kvm_segment
    ds: kvm_segment
    es: kvm_segment
    fs: kvm_segment
    gs: kvm_segment
    ss: kvm_segment
    apic_base: int
    _fields_ = (
        *((name, kvm_segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        *((name, kvm_dtable) for name in ("gdt", "idt")),
        *((name, ctypes.c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", ctypes.c_uint64 * 4),
    )


class kvm_regs(ctypes.Structure):
    """``struct kvm_regs``: the general registers, ``rip`` and ``rflags``."""

    rsp: int
    rip: int
    rflags: int
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
            *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags"),
        )
    )


class kvm_lapic_state(ctypes.Structure):
    """``struct kvm_lapic_state``: the first KiB of the APIC's register page."""

    regs: "ctypes.Array[ctypes.c_uint8]"
    _fields_ = (("regs", ctypes.c_uint8 * 0x400),)


class kvm_cpuid_entry2(ctypes.Structure):
    """``struct kvm_cpuid_entry2``: one CPUID leaf."""

    function: int
    ecx: int
    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("function", "index", "flags", "eax", "ebx", "ecx", "edx")),
        ("padding", ctypes.c_uint32 * 3),
    )


#: ``KVM_MAX_CPUID_ENTRIES`` (arch/x86/include/asm/kvm_host.h): no KVM reports or takes more.
KVM_MAX_CPUID_ENTRIES: Final = 256


class kvm_cpuid2(ctypes.Structure):
    """``struct kvm_cpuid2`` with room for every entry KVM can report. ``nent`` counts those in use."""

    nent: int
    entries: ctypes.Array[kvm_cpuid_entry2]
    _fields_ = (
        ("nent", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
        ("entries", kvm_cpuid_entry2 * KVM_MAX_CPUID_ENTRIES),
    )


_CPUID2_HEADER_SIZE: Final = ctypes.sizeof(kvm_cpuid2) - KVM_MAX_CPUID_ENTRIES * ctypes.sizeof(kvm_cpuid_entry2)

#: Where ``exit_reason`` lies in the shared ``struct kvm_run``.
KVM_RUN_EXIT_REASON_OFFSET: Final = 8
#: What ``exit_reason`` can be for an x86 guest.
KVM_EXIT_NAMES: Final = {
    0: "KVM_EXIT_UNKNOWN",
    1: "KVM_EXIT_EXCEPTION",
    2: "KVM_EXIT_IO",
    3: "KVM_EXIT_HYPERCALL",
    4: "KVM_EXIT_DEBUG",
    5: "KVM_EXIT_HLT",
    6: "KVM_EXIT_MMIO",
    7: "KVM_EXIT_IRQ_WINDOW_OPEN",
    8: "KVM_EXIT_SHUTDOWN",
    9: "KVM_EXIT_FAIL_ENTRY",
    10: "KVM_EXIT_INTR",
    17: "KVM_EXIT_INTERNAL_ERROR",
    24: "KVM_EXIT_SYSTEM_EVENT",
    26: "KVM_EXIT_IOAPIC_EOI",
    27: "KVM_EXIT_HYPERV",
    29: "KVM_EXIT_X86_RDMSR",
    30: "KVM_EXIT_X86_WRMSR",
    34: "KVM_EXIT_XEN",
}

# Register offsets in the APIC page (arch/x86/include/asm/apicdef.h; Intel SDM vol. 3, table "Local APIC Register
# Address Map"). ISR and IRR are eight 32-bit registers, 16 bytes apart.
APIC_ID: Final = 0x20
APIC_SPIV: Final = 0xF0
APIC_ISR: Final = 0x100
APIC_IRR: Final = 0x200

KVM_GET_API_VERSION: Final = _io(0x00)
KVM_CREATE_VM: Final = _io(0x01)
KVM_CHECK_EXTENSION: Final = _io(0x03)
KVM_GET_VCPU_MMAP_SIZE: Final = _io(0x04)
KVM_GET_SUPPORTED_CPUID: Final = _iowr(0x05, _CPUID2_HEADER_SIZE)
KVM_CREATE_VCPU: Final = _io(0x41)
KVM_SET_USER_MEMORY_REGION: Final = _iow(0x46, KVM_USERSPACE_MEMORY_REGION_STRUCT.size)
KVM_IRQ_LINE: Final = _iow(0x61, KVM_IRQ_LEVEL_STRUCT.size)
KVM_SET_GSI_ROUTING: Final = _iow(0x6A, KVM_IRQ_ROUTING_STRUCT.size)
KVM_IRQFD: Final = _iow(0x76, KVM_IRQFD_STRUCT.size)
KVM_RUN: Final = _io(0x80)
KVM_GET_REGS: Final = _ior(0x81, ctypes.sizeof(kvm_regs))
KVM_SET_REGS: Final = _iow(0x82, ctypes.sizeof(kvm_regs))
KVM_GET_SREGS: Final = _ior(0x83, ctypes.sizeof(kvm_sregs))
KVM_SET_SREGS: Final = _iow(0x84, ctypes.sizeof(kvm_sregs))
KVM_SET_SIGNAL_MASK: Final = _iow(0x8B, KVM_SIGNAL_MASK_STRUCT.size)
KVM_GET_LAPIC: Final = _ior(0x8E, ctypes.sizeof(kvm_lapic_state))
KVM_SET_LAPIC: Final = _iow(0x8F, ctypes.sizeof(kvm_lapic_state))
KVM_SET_CPUID2: Final = _iow(0x90, _CPUID2_HEADER_SIZE)
KVM_GET_MP_STATE: Final = _ior(0x98, KVM_MP_STATE_STRUCT.size)
KVM_SET_MP_STATE: Final = _iow(0x99, KVM_MP_STATE_STRUCT.size)
KVM_ENABLE_CAP: Final = _iow(0xA3, KVM_ENABLE_CAP_STRUCT.size)
KVM_SIGNAL_MSI: Final = _iow(0xA5, KVM_MSI_STRUCT.size)

# A wrong size would be a wrong ioctl number, which KVM answers with a bewildering ENOTTY.
assert KVM_IRQFD_STRUCT.size == 32
assert KVM_MSI_STRUCT.size == 32
assert KVM_IRQ_LEVEL_STRUCT.size == 8
assert KVM_IRQ_ROUTING_STRUCT.size == 8
assert KVM_IRQ_ROUTING_ENTRY_STRUCT.size == 48
assert KVM_USERSPACE_MEMORY_REGION_STRUCT.size == 32
assert KVM_ENABLE_CAP_STRUCT.size == 104
assert KVM_MP_STATE_STRUCT.size == 4
assert KVM_SIGNAL_MASK_STRUCT.size == 4
assert ctypes.sizeof(kvm_segment) == 24
assert ctypes.sizeof(kvm_dtable) == 16
assert ctypes.sizeof(kvm_sregs) == 312
assert ctypes.sizeof(kvm_regs) == 144
assert ctypes.sizeof(kvm_lapic_state) == 1024
assert ctypes.sizeof(kvm_cpuid_entry2) == 40
assert _CPUID2_HEADER_SIZE == 8

"""Xen event-channel callbacks: what the guest asked for with ``HVM_PARAM_CALLBACK_IRQ``.

The parameter's top byte is a type. A callback is a vector, which KVM delivers itself, or a line (a GSI or a PCI INTx),
which is ours. A vector set per vCPU (``HVMOP_set_evtchn_upcall_vector``) wins over all of them; Linux then still sets
"GSI 1", only to be seen as enlightened.

This file decodes the parameter; lines come with the userspace I/OAPIC.
"""

from typing import Annotated, ClassVar, TypeAlias

import msgspec

from irqrouter.bits import Word, bits

_TYPES = ("GSI", "PCI INTx", "vector")


class CallbackIrq(Word, frozen=True, kw_only=True):
    """``HVM_PARAM_CALLBACK_IRQ`` of type GSI or vector (Xen public/hvm/params.h)."""

    width: ClassVar[int] = 64
    type: Annotated[int, bits(63, 56, "type", _TYPES)] = 0
    ignored: Annotated[int, bits(55, 8, "ignored by Xen")] = 0
    number: Annotated[int, bits(7, 0, "GSI or vector")] = 0


class CallbackIrqIntx(Word, frozen=True, kw_only=True):
    """``HVM_PARAM_CALLBACK_IRQ`` of type PCI INTx (Xen public/hvm/params.h)."""

    width: ClassVar[int] = 64
    type: Annotated[int, bits(63, 56, "type", _TYPES)] = 1
    domain: Annotated[int, bits(47, 32, "PCI domain, ignored by Xen")] = 0
    bus: Annotated[int, bits(31, 16, "PCI bus, ignored by Xen")] = 0
    device: Annotated[int, bits(15, 11, "PCI device")] = 0
    function: Annotated[int, bits(10, 8, "PCI function, ignored by Xen")] = 0
    ignored: Annotated[int, bits(7, 2, "ignored by Xen")] = 0
    intx: Annotated[int, bits(1, 0, "pin", ("INTA", "INTB", "INTC", "INTD"))] = 0


class NoCallback(msgspec.Struct, frozen=True):
    """Event channels interrupt nobody, unless a vector is set per vCPU."""

    def describe(self) -> str:
        """``no callback``."""
        return "no callback"


class GsiCallback(msgspec.Struct, frozen=True):
    """The callback is a line: I/OAPIC pin ``gsi``."""

    gsi: int

    def describe(self) -> str:
        """``GSI 9``."""
        return f"GSI {self.gsi}"


class IntxCallback(msgspec.Struct, frozen=True):
    """The callback is a line: pin ``intx`` (0 is INTA) of PCI ``device`` on bus 0."""

    device: int
    intx: int

    def describe(self) -> str:
        """``INTA of 00:03``."""
        return f"INT{'ABCD'[self.intx]} of 00:{self.device:02x}"


class VectorCallback(msgspec.Struct, frozen=True):
    """The callback is ``vector`` on whichever vCPU the event is for."""

    vector: int

    def describe(self) -> str:
        """``vector 0xf3``."""
        return f"vector {self.vector:#x}"


Callback: TypeAlias = NoCallback | GsiCallback | IntxCallback | VectorCallback


def decode_callback(value: int, *, gsis: int) -> Callback:
    """What Xen makes of the parameter's 64-bit ``value`` in a guest with ``gsis`` GSIs.

    As xen/arch/x86/hvm/irq.c:hvm_set_callback_via: a GSI and a vector are the value's low byte, a GSI that is 0 or does
    not exist and an unknown type are no callback and no error, and of a PCI address only the device counts.
    Raises :class:`~irqrouter.errors.SpecError` only for a value beyond 64 bits.
    """
    word = CallbackIrq.decode(value)
    match word.type:
        case 0:
            return GsiCallback(word.number) if 0 < word.number < gsis else NoCallback()
        case 1:
            intx = CallbackIrqIntx.decode(value)
            return IntxCallback(intx.device, intx.intx)
        case 2:
            return VectorCallback(word.number)
        case _:
            return NoCallback()

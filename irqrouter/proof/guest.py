"""The guest: processors which count their interrupts, in memory that everybody can read.

Every vCPU is in real mode and idles in ``sti; hlt``. The handler of a guest vector adds one to a 32-bit counter cell of
its own for (vCPU, guest vector) and writes the x2APIC EOI register. That is all there is to the program: what the guest
counted is what was delivered, and where.

Guest memory is one memfd, so that device processes can read the counters and the remapper the remapping table:

==============  ==========================================================================
guest physical  holds
==============  ==========================================================================
``00000``       interrupt vector table
``01000``       the handlers, 16 bytes each
``02000``       the rest of a handler, common to all; the idle loop
``03000``       the vCPUs' stacks, 256 bytes each
``10000``       the VT-d interrupt remapping table
``20000``       the counter cells, ``[guest vector][vCPU]``, 16 bytes apart
==============  ==========================================================================
"""

import ctypes
import mmap
import os
import struct
from types import TracebackType
from typing import Final, Self

from irqrouter.errors import CallerError
from irqrouter.memory import MemfdMemory, MemoryRegion

#: Guest vectors with a counting handler. Below 20h are exceptions; FFh is the local APIC's spurious vector.
GUEST_VECTORS: Final = range(0x20, 0xFF)

#: Where every vCPU starts.
ENTRY_POINT: Final = 0x2020

#: A handler reaches 64 KiB of counter cells: 16 bytes for each of 255 guest vectors on 16 vCPUs.
VCPUS_MAX: Final = 16

RAM_SIZE: Final = 0x30000
TABLE: Final = 0x10000
TABLE_ENTRIES: Final = 4096

_HANDLERS: Final = 0x1000
_HANDLER_SIZE: Final = 16
_FINISH: Final = 0x2000
_STACKS: Final = 0x3000
_STACK_SIZE: Final = 0x100
_COUNTERS: Final = 0x20000
#: Bytes from one cell to the next; 4 are used. A real-mode segment begins at a multiple of 16.
_CELL: Final = 16

_X2APIC_EOI: Final = 0x80B  # IA32_X2APIC_EOI (SDM Vol. 3A, 11.12.1.2)


def program(vcpus: int) -> bytes:
    """The guest's memory from 0 up to its stacks. Every vCPU's data segment begins at its own first cell."""
    image = bytearray(_STACKS)
    for vector in GUEST_VECTORS:
        handler = _HANDLERS + vector * _HANDLER_SIZE
        struct.pack_into("<HH", image, vector * 4, handler, 0)  # interrupt vector table: IP, CS
        code = b"\x66\xff\x06" + struct.pack("<H", _CELL * cell(0, vector, vcpus))  # inc dword [cell]
        jump_end = handler + len(code) + 3
        code += b"\xe9" + struct.pack("<h", _FINISH - jump_end)  # jmp finish
        image[handler : handler + len(code)] = code
    finish = (
        b"\x66\xb9" + struct.pack("<I", _X2APIC_EOI)  # mov ecx, 80Bh
        + b"\x66\x31\xc0"  # xor eax, eax
        + b"\x66\x31\xd2"  # xor edx, edx
        + b"\x0f\x30"  # wrmsr
        + b"\xcf"  # iret
    )  # fmt: skip
    idle = (
        b"\xfb"  # sti
        b"\xf4"  # hlt: sti's shadow covers it, so no interrupt slips in between
        b"\xeb\xfc"  # jmp idle
    )
    image[_FINISH : _FINISH + len(finish)] = finish
    image[ENTRY_POINT : ENTRY_POINT + len(idle)] = idle
    return bytes(image)


def cell(vcpu: int, guest_vector: int, vcpus: int) -> int:
    """The number of the cell that counts ``guest_vector`` on ``vcpu``, of a guest with ``vcpus`` vCPUs."""
    return guest_vector * vcpus + vcpu


def data_segment(vcpu: int) -> int:
    """Where the data segment of a vCPU begins: at its first counter cell."""
    return _COUNTERS + _CELL * vcpu


def stack(vcpu: int) -> int:
    """The stack pointer that a vCPU starts with."""
    return _STACKS + (vcpu + 1) * _STACK_SIZE


class Ram:
    """Guest memory, mapped from the memfd ``fd``, which it owns from now on.

    ``cells`` are the counters, one 32-bit item each; ``table`` the remapping table, two 64-bit items to an entry: an
    item is loaded and stored in one instruction.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, RAM_SIZE)
        self._bytes = memoryview(self._map)
        self.cells = self._bytes[_COUNTERS:].cast("I")[:: _CELL // 4]
        self.table = self._bytes[TABLE : TABLE + 16 * TABLE_ENTRIES].cast("Q")

    @classmethod
    def create(cls, vcpus: int) -> Self:
        """Fresh memory with the program for ``vcpus`` vCPUs in it."""
        fd = os.memfd_create("irqrouter-proof-ram", os.MFD_CLOEXEC)
        os.ftruncate(fd, RAM_SIZE)
        ram = cls(fd)
        ram._bytes[:_STACKS] = program(vcpus)
        return ram

    def snapshot(self, first: int, last: int) -> bytes:
        """The cells ``first`` up to, not including, ``last``, as bytes: cheap to compare with an older one."""
        return self._map[_COUNTERS + _CELL * first : _COUNTERS + _CELL * last]

    def memory(self) -> MemfdMemory:
        """This memory as a remapper reads it."""
        return MemfdMemory([MemoryRegion(gpa=0, size=RAM_SIZE, fd=self.fd, offset=0)])

    def address(self) -> int:
        """Where it is mapped in this process."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def close(self) -> None:
        """Unmap and close. Idempotent."""
        if self.fd >= 0:
            self.cells.release()
            self.table.release()
            self._bytes.release()
            self._map.close()
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Pairs:
    """Which (vCPU, guest vector) pairs belong to which device vector.

    Every device vector has a block of guest vectors to itself, on every vCPU: what a cell counted is then that
    device vector's and nobody else's. Cells are numbered so that a block is one range of them.
    """

    def __init__(self, vcpus: int, vectors: int) -> None:
        each = len(GUEST_VECTORS) // vectors if vectors > 0 else 0
        if not 1 <= vcpus <= VCPUS_MAX:
            raise CallerError(f"{vcpus} vCPUs", f"must be 1 to {VCPUS_MAX}")
        if each * vcpus < 2:
            # With a single pair a stale delivery could not be told from a good one.
            raise CallerError(f"{vectors} vectors on {vcpus} vCPUs", "every vector needs two pairs to move between")
        self.vcpus = vcpus
        self._each = each

    def cells(self, vector: int) -> range:
        """The cells of device vector ``vector``."""
        first = cell(0, GUEST_VECTORS[vector * self._each], self.vcpus)
        return range(first, first + self._each * self.vcpus)

    def pair(self, number: int) -> tuple[int, int]:
        """The (vCPU, guest vector) of the cell of that number."""
        vector, vcpu = divmod(number, self.vcpus)
        return vcpu, vector

"""What the service sees of the vectors: the state page, and the doorbell that says it has changed.

The page belongs to the service, which could write into it too: nothing here ever reads it.
"""

import fcntl
import heapq
import mmap
import os
import struct
import threading
from collections.abc import Iterable
from typing import Final

from irqrouter.core.machine import State
from irqrouter.core.vectors import Vector
from irqrouter.errors import CallerError, IrqrouterError, KernelError
from irqrouter.service import wire

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_SLOT: Final = struct.Struct(f"<{wire.SLOT_SIZE // 8}Q")
_HEADER: Final = struct.Struct("<3Q")
_U32: Final = 0xFFFF_FFFF
_SHOWN_AS: Final = {
    State.DEASSIGNED: wire.SlotState.DEASSIGNED,
    State.ASSIGNED: wire.SlotState.ASSIGNED,
    State.MASKED: wire.SlotState.MASKED,
    State.REMOVED: wire.SlotState.FREE,
}
#: States whose beginning the service must hear of.
_TOLD: Final = frozenset({State.DEASSIGNED, State.REMOVED})


class PageError(IrqrouterError):
    """The state page that the service gave is none: it could be taken away from under us, and kill the VMM."""


class SlotsExhaustedError(CallerError):
    """The agent has as many vectors as it was made for."""


class StatePage:
    """The memfd ``fd``, checked and mapped; ``fd`` stays the caller's. It is unmapped when nobody refers to it.

    Raises :class:`PageError`, and ``OSError`` where it cannot be mapped.
    """

    def __init__(self, fd: int, slots: int) -> None:
        size = wire.page_size(slots)
        if os.fstat(fd).st_size != size:
            raise PageError("the state page", f"must have {size} bytes for {slots} slots")
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as error:
            raise PageError("the state page", "must be a memfd") from error
        if seals & _SEALS != _SEALS:  # whoever can shrink it can have us killed by SIGBUS
            raise PageError("the state page", "must have the seals SHRINK, GROW and SEAL")
        # Items of this view are stored whole, one after another; x86 keeps stores in that order.
        self._quadwords = memoryview(mmap.mmap(fd, size)).cast("Q")

    def write_header(self, header: wire.PageHeader) -> None:
        """Store the header; its magic, which says that there is one, last."""
        first, table, control = _HEADER.unpack(wire.encode_page_header(header))
        self._quadwords[1] = table
        self._quadwords[2] = control
        self._quadwords[0] = first

    def write_slot(self, number: int, slot: wire.Slot) -> None:
        """Store a slot: what its generation covers first, the generation last."""
        generation, *rest = _SLOT.unpack(wire.encode_slot(slot))
        view = self._quadwords
        at = wire.slot_offset(number) // 8
        for offset, quadword in enumerate(rest, at + 1):
            view[offset] = quadword
        view[at] = generation


class Doorbell:
    """An eventfd to ring. Any thread may ring while another closes it."""

    def __init__(self) -> None:
        try:
            self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except OSError as error:
            raise KernelError(error.errno or 0, "eventfd", "a doorbell") from error
        self._lock = threading.Lock()  # or the number could be somebody else's by the time it is written to

    def fileno(self) -> int:
        """The descriptor; -1 once closed."""
        return self._fd

    def ring(self) -> None:
        """Wake whoever listens."""
        with self._lock:
            if self._fd >= 0:
                try:
                    os.eventfd_write(self._fd, 1)
                except BlockingIOError:
                    pass  # it has been rung, 2**64 - 2 times

    def close(self) -> None:
        """Close it. Idempotent."""
        with self._lock:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class _Seat:
    """A vector and its slot."""

    __slots__ = ("shown", "slot", "vector")

    def __init__(self, vector: Vector, slot: int) -> None:
        self.vector = vector
        self.slot = slot
        self.shown: tuple[int, State, int] | None = None  # what the doorbell is rung for


class Shown:
    """Which vector has which slot, and the page they are shown in while there is one (``executor.Mirror``).

    The wire's number of a vector is its slot, and slots are reused, the lowest first; the executor's ids never are.
    """

    def __init__(self, slots: int) -> None:
        self._free = list(range(slots))  # a heap
        self._used = 0
        self._seats: dict[int, _Seat] = {}
        self._by_slot: dict[int, Vector] = {}
        self._registers = (0, 0)
        self._page: StatePage | None = None
        self._doorbell: Doorbell | None = None
        self._due = False
        self._lock = threading.Lock()  # the slots, and the page's header

    def seat(self, vectors: Iterable[Vector]) -> None:
        """Give each of ``vectors`` a slot; :class:`SlotsExhaustedError` when there is none left."""
        with self._lock:
            for vector in vectors:
                if not self._free:
                    raise SlotsExhaustedError("the agent", f"was made for {self._used} vectors and has them")
                slot = heapq.heappop(self._free)
                self._used = max(self._used, slot + 1)
                self._by_slot[slot] = vector
                self._seats[vector.id] = _Seat(vector, slot)
            self._write_header()

    def unseat(self, vectors: Iterable[Vector]) -> None:
        """Take back the slots of ``vectors``, which are removed. One that has none is passed over."""
        with self._lock:
            for vector in vectors:
                seat = self._seats.pop(vector.id, None)
                if seat is not None:
                    del self._by_slot[seat.slot]
                    heapq.heappush(self._free, seat.slot)

    def vector_at(self, slot: int) -> Vector | None:
        """The vector that has ``slot`` now."""
        return self._by_slot.get(slot)

    def seated(self) -> list[Vector]:
        """Every vector that has a slot."""
        with self._lock:
            return list(self._by_slot.values())

    def slot_of(self, vector: Vector) -> int | None:
        """The slot of ``vector``; None once it has none."""
        seat = self._seats.get(vector.id)
        return None if seat is None else seat.slot

    def set_registers(self, table: int, control: int) -> None:
        """Show the remapping unit's registers, now and in every later page."""
        with self._lock:
            self._registers = table, control
            self._write_header()

    def attach(self, page: StatePage, doorbell: Doorbell) -> None:
        """Show in ``page`` from now on. What was shown before is to be shown again."""
        with self._lock:
            self._doorbell = doorbell
            self._page = page
            self._write_header()

    def detach(self) -> None:
        """Show nowhere from now on."""
        with self._lock:
            self._page = self._doorbell = None

    def show(self, vector: Vector) -> None:
        """See ``executor.Mirror``."""
        seat = self._seats.get(vector.id)
        if seat is None:
            return
        before, now = seat.shown, (vector.generation, vector.state, vector.assign_errno)
        seat.shown = now
        page = self._page  # it stays mapped as long as this name lives
        if page is not None:
            page.write_slot(seat.slot, _slot(vector))
            if before is None or before[::2] != now[::2] or (before[1] is not now[1] and now[1] in _TOLD):
                self._due = True

    def announce(self) -> None:
        """See ``executor.Mirror``. Whoever takes ``_due`` rings after that; whoever sets it comes here after that."""
        if self._due:
            self._due = False
            self.ring()

    def ring(self) -> None:
        """Ring the doorbell, if anybody may listen."""
        doorbell = self._doorbell
        if doorbell is not None:
            doorbell.ring()

    def _write_header(self) -> None:
        if self._page is not None:
            self._page.write_header(wire.PageHeader(self._used, *self._registers))


def _slot(vector: Vector) -> wire.Slot:
    routed = wire.ROUTED if vector.accepted_generation == vector.generation else 0
    return wire.Slot(
        generation=vector.generation,
        born=vector.born,
        address=vector.request.message.address,
        data=vector.request.message.data,
        requester=vector.request.requester,
        state=_SHOWN_AS[vector.state] | routed,
        refused=min(vector.assign_errno, 0xFF),
        cookie=vector.cookie,
        gsi=vector.gsi,
        invalidations=vector.invalidations & _U32,
        caught=vector.caught & _U32,
        faults=vector.faults & _U32,
        stale=vector.stale & _U32,
        discarded=vector.discarded & _U32,
    )

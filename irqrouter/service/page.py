"""The state page: what an agent says of its vectors, in memory that it shares with the service.

The service makes it and seals its size, so that neither side can pull it away under the other, and maps it read-only.
What is in it is the guest's and its VMM's: any bytes, changing at any time. Only the order is given: whoever loads a
generation first, and then the rest of the slot, has a label under which anything older is refused.
"""

import fcntl
import mmap
import os
from collections.abc import Iterator
from typing import Final

import msgspec

from irqrouter.errors import KernelError
from irqrouter.service import wire

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

#: Slots are compared with what was seen last in runs of so many: one page of memory.
_RUN: Final = 64
#: The bytes of a slot that say what the vector is; counters follow.
_IDENTITY: Final = 40


class StatePage:
    """The page for ``slots`` slots: made, sealed and mapped. Raises :class:`~irqrouter.errors.KernelError`."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        size = wire.page_size(slots)
        try:
            self.fd = os.memfd_create("irqrouter-state", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise KernelError(error.errno or 0, "memfd_create", "state page") from error
        try:
            os.ftruncate(self.fd, size)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self._map = mmap.mmap(self.fd, size, access=mmap.ACCESS_READ)
        except OSError as error:
            os.close(self.fd)
            raise KernelError(error.errno or 0, "ftruncate, F_ADD_SEALS or mmap", "state page") from error
        self._bytes = memoryview(self._map)
        self._generations = self._bytes.cast("Q")[wire.PAGE_HEADER_SIZE // 8 :: wire.SLOT_SIZE // 8]
        self._seen: list[bytes] = []

    def header(self) -> wire.PageHeader:
        """The header; zeros until the agent has written it."""
        return wire.decode_page_header(self._map[:24]) or wire.PageHeader()

    def generation(self, vector: int) -> int:
        """The vector's generation: one aligned load."""
        return self._generations[vector]

    def slot(self, vector: int) -> wire.Slot:
        """The slot, its generation loaded before everything else."""
        generation = self._generations[vector]
        offset = wire.slot_offset(vector)
        slot = wire.decode_slot(self._map[offset : offset + wire.SLOT_SIZE])
        if slot.generation != generation:  # it changed in between; the older label is the safe one
            slot = msgspec.structs.replace(slot, generation=generation)
        return slot

    def changed(self) -> Iterator[int]:
        """The vectors that are not what they were at the last call. Counters alone do not count."""
        used = min(self.header().slots_used, self.slots)
        for run, first in enumerate(range(0, used, _RUN)):
            size = min(_RUN, self.slots - first) * wire.SLOT_SIZE
            if run == len(self._seen):
                self._seen.append(bytes(size))
            offset = wire.slot_offset(first)
            now, before = self._map[offset : offset + size], self._seen[run]
            if now == before:
                continue
            self._seen[run] = now
            for at in range(0, len(now), wire.SLOT_SIZE):
                if now[at : at + _IDENTITY] != before[at : at + _IDENTITY]:
                    yield first + at // wire.SLOT_SIZE

    def close(self) -> None:
        """Unmap and close. Idempotent."""
        if self.fd >= 0:
            self._generations.release()
            self._bytes.release()
            self._map.close()
            os.close(self.fd)
            self.fd = -1

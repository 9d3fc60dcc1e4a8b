"""Guest memory as the translator reads it."""

import bisect
import fcntl
import os
from collections.abc import Iterable
from types import TracebackType
from typing import Protocol, Self

import msgspec

from irqrouter.errors import CallerError, GuestMemoryError, KernelError


class GuestMemory(Protocol):
    """Where a remapper reads the guest's tables."""

    def read(self, gpa: int, size: int) -> bytes:
        """The ``size`` bytes at guest physical address ``gpa``, all of them.

        Raises :class:`~irqrouter.errors.GuestMemoryError` where there is no memory, past 2^64, and where the
        memory behind it has shrunk.
        """
        ...


class RegionError(CallerError):
    """A memory region that overlaps another, wraps or is empty, or whose descriptor is no memfd."""


class MemoryRegion(msgspec.Struct, frozen=True):
    """``size`` bytes of guest memory at ``gpa``, kept in the file ``fd`` from byte ``offset`` on."""

    gpa: int
    size: int
    fd: int
    offset: int

    def describe(self) -> str:
        """``guest memory 0x0-0xfffff``."""
        return f"guest memory {self.gpa:#x}-{self.gpa + self.size - 1:#x}"


class MemfdMemory:
    """Guest memory in memfds (or other shmem or hugetlbfs files), shared with the VMM.

    Reads use ``pread``: a page that the other side truncated away is an error then, where a mapping would be
    a SIGBUS. The descriptors are duplicated and owned; :meth:`close` them once nobody reads any more. Reads
    may come from any thread.

    Raises :class:`RegionError`, or :class:`~irqrouter.errors.KernelError` for a descriptor that is closed;
    nothing is left open then.
    """

    def __init__(self, regions: Iterable[MemoryRegion]) -> None:
        given = sorted(regions, key=lambda region: region.gpa)
        _check_ranges(given)
        # All of them before the first is duplicated: a duplicate may take the number of one that is closed.
        for region in given:
            _check_descriptor(region)
        self._owned: dict[int, int] = {}
        for region in given:
            if region.fd in self._owned:
                continue
            try:
                self._owned[region.fd] = os.dup(region.fd)
            except OSError as error:
                self.close()
                raise KernelError(error.errno or 0, "dup", region.describe()) from error
        self._regions = tuple(msgspec.structs.replace(region, fd=self._owned[region.fd]) for region in given)
        self._starts = tuple(region.gpa for region in given)

    @property
    def regions(self) -> int:
        """How many regions there are."""
        return len(self._regions)

    @property
    def descriptors(self) -> int:
        """How many descriptors are held for them."""
        return len(self._owned)

    def read(self, gpa: int, size: int) -> bytes:
        """See :meth:`GuestMemory.read`. A read may span adjacent regions."""
        if size < 1 or not 0 <= gpa <= (1 << 64) - size:
            raise GuestMemoryError(f"guest memory {gpa:#x}, {size} bytes", "must lie within 64 bits")
        pieces: list[bytes] = []
        while True:
            at = bisect.bisect_right(self._starts, gpa) - 1
            if at < 0 or (left := self._regions[at].gpa + self._regions[at].size - gpa) <= 0:
                raise GuestMemoryError(f"guest memory {gpa:#x}", "no memory region is there")
            region = self._regions[at]
            wanted = min(size, left)
            try:
                piece = os.pread(region.fd, wanted, region.offset + gpa - region.gpa)
            except OSError as error:
                raise GuestMemoryError(f"guest memory {gpa:#x}", f"pread failed: {error.strerror}") from error
            if not piece:
                raise GuestMemoryError(f"guest memory {gpa:#x}", "the file behind it ends before it")
            if len(piece) == size and not pieces:
                return piece
            pieces.append(piece)
            gpa, size = gpa + len(piece), size - len(piece)
            if not size:
                return b"".join(pieces)

    def close(self) -> None:
        """Close the duplicates. Idempotent. Reads raise from now on; none may be under way."""
        self._regions, self._starts = (), ()
        while self._owned:
            os.close(self._owned.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _check_ranges(regions: list[MemoryRegion]) -> None:
    end = 0
    for region in regions:
        if region.size < 1 or region.gpa < 0 or region.gpa + region.size > 1 << 64:
            raise RegionError(region.describe(), "must not be empty and must lie within 64 bits")
        if region.offset < 0 or region.offset + region.size > 1 << 63:
            raise RegionError(region.describe(), f"file offset {region.offset:#x} must leave room below 2^63")
        if region.gpa < end:
            raise RegionError(region.describe(), "overlaps the region below it")
        end = region.gpa + region.size


def _check_descriptor(region: MemoryRegion) -> None:
    what = f"descriptor {region.fd}"
    if not 0 <= region.fd < 1 << 31:
        raise RegionError(region.describe(), f"{what} is none")
    try:
        flags = fcntl.fcntl(region.fd, fcntl.F_GETFL)
    except OSError as error:
        raise KernelError(error.errno or 0, "fcntl(F_GETFL)", f"{region.describe()}, {what}") from error
    if flags & os.O_ACCMODE == os.O_WRONLY:
        raise RegionError(region.describe(), f"{what} must be readable")
    try:
        # Only shmem and hugetlbfs files have seals (mm/memfd.c:memfd_file_seals_ptr); a read of another file may
        # block for as long as its owner likes (FUSE).
        fcntl.fcntl(region.fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise RegionError(region.describe(), f"{what} must be a memfd, shmem or hugetlbfs file") from error

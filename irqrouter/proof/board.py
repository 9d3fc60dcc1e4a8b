"""The notice board: what the guest's driver, the fault record and the devices tell each other, in shared memory.

One memfd of 32-bit cells, mapped by the driver's process and by every device process. Each cell has one writer:

=====================  ==================  ===================================================================
cell                   written by          says
=====================  ==================  ===================================================================
``STOP``               the run             the devices are to stop firing
``VIOLATED``           any device          a rule was broken: the run may end
``drained(device)``    that device         it fired its last event
``steps(driver)``      that driver         changes made so far
``newest(vector)``     the vector's driver number of the newest history entry
``acknowledged(...)``  the vector's driver number of the newest entry whose verb has returned
``faults(vector)``     the fault record    faults recorded so far
``events(vector)``     the vector's device events signalled so far
``history``            the vector's driver a ring of the newest ``KEPT`` entries
=====================  ==================  ===================================================================

Ordering. A cell is aligned and accessed through a ``memoryview`` of native 32-bit items, so it is loaded or stored in
one instruction and never torn. x86 keeps the stores of one CPU in order, and its loads in order (SDM Vol. 3A, 9.2.2),
and a store is seen by every other CPU at once. Python executes one access after the other. So it is enough that

* the driver writes an entry, then ``newest``, then lets the router (and so the guest) act on it: whoever sees what came
  of it, and then loads ``newest``, finds at least that number;
* the driver writes ``acknowledged`` only after the verb returned;
* a device loads ``acknowledged`` before it signals, and ``newest`` after it has seen the outcome.

A load may overtake an older store of its own CPU to another cell; no rule above pairs a store with a later load.
"""

import mmap
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Final

from irqrouter.proof.ledger import Outcome

#: History entries kept for each vector. An event that waits through more changes cannot be judged for staleness.
KEPT: Final = 256

#: How many changes the drivers may be ahead of the devices, or behind them.
AHEAD: Final = 32

#: Devices, and drivers, that have a cell of their own.
WORKERS_MAX: Final = 31

_STOP: Final = 0
_VIOLATED: Final = 1
_DRAINED: Final = 2
_STEPS: Final = _DRAINED + WORKERS_MAX
_HEADER: Final = _STEPS + WORKERS_MAX

_NEWEST: Final = 0
_ACKNOWLEDGED: Final = 1
_FAULTS: Final = 2
_EVENTS: Final = 3
_RING: Final = 16
_VECTOR: Final = _RING + KEPT


class Board:
    """The board for ``vectors`` vectors, over the memfd ``fd``, which it owns from now on."""

    def __init__(self, fd: int, vectors: int) -> None:
        self.fd = fd
        self.vectors = vectors
        self._map = mmap.mmap(fd, board_size(vectors))
        self.cells = memoryview(self._map).cast("I")

    @classmethod
    def create(cls, vectors: int) -> "Board":
        """A new board; every vector's history begins with entry 0, ``HELD``, acknowledged."""
        fd = os.memfd_create("irqrouter-proof-board", os.MFD_CLOEXEC)
        os.ftruncate(fd, board_size(vectors))
        return cls(fd, vectors)

    def close(self) -> None:
        """Unmap and close. Idempotent."""
        if self.fd >= 0:
            self.cells.release()
            self._map.close()
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> "Board":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def stop(self) -> bool:
        """The devices are to stop firing."""
        return bool(self.cells[_STOP])

    def say_stop(self) -> None:
        """Tell the devices to stop firing."""
        self.cells[_STOP] = 1

    @property
    def violated(self) -> bool:
        """Some device saw a rule broken."""
        return bool(self.cells[_VIOLATED])

    def say_violated(self) -> None:
        """Tell everybody that a rule was broken."""
        self.cells[_VIOLATED] = 1

    def drained(self, devices: int) -> bool:
        """The first ``devices`` devices have all fired their last event."""
        return all(self.cells[_DRAINED : _DRAINED + devices])

    def say_drained(self, device: int) -> None:
        """Tell that ``device`` has fired its last event."""
        self.cells[_DRAINED + device] = 1

    def say_steps(self, driver: int, count: int) -> None:
        """Tell how many changes ``driver`` has made so far."""
        self.cells[_STEPS + driver] = count

    def lead(self, events_per_change: int) -> int:
        """How many changes the devices are ahead of the drivers: below 0 they are behind."""
        return self.events() // events_per_change - sum(self.cells[_STEPS : _STEPS + WORKERS_MAX])

    def events(self) -> int:
        """Events signalled so far, on every vector."""
        return sum(self.cells[_HEADER + _EVENTS :: _VECTOR])

    def faults(self) -> int:
        """Faults recorded so far, on every vector."""
        return sum(self.cells[_HEADER + _FAULTS :: _VECTOR])

    def history(self, vector: int) -> "BoardHistory":
        """The history of ``vector``."""
        return BoardHistory(self.cells, _HEADER + vector * _VECTOR)


def board_size(vectors: int) -> int:
    """Bytes of a board for ``vectors`` vectors."""
    return 4 * (_HEADER + vectors * _VECTOR)


class BoardHistory:
    """One vector's part of the board. The writing methods belong to the writer named in the module's table."""

    __slots__ = ("_acknowledged", "_cells", "_events", "_faults", "_newest", "_ring")

    def __init__(self, cells: "memoryview[int]", base: int) -> None:
        self._cells = cells
        self._newest = base + _NEWEST
        self._acknowledged = base + _ACKNOWLEDGED
        self._faults = base + _FAULTS
        self._events = base + _EVENTS
        self._ring = base + _RING

    def newest(self) -> int:
        """The newest entry's number."""
        return self._cells[self._newest]

    def acknowledged(self) -> int:
        """The number of the newest entry whose verb has returned."""
        return self._cells[self._acknowledged]

    def faults(self) -> int:
        """Faults recorded so far."""
        return self._cells[self._faults]

    def entries(self, first: int, last: int) -> Sequence[Outcome] | None:
        """Entries ``first`` to ``last``, both included; None when ``first`` is no longer kept."""
        if self.newest() - first >= KEPT - 1:  # one slot is always the one being written
            return None
        cells, ring = self._cells, self._ring
        entries = [cells[ring + number % KEPT] for number in range(first, last + 1)]
        # Looked at again: the driver may have gone once round the ring while the entries were read.
        return entries if self.newest() - first < KEPT - 1 else None

    def append(self, outcome: Outcome) -> int:
        """Write an entry, before it can come true. Returns its number."""
        number = self.newest() + 1
        self._cells[self._ring + number % KEPT] = outcome
        self._cells[self._newest] = number
        return number

    def acknowledge(self, number: int) -> None:
        """Tell that the verb which made entry ``number`` true has returned."""
        self._cells[self._acknowledged] = number

    def say_fault(self) -> None:
        """Tell that one more fault was recorded."""
        self._cells[self._faults] += 1

    def say_events(self, count: int) -> None:
        """Tell how many events were signalled so far."""
        self._cells[self._events] = count

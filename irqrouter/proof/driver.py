"""The guest's driver, seeded: what a guest does to its interrupts, again and again, while they fire.

It moves interrupts (writes the IRTE, low half first as Linux does, and invalidates it), several at once under a wide
or a global invalidation, invalidates what did not change, breaks entries and repairs them, masks and unmasks, gives a
device another MSI, removes vectors and adds them again. Every choice comes from the seed and from what this driver did
before, none from the clock.

Before anything can come true it is written into the vector's history; it is acknowledged when the verb has returned
(``ledger.py``). A vector has one driver, so that its history has one writer. Consecutive targets of a vector differ,
also across a time in which it was held: only so can a stale delivery be told from a good one.
"""

import enum
import functools
import random
from collections.abc import Sequence
from typing import Final, Generic

import msgspec

from irqrouter.eventfd_loop import Source
from irqrouter.iommu.vtd import Irta, Irte, RemappableAddress
from irqrouter.iommu_remap import EVERYTHING, entries, entry
from irqrouter.proof.board import Board
from irqrouter.proof.guest import TABLE, TABLE_ENTRIES, Pairs, Ram
from irqrouter.proof.ledger import FAULT, HELD
from irqrouter.proof.routing import Handle, Side
from irqrouter.x86.msi import Message

#: IRTEs of a vector: it uses one, and moves to another when it is given another MSI.
SLOTS: Final = 2

#: The value of IRTA for the table in guest memory: x2APIC mode, 2^(S+1) entries.
IRTA: Final = Irta(base_63_12=TABLE >> 12, eime=1, s=TABLE_ENTRIES.bit_length() - 2).encode()


class Verb(enum.Enum):
    """One thing that a guest does."""

    RETARGET = "retarget"
    RETARGET_MANY = "retarget many"
    INVALIDATE = "invalidate"
    BREAK = "break"
    REPAIR = "repair"
    MASK = "mask"
    UNMASK = "unmask"
    UNMASK_BROKEN = "unmask broken"
    PROGRAM = "program"
    REMOVE = "remove"
    ADD = "add"
    ADD_MASKED = "add masked"


class Condition(enum.Enum):
    """What the guest has made of a vector."""

    WORKING = "working"
    BROKEN = "broken"
    MASKED = "masked"
    REMOVED = "removed"


#: What may be done to a vector, and how often of a hundred times.
_CHOICES: Final[dict[Condition, dict[Verb, int]]] = {
    Condition.WORKING: {
        Verb.RETARGET: 50,
        Verb.RETARGET_MANY: 10,
        Verb.INVALIDATE: 10,
        Verb.BREAK: 5,
        Verb.MASK: 10,
        Verb.PROGRAM: 10,
        Verb.REMOVE: 5,
    },
    Condition.BROKEN: {Verb.REPAIR: 60, Verb.INVALIDATE: 10, Verb.MASK: 20, Verb.REMOVE: 10},
    Condition.MASKED: {
        Verb.UNMASK: 60,
        Verb.UNMASK_BROKEN: 5,
        Verb.RETARGET: 15,
        Verb.PROGRAM: 15,
        Verb.REMOVE: 5,
    },
    Condition.REMOVED: {Verb.ADD: 70, Verb.ADD_MASKED: 30},
}

#: The same without removals.
_STEADY_CHOICES: Final = {
    condition: {verb: share for verb, share in choices.items() if verb is not Verb.REMOVE}
    for condition, choices in _CHOICES.items()
}


class Wire(msgspec.Struct, frozen=True):
    """A device vector: its number, its eventfd, and the requester id of its device."""

    number: int
    eventfd: int
    requester: int


class _Driven(Generic[Handle]):
    """One vector, as the driver knows it."""

    def __init__(self, wire: Wire, board: Board, pairs: Pairs) -> None:
        self.wire = wire
        self.history = board.history(wire.number)
        self.cells = pairs.cells(wire.number)
        #: The last target in its history.
        self.target = self.cells[0]
        self.slot = 0
        self.condition = Condition.REMOVED
        self.handle: Handle | None = None

    @property
    def index(self) -> int:
        """The IRTE it uses."""
        return self.wire.number * SLOTS + self.slot

    @property
    def vector(self) -> Handle:
        """The routing's handle; it must have been added."""
        assert self.handle is not None
        return self.handle

    @property
    def message(self) -> Message:
        """What its device is programmed with: a handle, and the slot as the subhandle."""
        handle = self.wire.number * SLOTS
        address = RemappableAddress(handle_14_0=handle & 0x7FFF, handle_15=handle >> 15, shv=1)
        return Message(address.encode(), self.slot)


class Driver(Generic[Handle]):
    """Drives ``wires``; nobody else does. One that does not ``replug`` removes none, and so adds none again."""

    def __init__(
        self,
        side: Side[Handle],
        ram: Ram,
        board: Board,
        pairs: Pairs,
        wires: Sequence[Wire],
        seed: str,
        *,
        replug: bool = True,
    ) -> None:
        self.steps = 0
        self.invalidations = 0
        #: Events caught for vectors which have been removed since.
        self.caught_before = 0
        self._side = side
        self._routing = side.routing
        self._ram = ram
        self._pairs = pairs
        self._driven: list[_Driven[Handle]] = [_Driven(wire, board, pairs) for wire in wires]
        self._choices = _CHOICES if replug else _STEADY_CHOICES
        self._rng = random.Random(seed)

    def populate(self) -> None:
        """Add every vector, working."""
        numbers: list[int] = []
        for driven in self._driven:
            numbers.append(self._promise(driven))
            self._aim(driven, driven.target)
        handles = self._routing.add_all(
            Source(eventfd=driven.wire.eventfd, message=driven.message, requester=driven.wire.requester)
            for driven in self._driven
        )
        for driven, handle, number in zip(self._driven, handles, numbers, strict=True):
            driven.handle, driven.condition = handle, Condition.WORKING
            driven.history.acknowledge(number)

    def step(self) -> None:
        """Do one thing to one vector."""
        driven = self._rng.choice(self._driven)
        choices = self._choices[driven.condition]
        verb = self._rng.choices(list(choices), list(choices.values()))[0]
        self.steps += 1
        match verb:
            case Verb.RETARGET | Verb.REPAIR:
                self._retarget([driven])
            case Verb.RETARGET_MANY:
                self._retarget_many()
            case Verb.INVALIDATE:
                self._invalidate([driven.index])
            case Verb.BREAK:
                self._break(driven)
            case Verb.MASK:
                self._mask(driven)
            case Verb.UNMASK:
                self._unmask(driven, broken=False)
            case Verb.UNMASK_BROKEN:
                self._unmask(driven, broken=True)
            case Verb.PROGRAM:
                self._program(driven)
            case Verb.REMOVE:
                self._remove(driven)
            case Verb.ADD:
                self._add(driven, masked=False)
            case Verb.ADD_MASKED:
                self._add(driven, masked=True)

    def release(self) -> None:
        """Make every vector work again, so that what waits can be delivered."""
        for driven in self._driven:
            match driven.condition:
                case Condition.BROKEN:
                    self._retarget([driven])
                case Condition.MASKED:
                    self._unmask(driven, broken=False)
                case Condition.REMOVED:
                    self._add(driven, masked=False)
                case Condition.WORKING:
                    pass

    def caught(self) -> int:
        """Events of these vectors that were caught so far."""
        live = [driven.handle for driven in self._driven if driven.handle is not None]
        return self.caught_before + sum(map(self._side.caught, live))

    # --- the verbs. In each: history first, then what makes it true, then the acknowledgement. ---------------------

    def _retarget(self, moving: Sequence[_Driven[Handle]]) -> None:
        """Move working, broken or masked vectors under one invalidation."""
        numbers: list[int | None] = []
        for driven in moving:
            if driven.condition is Condition.MASKED:
                numbers.append(None)  # held it is, and held it stays
                self._aim(driven, self._another(driven))
            else:
                numbers.append(self._promise(driven))
                self._aim(driven, driven.target)
                driven.condition = Condition.WORKING
        self._invalidate([driven.index for driven in moving])
        for driven, number in zip(moving, numbers, strict=True):
            if number is not None:
                driven.history.acknowledge(number)

    def _retarget_many(self) -> None:
        movable = [driven for driven in self._driven if driven.condition is not Condition.REMOVED]
        self._retarget(self._rng.sample(movable, min(len(movable), self._rng.randint(2, 8))))

    def _break(self, driven: _Driven[Handle]) -> None:
        number = driven.history.append(FAULT)
        self._write_broken(driven)
        driven.condition = Condition.BROKEN
        self._invalidate([driven.index])
        driven.history.acknowledge(number)

    def _mask(self, driven: _Driven[Handle]) -> None:
        # Until mask() returns a delivery may still come: held is what it is afterwards.
        self._routing.mask(driven.vector)
        driven.condition = Condition.MASKED
        driven.history.acknowledge(driven.history.append(HELD))

    def _unmask(self, driven: _Driven[Handle], *, broken: bool) -> None:
        # The entry is rewritten while nothing may happen: what waited must not go by the old one. The history says
        # so only then, or it would excuse a delivery that came while the vector was still masked.
        cell = self._another(driven)
        if broken:
            self._write_broken(driven)
        else:
            self._aim(driven, cell)
        self._invalidate([driven.index])
        number = driven.history.append(FAULT) if broken else self._promise(driven, cell)
        driven.condition = Condition.BROKEN if broken else Condition.WORKING
        self._routing.unmask(driven.vector)
        driven.history.acknowledge(number)

    def _program(self, driven: _Driven[Handle]) -> None:
        """Move to the other IRTE, and free the old one."""
        freed = driven.index
        cell = self._another(driven)
        number = self._promise(driven, cell) if driven.condition is Condition.WORKING else None
        driven.slot = (driven.slot + 1) % SLOTS
        self._aim(driven, cell)
        self._invalidate([driven.index])
        self._routing.program(driven.vector, driven.message)
        if number is not None:
            driven.history.acknowledge(number)
        self._write(freed, (0, 0))
        self._invalidate([freed])

    def _remove(self, driven: _Driven[Handle]) -> None:
        vector = driven.vector
        self._routing.remove(vector)
        self.caught_before += self._side.caught(vector)
        driven.handle, driven.condition = None, Condition.REMOVED
        driven.history.acknowledge(driven.history.append(HELD))

    def _add(self, driven: _Driven[Handle], *, masked: bool) -> None:
        cell = self._another(driven)
        self._aim(driven, cell)
        self._invalidate([driven.index])
        number = None if masked else self._promise(driven, cell)
        driven.condition = Condition.MASKED if masked else Condition.WORKING
        driven.handle = self._routing.add(
            driven.wire.eventfd, driven.message, requester=driven.wire.requester, masked=masked
        )
        if number is not None:
            driven.history.acknowledge(number)

    # --- the table ------------------------------------------------------------------------------------------------

    def _another(self, driven: _Driven[Handle]) -> int:
        """A cell of the vector's that is not its last target."""
        cell = self._rng.choice(driven.cells[:-1])
        return cell if cell != driven.target else driven.cells[-1]

    def _promise(self, driven: _Driven[Handle], cell: int | None = None) -> int:
        """Write into the history that events may go to ``cell`` (or another one than before) from now on."""
        driven.target = self._another(driven) if cell is None else cell
        return driven.history.append(driven.target)

    def _aim(self, driven: _Driven[Handle], cell: int) -> None:
        """Write the vector's IRTE so that it leads to ``cell``."""
        vcpu, guest_vector = self._pairs.pair(cell)
        logical, hint, validated = self._rng.choices((False, True), k=3)
        self._write(driven.index, _irte(vcpu, guest_vector, driven.wire.requester, logical, hint, validated))

    def _write_broken(self, driven: _Driven[Handle]) -> None:
        """Make the entry fault: absent, or for another requester."""
        if self._rng.random() < 0.5:
            self._write(driven.index, (0, 0))
        else:
            vcpu, guest_vector = self._pairs.pair(driven.target)
            self._write(driven.index, _irte(vcpu, guest_vector, driven.wire.requester ^ 1, False, False, True))

    def _write(self, index: int, irte: tuple[int, int]) -> None:
        # Two stores, low half first: arch/x86 set_64bit as drivers/iommu/intel/irq_remapping.c:modify_irte has it.
        self._ram.table[2 * index], self._ram.table[2 * index + 1] = irte

    def _invalidate(self, indices: Sequence[int]) -> None:
        """One invalidation that covers ``indices``: as narrow as can be, mostly."""
        mask = (min(indices) ^ max(indices)).bit_length()
        wider = self._rng.random()
        if wider < 0.02:
            scope = EVERYTHING
        elif wider < 0.10:
            scope = entries(indices[0], mask + self._rng.randint(1, 3))
        else:
            scope = entries(indices[0], mask) if mask else entry(indices[0])
        self.invalidations += 1
        self._routing.invalidate(scope)


@functools.lru_cache(maxsize=1 << 14)
def _irte(vcpu: int, guest_vector: int, requester: int, logical: bool, hint: bool, validated: bool) -> tuple[int, int]:
    """An IRTE to one vCPU, low and high quadword.

    A logical x2APIC id is the cluster in bits 31:16 and one bit of 16 (SDM Vol. 3A, 11.12.10.2).
    """
    destination = (vcpu >> 4) << 16 | 1 << (vcpu & 15) if logical else vcpu
    raw = Irte(
        svt=int(validated), sid=requester if validated else 0, dst=destination, v=guest_vector,
        rh=int(hint), dm=int(logical), p=1,
    ).encode()  # fmt: skip
    return raw & (1 << 64) - 1, raw >> 64

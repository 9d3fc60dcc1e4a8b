"""Short names for what the tests say again and again: messages, operations, and vectors in a given state."""

from irqrouter.service.wire import Kind, Operation, Record, SlotState
from irqrouter.x86.msi import Message
from tests.conformance.target import Target, V, delivered, seen
from tests.kvm.conftest import message

#: A message that KVM takes neither as a route nor as a delivery: bits 39:32 of its address must be 0.
REFUSED_BY_KVM = Message(0x1_FEE0_0000, 0x4041)
#: A fault as hardware writes it.
RECORD: Record = (0x0005_0000_0000_0000, 0x8000_0022_0000_0018)
#: To every vCPU: KVM defers the injection to its work queue.
BROADCAST = message(0xFFFF_FFFF, 0x50)
#: No vector will ever have that number.
NOBODYS = 4095


def by_entry(index: int) -> Message:
    """The MSI whose cookie is ``index``: remappable format, SHV=0."""
    return Message(0xFEE0_0010 | index << 5, 0)


def set_route(target: Target, v: V, to: Message, generation: int | None = None) -> Operation:
    """At ``generation``, or the vector's present one."""
    return Operation(Kind.SET_ROUTE, v.number, _generation(target, v, generation), to.address, to.data)


def catch(target: Target, v: V, to: Message, generation: int | None = None) -> Operation:
    """As above."""
    return Operation(Kind.CATCH, v.number, _generation(target, v, generation), to.address, to.data)


def catch_fault(target: Target, v: V, *, recorded: bool = True, generation: int | None = None) -> Operation:
    """As above."""
    return Operation(Kind.CATCH_FAULT, v.number, _generation(target, v, generation), record=RECORD, flag=recorded)


def assign(target: Target, v: V, *, delivering: bool = False, generation: int | None = None) -> Operation:
    """As above."""
    return Operation(Kind.ASSIGN, v.number, _generation(target, v, generation), flag=delivering)


def every_operation(target: Target, v: V, generation: int | None = None) -> list[Operation]:
    """One of each kind that every implementation knows."""
    return [
        set_route(target, v, message(0, 0x61), generation),
        catch(target, v, message(0, 0x62), generation),
        catch_fault(target, v, generation=generation),
        assign(target, v, generation=generation),
        assign(target, v, delivering=True, generation=generation),
    ]


def one_by_one(target: Target, operations: list[Operation]) -> list[int]:
    """Each in a batch of its own, so that none cancels the next."""
    return [target.run([operation])[0] for operation in operations]


def _generation(target: Target, v: V, generation: int | None) -> int:
    return seen(target, v).generation if generation is None else generation


def added(target: Target, index: int = 5, *, masked: bool = False) -> V:
    """A new vector with the cookie ``index``, of which nothing has been decided."""
    return target.add(target.bench.eventfd(), by_entry(index), masked=masked)


def bound(target: Target, index: int = 5, to: Message | None = None) -> V:
    """A new vector that KVM delivers: to vCPU 1, vector 41h, unless said otherwise."""
    v = added(target, index)
    bind(target, v, to or message(1, 0x41))
    return v


def bind(target: Target, v: V, to: Message) -> None:
    """Have KVM deliver ``v`` from now on."""
    assert target.run([set_route(target, v, to), assign(target, v)]) == [0, 0]
    assert state(target, v) is SlotState.ASSIGNED


def state(target: Target, v: V) -> SlotState:
    """Where it is in its life."""
    return seen(target, v).state


def generation(target: Target, v: V) -> int:
    """What decisions about it must say."""
    return seen(target, v).generation


def fire(target: Target, v: V, count: int = 1) -> None:
    """The device signals."""
    target.bench.signal(v.fd, count)


def pending(target: Target, v: V) -> int:
    """What waits in its eventfd."""
    return target.bench.count(v.fd)


def arrives(target: Target, v: V) -> set[tuple[int, int]]:
    """What an event brings at once, without anybody deciding. Nothing may be left in the eventfd."""
    assert delivered(target) == set()
    fire(target, v)
    found = delivered(target)
    assert pending(target, v) == 0
    return found


def waits(target: Target, v: V) -> bool:
    """Whether an event stays where it is, to be decided about."""
    before = pending(target, v)
    fire(target, v)
    return delivered(target) == set() and pending(target, v) == before + 1

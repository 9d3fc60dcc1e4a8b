"""A vector's life, as one table.

Rule 1: everything that changes a vector's state is a row of ``TABLE``; nothing else assigns ``Vector.state``.
Rule 2: a pair that is not in the table is illegal: it raises and changes nothing.

``ASSIGNED``: the kernel delivers. An invalidation, mask, new MSI or removal deassigns it, whatever else it does.
``DEASSIGNED``: the loop watches the eventfd. When it fires the event is caught (delivered, or recorded as a fault);
after a delivery the irqfd is assigned again. ``MASKED``: nobody reads; the count in the eventfd is the pending bit.

An invalidation of many vectors at once may leave the assigned ones assigned while their routes are fetched
(``WIDENED``); those that get none in time are deassigned when it ends (``ROUTE_MISSED``).

A row that *renews* gives the vector a new generation. Everything that changes what a vector is renews it, and
everything decided under an older generation is refused (``ESTALE``): that one rule is what keeps late decisions
harmless.
"""

import enum

import msgspec

from irqrouter.errors import InternalError


class State(enum.Enum):
    """Where a vector is in its life."""

    # TABLE hashes a state and an event at every step, and Enum's own __hash__ is Python code. Members are unique.
    __hash__ = object.__hash__

    #: The kernel delivers, posted where the host can.
    ASSIGNED = "assigned"
    #: Userspace watches the eventfd.
    DEASSIGNED = "deassigned"
    #: Deassigned, and nobody reads: events wait in the eventfd.
    MASKED = "masked"
    #: Route dropped, descriptor closed.
    REMOVED = "removed"


class Event(enum.Enum):
    """What happened to a vector, as a fact."""

    __hash__ = object.__hash__  # as in State

    #: The guest's IOMMU dropped a translation this vector may have been made with.
    INVALIDATED = "invalidated"
    #: The same, by an invalidation that has not ended: what is assigned may stay so, if it gets a new route by then.
    WIDENED = "invalidated with many"
    #: That invalidation ends, and the vector's route is not known to be from after it began, or KVM not to be done with
    #: the one before.
    ROUTE_MISSED = "left without its route"
    #: The guest masked it.
    MASKED = "masked"
    #: The guest unmasked it.
    UNMASKED = "unmasked"
    #: The guest gave it another MSI address or data.
    PROGRAMMED = "programmed"
    #: It is gone.
    REMOVED = "removed"
    #: The kernel refused a routing table in which this vector's route had changed.
    ROUTE_REFUSED = "route refused"
    #: A pending event was taken and delivered.
    CAUGHT = "caught"
    #: A pending event was taken and recorded as a fault.
    FAULT_CAUGHT = "fault caught"
    #: ``KVM_IRQFD`` succeeded.
    ASSIGNED = "assigned"


class Row(msgspec.Struct, frozen=True):
    """What an event does: the next state, whether it renews the generation, and what must be done at once."""

    state: State
    renews: bool = False
    deassign: bool = False
    drop_route: bool = False


_A, _D, _M, _R = State.ASSIGNED, State.DEASSIGNED, State.MASKED, State.REMOVED

TABLE: dict[tuple[State, Event], Row] = {
    (_A, Event.INVALIDATED): Row(_D, renews=True, deassign=True),
    (_D, Event.INVALIDATED): Row(_D, renews=True),
    (_M, Event.INVALIDATED): Row(_M, renews=True),
    #
    (_A, Event.WIDENED): Row(_A, renews=True),
    (_D, Event.WIDENED): Row(_D, renews=True),
    (_M, Event.WIDENED): Row(_M, renews=True),
    #
    # Not renewed: it was, when that invalidation began, and whatever was decided since is as good as before.
    (_A, Event.ROUTE_MISSED): Row(_D, deassign=True),
    #
    (_A, Event.MASKED): Row(_M, renews=True, deassign=True),
    (_D, Event.MASKED): Row(_M, renews=True),
    (_M, Event.MASKED): Row(_M),  # guests write the mask bit twice
    #
    (_A, Event.UNMASKED): Row(_A),  # and clear it twice
    (_D, Event.UNMASKED): Row(_D),
    (_M, Event.UNMASKED): Row(_D, renews=True),
    #
    (_A, Event.PROGRAMMED): Row(_D, renews=True, deassign=True),
    (_D, Event.PROGRAMMED): Row(_D, renews=True),
    (_M, Event.PROGRAMMED): Row(_M, renews=True),
    #
    (_A, Event.REMOVED): Row(_R, renews=True, deassign=True, drop_route=True),
    (_D, Event.REMOVED): Row(_R, renews=True, drop_route=True),
    (_M, Event.REMOVED): Row(_R, renews=True, drop_route=True),
    #
    (_A, Event.ROUTE_REFUSED): Row(_D, renews=True, deassign=True),
    (_D, Event.ROUTE_REFUSED): Row(_D),
    (_M, Event.ROUTE_REFUSED): Row(_M),
    #
    (_D, Event.CAUGHT): Row(_D),
    (_D, Event.FAULT_CAUGHT): Row(_D),
    (_D, Event.ASSIGNED): Row(_A),
}


class IllegalTransitionError(InternalError):
    """An event that cannot happen in this state. The vector is as it was."""


def step(state: State, event: Event) -> Row:
    """Return the table's row, or raise :class:`IllegalTransitionError`."""
    try:
        return TABLE[state, event]
    except KeyError:
        raise IllegalTransitionError(f"a vector that is {state.value}", f"cannot be {event.value}") from None

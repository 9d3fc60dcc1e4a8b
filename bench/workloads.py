"""The workloads. Ours, floor and peer take turns, iteration by iteration, after equal idle gaps.

Who goes first changes from one iteration to the next. Every time is in nanoseconds.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Literal

import msgspec

from bench.floor import Catcher, Floor
from bench.vms import ADDRESS, BareVm, OurVm, RoutedVm, wait_until

#: Everybody is idle for this long before each measurement.
GAP_S: Final = 0.001
_GAP_NS: Final = round(GAP_S * 1e9)
#: Signals in one round of ``steady``.
SIGNALS: Final = 200
#: Entries invalidated one after the other in ``selective``: a queue pair's, or a device's, that moves to other CPUs.
RUN: Final = 8
#: From one invalidated vector to the next: far from the last one, and prime, so that all of them get their turn.
_STRIDE: Final = 617

Workload = Literal["steady", "selective", "miss", "attach", "scale"]
Mode = Literal[
    "embedded", "embedded-idle", "embedded-asyncio", "service", "service-apart", "service-idle", "service-cold"
]


class Times(msgspec.Struct, frozen=True, kw_only=True):
    """What one workload measured, iteration by iteration: the k-th of each list belong together."""

    workload: Workload
    mode: Mode
    n: int
    ours: list[float]
    floor: list[float]
    peer: list[float] | None = None
    #: The interrupt vectors found in the IRR of each VM in the end: proof that interrupts arrived.
    ours_vectors: list[int]
    floor_vectors: list[int]
    peer_vectors: list[int] | None = None
    #: How often the loop woke up (``steady``).
    wakeups: int | None = None


def steady(floor: Floor, new_event_loop: Callable[[], asyncio.AbstractEventLoop], *, rounds: int) -> Times:
    """Signal an assigned eventfd: with the router attached, and on a bare VM."""
    ours: list[float] = []
    bare: list[float] = []
    with RoutedVm(1, new_event_loop) as routed, BareVm(1) as bare_vm:
        before = routed.router.wakeups
        turns: list[Callable[[], None]] = [
            lambda: ours.append(floor.signal_many(routed.eventfds[0], SIGNALS) / SIGNALS),
            lambda: bare.append(floor.signal_many(bare_vm.eventfds[0], SIGNALS) / SIGNALS),
        ]
        for turn in in_turns(turns, rounds):
            time.sleep(GAP_S)
            turn()
        time.sleep(GAP_S)  # a wakeup that should not have been would come now
        return Times(
            workload="steady",
            mode="embedded",
            n=1,
            ours=ours,
            floor=bare,
            ours_vectors=sorted(routed.irr()),
            floor_vectors=sorted(bare_vm.irr()),
            wakeups=routed.router.wakeups - before,
        )


def selective(floor: Floor, new_vm: Callable[[int], OurVm], *, n: int, mode: Mode, run: int, rounds: int) -> Times:
    """Invalidate ``run`` entries of ``n``, one by one: ours, a bare deassign each, the whole table written twice each.

    The times are per entry.
    """
    ours: list[float] = []
    bare: list[float] = []
    peer: list[float] = []

    def entries_of(iteration: int) -> list[int]:
        return [(iteration * run + number) * _STRIDE % n for number in range(run)]

    with new_vm(n) as our_vm, BareVm(n) as bare_vm, BareVm(n) as peer_vm:

        def invalidate_ours() -> None:
            entries = entries_of(len(ours))
            for index in entries:
                our_vm.move(index)
            time.sleep(GAP_S)
            ours.append(sum([our_vm.invalidate(index) for index in entries]) / run)
            for index in entries:
                floor.fire(our_vm.eventfds[index], 0)
            for index in entries:
                our_vm.wait_until_caught(index)
                our_vm.assign_again(index)

        def deassign_bare() -> None:
            entries = entries_of(len(bare))
            for index in entries:
                bare_vm.move(index)
            handles = [(bare_vm.eventfds[index], bare_vm.gsis[index]) for index in entries]
            time.sleep(GAP_S)
            bare.append(sum([floor.deassign(bare_vm.vm, eventfd, gsi) for eventfd, gsi in handles]) / run)
            for index, (eventfd, gsi) in zip(entries, handles, strict=True):
                floor.catch_and_assign(bare_vm.vm, eventfd, gsi, bare_vm.message(index), bare_vm.table)

        def write_peer() -> None:
            entries = entries_of(len(peer))
            for index in entries:
                peer_vm.move(index)
            time.sleep(GAP_S)
            peer.append(sum([floor.write_table_twice(peer_vm.vm, peer_vm.table) for _ in entries]) / run)
            for index in entries:
                floor.signal_many(peer_vm.eventfds[index], 1)

        for turn in in_turns([invalidate_ours, deassign_bare, write_peer], rounds):
            turn()
        return Times(
            workload="selective",
            mode=mode,
            n=n,
            ours=ours,
            floor=bare,
            peer=peer,
            ours_vectors=sorted(our_vm.irr()),
            floor_vectors=sorted(bare_vm.irr()),
            peer_vectors=sorted(peer_vm.irr()),
        )


def miss(floor: Floor, new_vm: Callable[[int], OurVm], *, mode: Mode, rounds: int) -> Times:
    """From the signal on a deassigned eventfd to the MSI injected: ours, and a C thread in ``epoll_wait``."""
    ours: list[float] = []
    bare: list[float] = []
    with contextlib.ExitStack() as opened:
        our_vm = opened.enter_context(new_vm(1))
        bare_vm = opened.enter_context(BareVm(1))
        floor.deassign(bare_vm.vm, bare_vm.eventfds[0], bare_vm.gsis[0])
        catcher = opened.enter_context(Catcher(floor, bare_vm.vm, bare_vm.eventfds[0], ADDRESS))

        def catch_bare() -> None:
            bare_vm.move(0)
            catcher.set_data(bare_vm.message(0).data)
            fired = floor.fire(bare_vm.eventfds[0], _GAP_NS)
            wait_until(lambda: catcher.injected_ns >= fired, "the catcher")
            bare.append(catcher.injected_ns - fired)

        for turn in in_turns([lambda: ours.append(caught_ns(floor, our_vm)), catch_bare], rounds):
            turn()
        return Times(
            workload="miss",
            mode=mode,
            n=1,
            ours=ours,
            floor=bare,
            ours_vectors=sorted(our_vm.irr()),
            floor_vectors=sorted(bare_vm.irr()),
        )


def attach(floor: Floor, new_vm: Callable[[int], OurVm], *, n: int, mode: Mode, rounds: int) -> Times:
    """Add ``n`` vectors, until all are assigned; the floor writes the table once and assigns each."""
    ours: list[float] = []
    bare: list[float] = []
    with new_vm(n) as our_vm, BareVm(n) as bare_vm:

        def attach_ours() -> None:
            our_vm.detach()
            for index in range(n):
                our_vm.move(index)
            time.sleep(GAP_S)
            ours.append(our_vm.attach())
            assert all(our_vm.is_assigned(index) for index in range(n)), "not all are assigned"
            for eventfd in our_vm.eventfds:
                floor.signal_many(eventfd, 1)

        def attach_bare() -> None:
            floor.detach(bare_vm.vm, bare_vm.eventfd_array, bare_vm.gsis[0])
            for index in range(n):
                bare_vm.move(index)
            time.sleep(GAP_S)
            bare.append(floor.attach(bare_vm.vm, bare_vm.eventfd_array, bare_vm.gsis[0], bare_vm.table))
            for eventfd in bare_vm.eventfds:
                floor.signal_many(eventfd, 1)

        for turn in in_turns([attach_ours, attach_bare], rounds):
            turn()
        return Times(
            workload="attach",
            mode=mode,
            n=n,
            ours=ours,
            floor=bare,
            ours_vectors=sorted(our_vm.irr()),
            floor_vectors=sorted(bare_vm.irr()),
        )


def caught_ns(floor: Floor, vm: OurVm) -> int:
    """Move and invalidate the first source, and signal: nanoseconds until that was delivered. Then assign it again."""
    vm.move(0)
    vm.invalidate(0)
    vm.wait_until_ready(0)
    fired = floor.fire(vm.eventfds[0], _GAP_NS)
    vm.wait_until_caught(0)
    injected = vm.injected_ns(0)
    vm.assign_again(0)
    return injected - fired


def in_turns(turns: Sequence[Callable[[], None]], rounds: int) -> Iterator[Callable[[], None]]:
    """Each of ``turns``, ``rounds`` times."""
    # Every order in turn, not a rotation: that would always leave a side behind the same neighbour, and its caches.
    orders = itertools.cycle(itertools.permutations(turns))
    return itertools.chain.from_iterable(itertools.islice(orders, rounds))

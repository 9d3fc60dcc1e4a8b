"""The three workloads. Ours, floor and peer take turns, iteration by iteration, after equal idle gaps.

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
from bench.vms import ADDRESS, BareVm, RoutedVm, wait_until

#: Everybody is idle for this long before each measurement.
GAP_S: Final = 0.001
#: Signals in one round of ``steady``.
SIGNALS: Final = 200
#: Entries invalidated one after the other in ``selective``: a queue pair's, or a device's, that moves to other CPUs.
RUN: Final = 8
#: From one invalidated vector to the next: far from the last one, and prime, so that all of them get their turn.
_STRIDE: Final = 617

Workload = Literal["steady", "selective", "miss"]
Mode = Literal["embedded", "embedded-idle", "embedded-asyncio"]


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
        for turn in _in_turns(turns, rounds):
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


def selective(
    floor: Floor, new_event_loop: Callable[[], asyncio.AbstractEventLoop], *, n: int, mode: Mode, run: int, rounds: int
) -> Times:
    """Invalidate ``run`` entries of ``n``, one by one: ours, a bare deassign each, the whole table written twice each.

    The times are per entry.
    """
    ours: list[float] = []
    bare: list[float] = []
    peer: list[float] = []

    def entries_of(iteration: int) -> list[int]:
        return [(iteration * run + number) * _STRIDE % n for number in range(run)]

    with RoutedVm(n, new_event_loop) as routed, BareVm(n) as bare_vm, BareVm(n) as peer_vm:

        def invalidate_ours() -> None:
            entries = entries_of(len(ours))
            for index in entries:
                routed.move(index)
            time.sleep(GAP_S)
            ours.append(sum([routed.invalidate(index) for index in entries]) / run)
            for index in entries:
                floor.fire(routed.eventfds[index], 0)
            for index in entries:
                routed.wait_until_assigned(index)

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

        for turn in _in_turns([invalidate_ours, deassign_bare, write_peer], rounds):
            turn()
        return Times(
            workload="selective",
            mode=mode,
            n=n,
            ours=ours,
            floor=bare,
            peer=peer,
            ours_vectors=sorted(routed.irr()),
            floor_vectors=sorted(bare_vm.irr()),
            peer_vectors=sorted(peer_vm.irr()),
        )


def miss(floor: Floor, new_event_loop: Callable[[], asyncio.AbstractEventLoop], *, mode: Mode, rounds: int) -> Times:
    """From the signal on a deassigned eventfd to the MSI injected: the router, and a C thread in ``epoll_wait``."""
    ours: list[float] = []
    bare: list[float] = []
    gap_ns = round(GAP_S * 1e9)
    with contextlib.ExitStack() as opened:
        routed = opened.enter_context(RoutedVm(1, new_event_loop))
        bare_vm = opened.enter_context(BareVm(1))
        floor.deassign(bare_vm.vm, bare_vm.eventfds[0], bare_vm.gsis[0])
        catcher = opened.enter_context(Catcher(floor, bare_vm.vm, bare_vm.eventfds[0], ADDRESS))

        def catch_ours() -> None:
            routed.move(0)
            routed.invalidate(0)
            fired = floor.fire(routed.eventfds[0], gap_ns)
            routed.wait_until_assigned(0)
            ours.append(routed.vm.injected_ns - fired)

        def catch_bare() -> None:
            bare_vm.move(0)
            catcher.set_data(bare_vm.message(0).data)
            fired = floor.fire(bare_vm.eventfds[0], gap_ns)
            wait_until(lambda: catcher.injected_ns >= fired, "the catcher")
            bare.append(catcher.injected_ns - fired)

        for turn in _in_turns([catch_ours, catch_bare], rounds):
            turn()
        return Times(
            workload="miss",
            mode=mode,
            n=1,
            ours=ours,
            floor=bare,
            ours_vectors=sorted(routed.irr()),
            floor_vectors=sorted(bare_vm.irr()),
        )


def _in_turns(turns: Sequence[Callable[[], None]], rounds: int) -> Iterator[Callable[[], None]]:
    # Every order in turn, not a rotation: that would always leave a side behind the same neighbour, and its caches.
    orders = itertools.cycle(itertools.permutations(turns))
    return itertools.chain.from_iterable(itertools.islice(orders, rounds))

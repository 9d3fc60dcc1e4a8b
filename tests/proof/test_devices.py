"""Devices against hardware made by hand: honest, and broken in every way that the books must notice."""

import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

import pytest

from irqrouter.proof.board import AHEAD, Board
from irqrouter.proof.devices import DeviceProcess, DevicesFailedError, Plan, Report, fire
from irqrouter.proof.guest import Pairs, Ram
from irqrouter.proof.ledger import FAULT, HELD, Outcome, Rule, Totals

VECTORS, VCPUS = 4, 2
PAIRS = Pairs(VCPUS, VECTORS)
FIRST, SECOND = PAIRS.cells(0)[0], PAIRS.cells(0)[1]


class Bench:
    """Memory, a board, and vector 0 with the history given; everything acknowledged."""

    events_per_change = 1_000_000

    def __init__(self, *history: Outcome) -> None:
        self.ram = Ram.create(VCPUS)
        self.board = Board.create(VECTORS)
        self.history = self.board.history(0)
        self.write(*history)

    def write(self, *outcomes: Outcome) -> None:
        for outcome in outcomes:
            self.history.acknowledge(self.history.append(outcome))

    def deliver(self, cell: int, times: int = 1) -> None:
        self.ram.cells[cell] += times

    def plan(self, *, events: int | None = 20, burst: int = 1, fd: int = 0, patience: float = 0.1) -> Plan:
        return Plan(
            device=0,
            eventfds={0: fd},
            ram=self.ram.fd,
            board=self.board.fd,
            vcpus=VCPUS,
            vectors=VECTORS,
            events=events,
            burst=burst,
            events_per_change=self.events_per_change,
            seed="devices",
            patience=patience,
        )

    def fire(
        self,
        signal: Callable[[], None],
        *,
        events: int | None = 20,
        burst: int = 1,
        pending: int = 0,
        relax: Callable[[], None] = lambda: None,
    ) -> Report:
        return fire(
            self.plan(events=events, burst=burst),
            self.ram,
            self.board,
            signal=lambda _fd: signal(),
            pending=lambda _fd: pending,
            relax=relax,
            abandoned=lambda: False,
        )

    def close(self) -> None:
        self.board.close()
        self.ram.close()


@contextmanager
def bench(*history: Outcome) -> Generator[Bench]:
    made = Bench(*history)
    try:
        yield made
    finally:
        made.close()


def rules(report: Report) -> set[Rule]:
    return {violation.rule for violation in report.violations}


def test_fire_on_honest_hardware_balances() -> None:
    with bench(FIRST) as made:
        report = made.fire(lambda: made.deliver(FIRST))
        assert report == Report(Totals(events=20, delivered=20), [])
        assert made.board.drained(1)
        assert not made.board.violated
        assert made.board.events() == 20


def test_fire_with_recorded_faults_balances() -> None:
    with bench(FIRST, FAULT) as made:
        assert made.fire(made.history.say_fault).totals == Totals(events=20, faults=20)


def test_fire_on_hardware_that_moves_with_the_history_balances() -> None:
    with bench(FIRST) as made:
        cells = [FIRST]

        def signal() -> None:
            made.deliver(cells[-1])
            cells.append(SECOND if cells[-1] == FIRST else FIRST)
            made.write(cells[-1])

        # The event is delivered to where it went when it was signalled, although the history has moved on since.
        assert made.fire(signal).totals == Totals(events=20, delivered=20)


def test_fire_on_hardware_that_goes_by_an_old_entry_finds_it_stale() -> None:
    with bench(FIRST, SECOND) as made:
        report = made.fire(lambda: made.deliver(FIRST))
        assert rules(report) == {Rule.STALE}
        assert report.violations[0].entries == (HELD, FIRST, SECOND)
        assert made.board.violated


def test_fire_on_hardware_that_mixes_two_entries_finds_it_stale() -> None:
    with bench(PAIRS.cells(0)[0], PAIRS.cells(0)[3]) as made:
        assert rules(made.fire(lambda: made.deliver(PAIRS.cells(0)[2]))) == {Rule.STALE}


def test_fire_on_hardware_that_ignores_the_mask_finds_it() -> None:
    with bench(FIRST, HELD) as made:
        assert rules(made.fire(lambda: made.deliver(FIRST))) == {Rule.STALE}


def test_fire_on_hardware_that_faults_valid_entries_finds_it() -> None:
    with bench(FIRST) as made:
        assert rules(made.fire(made.history.say_fault)) == {Rule.STALE}


def test_fire_on_hardware_that_delivers_twice_finds_it() -> None:
    with bench(FIRST) as made:
        assert rules(made.fire(lambda: made.deliver(FIRST, 2))) == {Rule.DUPLICATED}


def test_fire_on_hardware_that_delivers_once_more_later_finds_it() -> None:
    with bench(FIRST) as made:
        signals: list[int] = []

        def signal() -> None:
            signals.append(1)
            made.deliver(FIRST)

        def relax() -> None:  # called when the events are used up, and before: whenever nothing was fired
            if len(signals) == 7:
                made.deliver(FIRST)

        report = made.fire(signal, events=7, pending=1, relax=relax)
        assert Rule.DUPLICATED in rules(report)


def test_fire_on_hardware_that_forgets_one_event_finds_it_lost() -> None:
    with bench(FIRST) as made:
        signals: list[int] = []

        def signal() -> None:
            signals.append(1)
            if len(signals) != 7:
                made.deliver(FIRST)

        report = made.fire(signal)
        assert rules(report) == {Rule.LOST}
        assert report.violations[0].event == 7


def test_fire_on_eventfd_that_stays_readable_finds_it() -> None:
    with bench(FIRST) as made:
        assert rules(made.fire(lambda: made.deliver(FIRST), pending=1)) == {Rule.DUPLICATED}


def test_fire_while_held_waits_for_the_release() -> None:
    with bench(FIRST, HELD) as made:
        waiting: list[int] = []
        began = time.monotonic()

        def relax() -> None:
            # Longer than the patience, in which the event is lost unless holding is taken into account.
            if waiting and time.monotonic() - began > 0.3:
                made.write(SECOND)
                made.deliver(SECOND, waiting.pop())

        report = made.fire(lambda: waiting.append(1), events=1, relax=relax)
        assert report.totals == Totals(events=1, delivered=1)


def test_fire_bursts_that_coalesce_balance() -> None:
    with bench(FIRST) as made:
        pending = [0]

        def signal() -> None:
            pending[0] = 1

        def relax() -> None:
            made.deliver(FIRST, pending[0])
            pending[0] = 0

        report = made.fire(signal, events=200, burst=16, relax=relax)
        assert report.violations == []
        assert report.totals.events == 200
        assert 0 < report.totals.delivered < 100
        assert report.totals.coalesced == 200 - report.totals.delivered


def test_fire_bursts_of_which_the_last_event_is_forgotten_are_lost() -> None:
    with bench(FIRST) as made:
        signals: list[int] = []

        def signal() -> None:
            signals.append(1)
            if len(signals) == 1:
                made.deliver(FIRST)

        report = made.fire(signal, events=16, burst=16)
        assert rules(report) == {Rule.LOST}


def test_fire_stops_when_the_board_says_so() -> None:
    with bench(FIRST) as made:
        signals: list[int] = []

        def signal() -> None:
            signals.append(1)
            made.deliver(FIRST)
            if len(signals) == 100:
                made.board.say_stop()

        assert made.fire(signal, events=None).totals == Totals(events=100, delivered=100)


def test_fire_ahead_of_the_drivers_waits_for_them() -> None:
    with bench(FIRST) as made:
        made.events_per_change = 2
        signals: list[int] = []
        fired_when_waiting: list[int] = []

        def signal() -> None:
            signals.append(1)
            made.deliver(FIRST)

        def relax() -> None:
            if len(signals) > 2 * AHEAD and not fired_when_waiting:
                fired_when_waiting.append(len(signals))
                made.board.say_steps(0, 1000)

        assert made.fire(signal, events=500, relax=relax).totals == Totals(events=500, delivered=500)
        assert fired_when_waiting == [2 * (AHEAD + 1)]


def test_fire_with_one_seed_chooses_the_same_bursts() -> None:
    def bursts() -> list[int]:
        with bench(FIRST) as made:
            found, pending = [], [0]

            def signal() -> None:
                pending[0] += 1

            def relax() -> None:
                found.append(pending[0])
                made.deliver(FIRST, pending[0])
                pending[0] = 0

            made.fire(signal, events=200, burst=16, relax=relax)
            return [burst for burst in found if burst]

    assert bursts() == bursts()


# --- the process -------------------------------------------------------------------------------------------------


def deliver_all(made: Bench, fd: int, cell: int, stop: threading.Event) -> None:
    """Hardware in userspace: each count on the eventfd is one delivery."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while not stop.is_set():
        if poll.poll(10):
            made.deliver(cell, os.eventfd_read(fd))


def test_device_process_fires_and_reports() -> None:
    with bench(FIRST) as made:
        fd = os.eventfd(0, os.EFD_NONBLOCK)
        stop = threading.Event()
        hardware = threading.Thread(target=deliver_all, args=(made, fd, FIRST, stop))
        hardware.start()
        devices = DeviceProcess(made.plan(events=500, fd=fd, patience=10.0))
        try:
            report = devices.report(30)
            assert not devices.failed
        finally:
            devices.close()
            stop.set()
            hardware.join()
            os.close(fd)
        assert report == Report(Totals(events=500, delivered=500), [])


@pytest.mark.usefixtures("nothing_leaks")
def test_device_process_close_while_it_waits_leaves_nothing() -> None:
    with bench(FIRST) as made:
        fd = os.eventfd(0, os.EFD_NONBLOCK)
        devices = DeviceProcess(made.plan(fd=fd, patience=60.0))
        deadline = time.monotonic() + 20
        while not made.board.events() and time.monotonic() < deadline:
            os.sched_yield()
        assert made.board.events() == 1
        devices.close()
        devices.close()
        os.close(fd)


def test_device_process_that_dies_raises_at_the_report() -> None:
    with bench(FIRST) as made:
        fd = os.open("/dev/null", os.O_RDONLY)  # no eventfd: the write fails
        devices = DeviceProcess(made.plan(fd=fd))
        try:
            with pytest.raises(DevicesFailedError, match="status 1"):
                devices.report(30)
            assert devices.failed
        finally:
            devices.close()
            os.close(fd)


def test_device_process_that_does_not_report_in_time_raises() -> None:
    with bench(FIRST) as made:
        fd = os.eventfd(0, os.EFD_NONBLOCK)
        devices = DeviceProcess(made.plan(fd=fd, patience=60.0))
        try:
            with pytest.raises(DevicesFailedError, match="within"):
                devices.report(0.05)
        finally:
            devices.close()
            os.close(fd)


_PARENT = """
import os, sys
from irqrouter.proof.devices import DeviceProcess
from tests.proof.test_devices import FIRST, Bench
made = Bench(FIRST)
fd = os.eventfd(0, os.EFD_NONBLOCK)
devices = DeviceProcess(made.plan(fd=fd, patience=60.0))
while not made.board.events():
    os.sched_yield()
print(devices.pid, flush=True)
os._exit(0)
"""


def test_device_process_whose_parent_died_ends() -> None:
    parent = subprocess.run([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True, timeout=30, check=True)
    orphan = os.pidfd_open(int(parent.stdout)) if _alive(int(parent.stdout)) else None
    if orphan is not None:
        assert select.select([orphan], [], [], 20)[0] == [orphan]
        os.close(orphan)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True

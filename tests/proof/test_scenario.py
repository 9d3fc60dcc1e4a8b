"""Whole runs: the rules hold with the router as it is, and each way of breaking it is found."""

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import uvloop

from irqrouter.core.vectors import Vector
from irqrouter.errors import CallerError
from irqrouter.eventfd_loop import Router
from irqrouter.iommu.fault import Fault
from irqrouter.iommu_remap import Remapper, Scope, VtdRemapper
from irqrouter.kvm.port import Vm
from irqrouter.proof import scenario as scenario_module
from irqrouter.proof.board import Board
from irqrouter.proof.devices import Devices, DevicesFailedError, Plan
from irqrouter.proof.driver import IRTA, Driver, Wire
from irqrouter.proof.guest import Pairs
from irqrouter.proof.ledger import Rule, Totals
from irqrouter.proof.machine import KvmMachine, Machine, SimulatedMachine
from irqrouter.proof.scenario import Embedded, EscapedError, Progress, Scenario, Summary, prove
from irqrouter.x86.msi import Message

needs_kvm = pytest.mark.skipif(not Path("/dev/kvm").exists(), reason="there is no /dev/kvm")

SCENARIO = Scenario(
    vcpus=2, vectors=8, device_processes=2, drivers=2, seed=7, seconds=1.0, events_min=5000, invalidations_min=200,
    events_per_change=10, patience=10.0,
)  # fmt: skip

#: Short enough to find a loss soon, long against what an event takes.
IMPATIENT = msgspec.structs.replace(SCENARIO, patience=2.0, seconds=20.0)


@pytest.fixture(params=[pytest.param("kvm", marks=needs_kvm), "simulated"])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    with KvmMachine(2) if request.param == "kvm" else SimulatedMachine(2) as made:
        yield made


def unwatched(progress: Progress) -> None:
    del progress


def run(
    machine: Machine,
    scenario: Scenario = SCENARIO,
    loop: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop,
    watch: Callable[[Progress], None] = unwatched,
) -> Summary:
    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(prove(scenario, machine, watch))


def rules(summary: Summary) -> set[Rule]:
    return {violation.rule for violation in summary.violations}


@pytest.mark.parametrize("loop", [uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"])
def test_run_with_every_event_told_apart_keeps_every_rule(
    machine: Machine, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    seen: list[Progress] = []
    summary = run(machine, loop=loop, watch=seen.append)
    assert summary.violations == []
    assert summary.good
    assert summary.backend == machine.backend
    assert summary.totals.events >= 5000
    assert summary.totals.events == summary.totals.delivered + summary.totals.faults
    assert summary.invalidations >= 200
    assert min(summary.caught, summary.totals.faults, summary.totals.delivered) > 0
    assert [progress.events for progress in seen] == sorted(progress.events for progress in seen)
    assert seen[-1].vectors


@pytest.mark.usefixtures("nothing_leaks")
@pytest.mark.parametrize("make", [pytest.param(KvmMachine, marks=needs_kvm), SimulatedMachine])
@pytest.mark.parametrize("fails", [False, True])
def test_run_leaves_no_descriptor_thread_or_process(make: type[KvmMachine | SimulatedMachine], fails: bool) -> None:
    def watch(progress: Progress) -> None:
        if fails and progress.events:
            raise ZeroDivisionError

    scenario = msgspec.structs.replace(SCENARIO, events=2000)
    with make(2) as machine, pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        run(machine, scenario, watch=watch)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_run_with_bursts_keeps_every_rule(machine: Machine) -> None:
    summary = run(machine, msgspec.structs.replace(SCENARIO, burst=16))
    assert summary.violations == []
    assert summary.good
    assert summary.totals.coalesced > 0


def test_run_of_so_many_events_ends_after_exactly_those(machine: Machine) -> None:
    summary = run(machine, msgspec.structs.replace(SCENARIO, events=1001))
    assert summary.good
    assert summary.totals.events == 1001


# --- sabotage: a router, or a kernel, that breaks one rule. --------------------------------------------------------


class DeafToInvalidations(Router):
    def invalidate(self, scope: Scope) -> int:
        del scope
        return 0


class DeafToMasks(Router):
    def mask(self, vector: Vector) -> None:
        pass


class WithoutFaultRecord(Router):
    def __init__(self, vm: Vm, remapper: Remapper, *, on_fault: Callable[[Vector, Fault], None]) -> None:
        del on_fault
        super().__init__(vm, remapper, on_fault=lambda _vector, _fault: None)


class RecordsFaultsTwice(Router):
    def __init__(self, vm: Vm, remapper: Remapper, *, on_fault: Callable[[Vector, Fault], None]) -> None:
        def twice(vector: Vector, fault: Fault) -> None:
            on_fault(vector, fault)
            on_fault(vector, fault)

        super().__init__(vm, remapper, on_fault=twice)


@pytest.mark.parametrize(
    ("router", "rule"),
    [
        (DeafToInvalidations, Rule.STALE),
        (DeafToMasks, Rule.STALE),
        (WithoutFaultRecord, Rule.LOST),
        (RecordsFaultsTwice, Rule.DUPLICATED),
    ],
)
def test_run_with_router_that_breaks_a_rule_finds_it(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, router: type[Router], rule: Rule
) -> None:
    monkeypatch.setattr(scenario_module, "Router", router)
    summary = run(machine, IMPATIENT)
    assert rule in rules(summary)
    assert not summary.good


def test_run_with_deliveries_that_get_lost_finds_it(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    deliver, count = machine.vm.signal_msi, itertools.count()
    monkeypatch.setattr(machine.vm, "signal_msi", lambda message: 1 if next(count) == 20 else deliver(message))
    assert rules(run(machine, IMPATIENT)) == {Rule.LOST}


def test_run_with_deliveries_made_twice_finds_it(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    deliver, count = machine.vm.signal_msi, itertools.count()

    def twice(message: Message) -> int:
        if next(count) % 20 == 0:
            deliver(message)
            time.sleep(0.001)  # at once, the second would coalesce with the first in the IRR
        return deliver(message)

    monkeypatch.setattr(machine.vm, "signal_msi", twice)
    summary = run(machine, IMPATIENT)
    assert not summary.good
    assert Rule.DUPLICATED in rules(summary) or Rule.STALE in rules(summary) or summary.strays


def test_run_with_deliveries_to_somebody_else_finds_it(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    deliver = machine.vm.signal_msi

    def astray(message: Message) -> int:
        return deliver(Message(message.address, message.data & ~0xFF | 0xFE))  # 223 - 8 * 27: nobody's

    monkeypatch.setattr(machine.vm, "signal_msi", astray)
    assert rules(run(machine, IMPATIENT)) == {Rule.LOST}


def test_run_with_callback_that_raises_ends_with_that(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    class Raises(Router):
        def _turn(self) -> None:
            raise ZeroDivisionError

    monkeypatch.setattr(scenario_module, "Router", Raises)
    with pytest.raises(EscapedError) as caught:
        run(machine)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_run_with_verb_that_raises_ends_with_that(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    class Raises(Router):
        def unmask(self, vector: Vector) -> None:
            raise ZeroDivisionError(vector)

    monkeypatch.setattr(scenario_module, "Router", Raises)
    with pytest.raises(ZeroDivisionError):
        run(machine)


@needs_kvm
def test_run_whose_device_process_dies_ends_with_that(monkeypatch: pytest.MonkeyPatch) -> None:
    with KvmMachine(2) as machine:
        start = machine.devices

        def start_and_kill(plan: Plan, board: Board) -> Devices:
            devices = start(plan, board)
            devices.close()
            return devices

        monkeypatch.setattr(machine, "devices", start_and_kill)
        with pytest.raises(DevicesFailedError):
            run(machine)


@pytest.mark.parametrize("change", [{"device_processes": 9}, {"drivers": 0}, {"vectors": 0}, {"vcpus": 17}])
def test_run_that_cannot_be_is_refused(machine: Machine, change: dict[str, int]) -> None:
    with pytest.raises(CallerError):
        run(machine, msgspec.structs.replace(SCENARIO, **change))


@pytest.mark.parametrize("change", [{"strays": 1}, {"strays": -1}, {"wakeups_while_assigned": 1}])
def test_summary_is_not_good_with(change: dict[str, int]) -> None:
    summary = Summary(
        backend="kvm", seed=1, totals=Totals(events=1, delivered=1), strays=0, invalidations=1, steps=1,
        caught=1, wakeups=1, wakeups_while_assigned=0, seconds=1.0, violations=[],
    )  # fmt: skip
    assert summary.good
    assert not msgspec.structs.replace(summary, **change).good


def test_driver_with_one_seed_does_the_same_things(machine: Machine) -> None:
    async def drive(seed: str) -> bytes:
        with Board.create(8) as board:
            memory = machine.ram.memory()
            remapper = VtdRemapper(memory)
            remapper.set_interrupt_remap_table(IRTA)
            remapper.set_remapping(True)
            wires = [Wire(number, machine.eventfd(), requester=number) for number in range(8)]
            async with Router(machine.vm, remapper, on_fault=lambda _vector, _fault: None) as router:
                driver = Driver(Embedded(router), machine.ram, board, Pairs(2, 8), wires, seed)

                def work() -> None:
                    driver.populate()
                    for _ in range(200):
                        driver.step()

                await asyncio.to_thread(work)
            for wire in wires:
                machine.close_eventfd(wire.eventfd)
            memory.close()
            return bytes(board.cells) + bytes(machine.ram.table)

    first, same, other = (asyncio.run(drive(seed)) for seed in ("a", "a", "b"))
    assert first == same
    assert first != other

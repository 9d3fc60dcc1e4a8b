"""What ``irqrouter demo`` and ``irqrouter stress`` have in common: one run, watched, bounded, and judged."""

import argparse
import asyncio
import enum
import faulthandler
import functools
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Final

import msgspec
import structlog

from irqrouter.errors import KernelError
from irqrouter.proof.guest import Pairs
from irqrouter.proof.ledger import FAULT, HELD, Outcome, Rule, Violation
from irqrouter.proof.machine import KvmMachine, Machine, SimulatedMachine
from irqrouter.proof.routing import Opener
from irqrouter.proof.scenario import Progress, Scenario, Summary, embedded, prove

#: Without any progress for this long the process says where every thread is, and ends.
_WATCHDOG_S: Final = 60.0


class Loop(enum.Enum):
    """The event loop to run the router on."""

    UVLOOP = "uvloop"
    ASYNCIO = "asyncio"


class Result(msgspec.Struct, frozen=True):
    """The object that ``--json`` prints."""

    backend: str
    events: int
    delivered: int
    coalesced: int
    lost: int
    stale: int
    duplicated: int
    wakeups_while_assigned: int
    invalidations: int
    caught: int
    faults: int
    duration_s: float


def result(summary: Summary) -> Result:
    """``summary`` as ``--json`` prints it."""
    totals = summary.totals
    return Result(
        backend=summary.backend,
        events=totals.events,
        delivered=totals.delivered,
        coalesced=totals.coalesced,
        lost=totals.lost,
        stale=totals.stale,
        duplicated=summary.duplicated,
        wakeups_while_assigned=summary.wakeups_while_assigned,
        invalidations=summary.invalidations,
        caught=summary.caught,
        faults=totals.faults,
        duration_s=round(summary.seconds, 3),
    )


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """The options that both commands take."""
    parser.add_argument("--vcpus", type=positive, default=4, metavar="N", help="vCPUs of the guest (default: 4)")
    parser.add_argument(
        "--seed", type=int, default=1, metavar="N", help="decides every choice, not the timing (default: 1)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, all else on stderr")
    parser.add_argument("--simulated", action="store_true", help="run on the simulated kernel, not on /dev/kvm")
    parser.add_argument(
        "--loop",
        type=Loop,
        choices=list(Loop),
        default=Loop.UVLOOP,
        metavar="|".join(loop.value for loop in Loop),
        help="the event loop the router runs on (default: uvloop)",
    )


def positive(text: str) -> int:
    """An ``argparse`` type: a whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def seconds(text: str) -> float:
    """An ``argparse`` type: a duration above 0."""
    number = float(text)
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError("must be above 0")
    return number


def speaker(*, as_json: bool) -> Callable[[str], None]:
    """A function that says one line: on stdout, or on stderr where stdout is for the JSON object."""
    return functools.partial(print, file=sys.stderr if as_json else sys.stdout, flush=True)


def progress_line(progress: Progress, *, events: int | None = None) -> str:
    """How far the run has come, with the time left where the number of ``events`` is known."""
    rate = progress.events / progress.seconds
    left = ""
    if events is not None and progress.events:
        left = f" of {events:,}, {(events - progress.events) / rate:.0f} s left"
    return (
        f"{progress.seconds:5.1f} s: {progress.events:,} events{left} ({rate:,.0f}/s), "
        f"{progress.invalidations:,} invalidations, {progress.faults:,} faults, {progress.wakeups:,} wakeups"
    )


def open_machine(vcpus: int, *, simulated: bool, say: Callable[[str], None]) -> Machine:
    """The machine to run on, and a first line that says what it is."""
    if simulated:
        say("running on the simulated kernel, as asked: nothing below is the real KVM's word")
        return SimulatedMachine(vcpus)
    try:
        machine = KvmMachine(vcpus)
    except KernelError as error:
        say(f"running on the simulated kernel: /dev/kvm is not usable here ({error})")
        return SimulatedMachine(vcpus)
    say(f"running on /dev/kvm: a guest with {vcpus} vCPUs, split irqchip, x2APIC, VT-d interrupt remapping")
    return machine


def run_scenario(
    scenario: Scenario,
    machine: Machine,
    loop: Loop,
    watch: Callable[[Progress], None],
    *,
    watch_every: float,
    opener: Opener = embedded,
) -> Summary:
    """Run ``scenario`` on a fresh event loop, with an end to every wait."""
    with machine, _logs_on_stderr(), _quick_handover(), watchdog() as still_alive:

        def watched(progress: Progress) -> None:
            still_alive(progress)
            watch(progress)

        with asyncio.Runner(loop_factory=_factory(loop)) as runner:
            return runner.run(prove(scenario, machine, watched, watch_every=watch_every, opener=opener))


def judgement(summary: Summary, pairs: Pairs) -> list[str]:
    """The rules, one line each, and every violation that was quoted."""
    totals = summary.totals
    lines = [
        # An irqfd without a route (I4) takes events and drops them: that would be seen here.
        _line("I1", "nothing lost", totals.lost, f"{totals.events:,} events: {totals.delivered:,} delivered, "
              f"{totals.faults:,} recorded as faults, {totals.coalesced:,} coalesced"),
        _line("I2", "nothing stale", totals.stale, f"across {summary.invalidations:,} invalidations; "
              "nor anything while masked or removed (I7)"),
        _line("I3", "nothing twice", summary.duplicated,
              f"{summary.caught:,} caught and delivered by {summary.catcher}, the rest by KVM"),
        _line("I5", "no reach across", abs(summary.strays), "every interrupt that the guest counted is some vector's"),
    ]  # fmt: skip
    if summary.asleep:
        lines.append(_line("I6", "asleep while assigned", summary.wakeups_while_assigned, summary.asleep))
    lines += [describe(violation, pairs, summary.seed) for violation in summary.violations]
    if summary.strays:
        lines.append(f"STRAY: the counters differ from the books by {summary.strays:+,}; seed {summary.seed}")
    return lines


def describe(violation: Violation, pairs: Pairs, seed: int) -> str:
    """A violation in words: what happened, what should have, and how to run it again."""
    happened = {
        Rule.LOST: "nothing came of it",
        Rule.STALE: f"it became {_outcome(violation.outcome, pairs)}",
        Rule.DUPLICATED: f"there was one more: {_outcome(violation.outcome, pairs)}",
    }[violation.rule]
    entries = ", ".join(
        f"{number}{'*' if number == violation.acknowledged else ''}: {_outcome(outcome, pairs)}"
        for number, outcome in enumerate(violation.entries, violation.first)
    )
    return (
        f"{violation.rule.value.upper()}: vector {violation.vector}, event {violation.event}: {happened}.\n"
        f"  Entry {violation.acknowledged} was acknowledged when it was signalled; the newest is {violation.newest}.\n"
        f"  History: {entries}\n"
        f"  Seed {seed}."
    )


def _outcome(outcome: Outcome | None, pairs: Pairs) -> str:
    if outcome is None:
        return "a count left in the eventfd"
    if outcome == HELD:
        return "held"
    if outcome == FAULT:
        return "fault"
    vcpu, vector = pairs.pair(outcome)
    return f"vCPU {vcpu} vector {vector:02X}h"


def _line(name: str, rule: str, broken: int, detail: str) -> str:
    return f"{name} {rule:<22} {'ok' if not broken else f'BROKEN {broken:,} times':<4} {detail}"


def _factory(loop: Loop) -> Callable[[], asyncio.AbstractEventLoop]:
    if loop is Loop.ASYNCIO:
        return asyncio.new_event_loop
    import uvloop

    return uvloop.new_event_loop


@contextmanager
def _logs_on_stderr() -> Generator[None]:
    """Leave stdout to the command: structlog prints there unless told otherwise."""
    before = structlog.get_config()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    try:
        yield
    finally:
        structlog.configure(**before)


@contextmanager
def _quick_handover() -> Generator[None]:
    """Hand the interpreter lock over after 0.1 ms instead of 5.

    Here the guest's driver, the loop and the settler share one interpreter. In a VMM the driver is a guest, which needs
    no Python; with the default a busy driver thread would add milliseconds to every event that is caught.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0001)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextmanager
def watchdog() -> Generator[Callable[[Progress], None]]:
    """End the process, with every thread's stack on stderr, when there is no progress: no hang is possible."""
    last: Sequence[int] = ()

    def still_alive(progress: Progress) -> None:
        nonlocal last
        now = (progress.events, progress.invalidations, progress.faults)
        if now != last:
            last = now
            faulthandler.dump_traceback_later(_WATCHDOG_S, exit=True)

    faulthandler.dump_traceback_later(_WATCHDOG_S, exit=True)
    try:
        yield still_alive
    finally:
        faulthandler.cancel_dump_traceback_later()

"""``irqrouter demo``: the whole story on a real VM, in seconds."""

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

import msgspec

from irqrouter.core.machine import State
from irqrouter.errors import CallerError
from irqrouter.proof import command
from irqrouter.proof.driver import SLOTS
from irqrouter.proof.guest import Pairs
from irqrouter.proof.routing import Opener
from irqrouter.proof.scenario import Progress, Scenario, embedded
from irqrouter.proof.served import AgentKind, served
from irqrouter.proof.service import ServiceProcess
from irqrouter.x86.msi import CompatibilityAddress, CompatibilityData, Message

if TYPE_CHECKING:
    from rich.table import Table

_DESCRIPTION = """\
Starts a VM with a VT-d interrupt remapping table and devices that fire all the time, while the guest's driver moves,
masks, breaks and repairs the interrupts. Every event is followed to the vCPU and vector where the guest counted it.

What to look at: as long as nothing changes a vector is `assigned`, KVM delivers, and the loop sleeps. An invalidation
makes it `deassigned`; the next event is caught, retranslated and delivered, and the vector is assigned again.

With --service this process is a VMM: it has the VM, and an agent that acts on it. What an event becomes is decided by
`irqrouter serve` in a process beside it, as in production.
"""

_EPILOG = """\
Ends with the rules and whether they held; the exit status is 1 if one did not.

examples:
  irqrouter demo                     until 100,000 events and 1,000 invalidations, and 15 seconds
  irqrouter demo --seconds 60        for a minute
  irqrouter demo --events 1000000    for a million events
  irqrouter demo --simulated --json  without KVM, for a machine to read
  irqrouter demo --service           the same across two processes, with the agent in C in this one
"""

#: What the demo shows at least, unless told how long to run.
_EVENTS, _INVALIDATIONS, _SECONDS = 100_000, 1_000, 15.0

_COLOURS = {
    State.ASSIGNED: "green",
    State.DEASSIGNED: "yellow",
    State.MASKED: "blue",
    State.REMOVED: "dim",
}


# argparse has no public name for what add_subparsers() returns.
def add_parser(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",  # pyright: ignore[reportPrivateUsage]
) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "demo",
        help="the whole story on a real VM, in seconds",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    until = parser.add_mutually_exclusive_group()
    until.add_argument("--seconds", type=command.seconds, metavar="N", help="fire for this long")
    until.add_argument("--events", type=command.positive, metavar="N", help="fire this many events")
    parser.add_argument(
        "--devices", type=command.positive, default=4, metavar="N", help="devices, of 4 vectors each (default: 4)"
    )
    parser.add_argument(
        "--service",
        action="store_true",
        help="decide in a process of its own, `irqrouter serve`, for an agent in this one",
    )
    parser.add_argument(
        "--agent",
        type=AgentKind,
        choices=list(AgentKind),
        metavar="|".join(kind.value for kind in AgentKind),
        help="the agent, with --service (default: c)",
    )
    command.add_common_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0 if every rule held, 1 if not."""
    if args.agent and not args.service:
        raise CallerError("--agent", "needs --service: without one the router is in this process")
    if args.simulated and args.service:
        raise CallerError("--simulated", "excludes --service: the eventfds of a simulated kernel are in one process")
    scenario = Scenario(
        vcpus=args.vcpus,
        vectors=4 * args.devices,
        device_processes=1,
        drivers=1,
        seed=args.seed,
        events=args.events,
        seconds=args.seconds or (0.0 if args.events else _SECONDS),
        events_min=0 if args.seconds else _EVENTS,
        invalidations_min=0 if args.seconds else _INVALIDATIONS,
        events_per_change=50,
    )
    pairs = Pairs(scenario.vcpus, scenario.vectors)
    live = sys.stdout.isatty() and not args.json
    say = command.speaker(as_json=args.json)
    kind: AgentKind = args.agent or AgentKind.C
    with contextlib.ExitStack() as stack:
        opener: Opener = embedded
        if args.service:
            service = stack.enter_context(ServiceProcess())
            opener = functools.partial(served, service=service, kind=kind)
        machine = command.open_machine(scenario.vcpus, simulated=args.simulated, say=say)
        if args.service:
            say(f"an agent in {kind.value.capitalize()} acts in this process, `irqrouter serve` decides in another")
        watch = stack.enter_context(_table(scenario.vectors) if live else _lines(say))
        summary = command.run_scenario(
            scenario, machine, args.loop, watch, watch_every=0.2 if live else 2.0, opener=opener
        )
    for line in command.judgement(summary, pairs):
        say(line)
    if args.json:
        print(msgspec.json.encode(command.result(summary)).decode())
    return 0 if summary.good else 1


Watch = Callable[[Progress], None]


@contextlib.contextmanager
def _lines(say: Callable[[str], None]) -> Generator[Watch]:
    def watch(progress: Progress) -> None:
        say(command.progress_line(progress))

    yield watch


@contextlib.contextmanager
def _table(vectors: int) -> Generator[Watch]:
    """A live table on the terminal."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    with Live(refresh_per_second=10) as live:

        def watch(progress: Progress) -> None:
            live.update(Group(_rows(progress, vectors), Text(command.progress_line(progress))))

        yield watch


def _rows(progress: Progress, vectors: int) -> "Table":
    from rich.table import Column, Table

    left = (Column(name, no_wrap=True) for name in ("vector", "IRTE", "delivered to", "state"))
    right = (Column(name, no_wrap=True, justify="right") for name in ("invalidated", "caught", "faults", "last miss"))
    table = Table(*left, *right, box=None, pad_edge=False)
    by_number = {status.cookie // SLOTS: status for status in progress.vectors}
    for number in range(vectors):
        status = by_number.get(number)
        if status is None:
            table.add_row(str(number), "", "", f"[{_COLOURS[State.REMOVED]}]{State.REMOVED.value}")
            continue
        table.add_row(
            str(number),
            f"{status.cookie:#x}",
            destination(status.route),
            f"[{_COLOURS[status.state]}]{status.state.value}",
            f"{status.invalidations:,}",
            f"{status.caught:,}",
            f"{status.faults:,}",
            "" if status.last_miss_us is None else f"{status.last_miss_us:,.0f} µs",
        )
    return table


def destination(route: Message | None) -> str:
    """``vCPU 2, 45h``: where the route that the kernel last accepted leads.

    A logical destination is one bit of a cluster of 16 (SDM Vol. 3A, 11.12.10.2): the driver makes no others.
    """
    if route is None:
        return ""
    address, data = CompatibilityAddress.decode(route.address), CompatibilityData.decode(route.data)
    apic_id = address.destination_31_8 << 8 | address.destination
    if address.dm:
        apic_id = (apic_id >> 16 << 4) + (apic_id & 0xFFFF).bit_length() - 1
    return f"vCPU {apic_id}, {data.vector:02X}h"

"""``irqrouter top``: what a running service does, live."""

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING

import msgspec

from irqrouter.cli.status import add_admin_socket, duration, state_of
from irqrouter.service.admin_client import AdminClient, connected
from irqrouter.service.status import VectorReport, VmStatus

if TYPE_CHECKING:
    from rich.table import Table

_DESCRIPTION = """\
A table that follows the service: every VM, or one VM's vectors, the busiest first. Columns that end in /s are rates
since the look before; while vectors are assigned their events do not pass through here, and are not counted.
"""

_EPILOG = """\
examples:
  irqrouter top                        every VM, once a second; ends with Ctrl-C
  irqrouter top guest-1                the busiest vectors of one VM
  irqrouter top --interval 0.2         five times a second
  irqrouter top guest-1 --once         two looks, one interval apart, one table: for a pipe
"""

#: Without a terminal there is no height to fit in.
_ROWS_WITHOUT_TERMINAL = 1 << 16


class Row(msgspec.Struct, frozen=True):
    """One line: what it is about, its cells, and counters from which rates are made."""

    key: str
    cells: list[str]
    counters: list[int]


class Look(msgspec.Struct, frozen=True):
    """What the service said at one moment."""

    time_s: float
    title: str
    head: list[str]
    rates: list[str]
    rows: list[Row]


# argparse has no public name for what add_subparsers() returns.
def add_parser(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",  # pyright: ignore[reportPrivateUsage]
) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "top",
        help="a live table of VMs, or of one VM's vectors",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("vm", nargs="?", metavar="VM", help="show this VM's vectors")
    parser.add_argument(
        "--interval", type=_interval, default=1.0, metavar="S", help="seconds between looks (default: 1)"
    )
    parser.add_argument("--once", action="store_true", help="print one table and end")
    add_admin_socket(parser)


def run(args: argparse.Namespace) -> int:
    """Show the table until interrupted."""
    return asyncio.run(_run(args))


def _interval(text: str) -> float:
    number = float(text)
    if not 0.05 <= number <= 3600:
        raise argparse.ArgumentTypeError("must be 0.05 to 3600")
    return number


async def _run(args: argparse.Namespace) -> int:
    from rich.console import Console

    # A pipe has no width of its own, and lines cut off there would be lost.
    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 200)
    async with connected(args.admin_socket) as service:
        look = _looks_at(service, args.vm)
        before = await look()
        if args.once or not console.is_terminal:
            await asyncio.sleep(args.interval)
            console.print(_table(before, await look(), _ROWS_WITHOUT_TERMINAL))
            return 0
        from rich.live import Live

        with Live(console=console, auto_refresh=False, screen=True) as live:
            while True:
                after = await look()
                live.update(_table(before, after, console.height - 4), refresh=True)
                before = after
                await asyncio.sleep(args.interval)


def _looks_at(service: AdminClient, vm: str | None) -> Callable[[], Coroutine[None, None, Look]]:
    async def at_vms() -> Look:
        vms = await service.vms()
        title = f"{len(vms)} VMs, {sum(each.vectors for each in vms)} vectors"
        return Look(time.monotonic(), title, _VM_HEAD, _VM_RATES, [_vm_row(each) for each in vms])

    async def at_vectors(name: str) -> Look:
        reports = await service.vectors(name)
        title = f"VM {name}, {len(reports)} vectors"
        return Look(time.monotonic(), title, _VECTOR_HEAD, _VECTOR_RATES, [_vector_row(each) for each in reports])

    return at_vms if vm is None else lambda: at_vectors(vm)


_VM_HEAD = ["VM", "PID", "attached", "vectors", "assigned", "prepared", "deassigned", "masked", "faults"]
_VM_RATES = ["operations/s", "wakeups/s", "doorbells/s", "stale/s"]
_VECTOR_HEAD = ["vector", "state", "message", "route", "last catch", "caught", "faults"]
_VECTOR_RATES = ["caught/s", "invalidations/s", "faults/s", "stale/s"]


def _vm_row(vm: VmStatus) -> Row:
    cells = [
        vm.name,
        str(vm.pid),
        duration(vm.attached_s),
        str(vm.vectors),
        str(vm.assigned),
        str(vm.prepared),
        str(vm.deassigned - vm.prepared),
        str(vm.masked),
        f"{vm.faults:,}",
    ]
    return Row(vm.name, cells, [vm.operations, vm.wakeups, vm.doorbells, vm.stale])


def _vector_row(report: VectorReport) -> Row:
    cells = [
        str(report.vector),
        state_of(report),
        report.message.describe(),
        report.route.describe() if report.route else "-",
        "-" if report.last_catch_us is None else f"{report.last_catch_us:.0f} us",
        f"{report.caught:,}",
        f"{report.faults:,}",
    ]
    return Row(str(report.vector), cells, [report.caught, report.invalidations, report.faults, report.stale])


def _table(before: Look, after: Look, most: int) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    seconds = max(after.time_s - before.time_s, 1e-3)
    former = {row.key: row.counters for row in before.rows}
    rated = [(row, _rates(former.get(row.key, row.counters), row.counters, seconds)) for row in after.rows]
    rated.sort(key=lambda each: -sum(each[1]))  # stable: those that are idle stay in their order
    title = after.title + (f", the busiest {most}" if len(rated) > most else "")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for at, name in enumerate([*after.head, *after.rates]):
        table.add_column(name, justify="right" if at else "left", no_wrap=True)
    for row, rates in rated[: max(most, 1)]:
        table.add_row(*row.cells, *(f"{rate:,.0f}" if rate else "." for rate in rates))
    return table


def _rates(before: Sequence[int], after: Sequence[int], seconds: float) -> list[float]:
    """Counts in a second. A counter that fell has begun anew, or has passed 2^32: what it lost is not shown."""
    return [max(0, now - then) / seconds for then, now in zip(before, after, strict=True)]

"""``irqrouter status``: what a running service serves, once."""

import argparse
import asyncio
import os
from collections.abc import Sequence

import msgspec

from irqrouter.service.admin import ServiceStatus
from irqrouter.service.admin_client import AdminError, connected
from irqrouter.service.config import DEFAULT_ADMIN_SOCKET
from irqrouter.service.status import VectorReport, VmStatus
from irqrouter.x86.msi import bdf

_DESCRIPTION = """\
Asks the running service: about itself and every attached VM, about one VM and its vectors, or about one vector.
"""

_EPILOG = """\
a vector's states:
  assigned     KVM delivers its events; nothing in userspace wakes up
  prepared     deassigned, and the agent holds the decision for the next event
  deassigned   events wait for the service to translate them
  masked       events stay pending until the guest unmasks it

examples:
  irqrouter status                   the service, and its VMs
  irqrouter status guest-1           one VM and its vectors
  irqrouter status guest-1 5         one vector, with what it was translated to
  irqrouter status --json            for a machine to read
"""


class Overview(msgspec.Struct, frozen=True):
    """What ``status --json`` prints."""

    service: ServiceStatus
    vms: list[VmStatus]


class VmDetails(msgspec.Struct, frozen=True):
    """What ``status VM --json`` prints."""

    vm: VmStatus
    vectors: list[VectorReport]


# argparse has no public name for what add_subparsers() returns.
def add_parser(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",  # pyright: ignore[reportPrivateUsage]
) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "status",
        help="what a running service serves: VMs, vectors, counters",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("vm", nargs="?", metavar="VM", help="the VM's name")
    parser.add_argument("vector", nargs="?", type=vector_number, metavar="VECTOR", help="the vector's number")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_admin_socket(parser)


def run(args: argparse.Namespace) -> int:
    """Print what the service answers."""
    return asyncio.run(_run(args))


def add_admin_socket(parser: argparse.ArgumentParser) -> None:
    """The option that every command which asks a service takes."""
    parser.add_argument(
        "--admin-socket",
        default=DEFAULT_ADMIN_SOCKET,
        metavar="PATH",
        help=f"where the service listens (default: {DEFAULT_ADMIN_SOCKET})",
    )


def vector_number(text: str) -> int:
    """An ``argparse`` type: a vector's number."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return number


def state_of(report: VectorReport) -> str:
    """The vector's state in a word: one that is prepared is deassigned, and more."""
    return "prepared" if report.prepared and report.state == "deassigned" else report.state


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """``rows`` under ``head``, in columns: the first to the left, as it is a name, the others to the right."""
    widths = [max(len(row[at]) for row in (head, *rows)) for at in range(len(head))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in (head, *rows)
    ]


def duration(seconds: float) -> str:
    """``3 d 4 h``, ``4 h 12 min``, ``12 min 5 s``, ``5 s``."""
    whole = int(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


async def _run(args: argparse.Namespace) -> int:
    answer: Overview | VmDetails | VectorReport
    async with connected(args.admin_socket) as service:
        if args.vector is not None:
            answer = await service.vector(args.vm, args.vector)
            lines = _vector_lines(answer)
        elif args.vm is not None:
            vectors = await service.vectors(args.vm)
            found = [vm for vm in await service.vms() if vm.name == args.vm]
            if not found:
                raise AdminError(f"VM {args.vm}", "has just been detached")
            answer = VmDetails(found[0], vectors)
            lines = _vm_lines(answer)
        else:
            answer = Overview(await service.status(), await service.vms())
            lines = _overview_lines(answer)
    print(msgspec.json.format(msgspec.json.encode(answer)).decode() if args.json else "\n".join(lines))
    return 0


def _overview_lines(overview: Overview) -> list[str]:
    service = overview.service
    lines = [
        f"irqrouter {service.version}, process {service.pid}, up {duration(service.uptime_s)}, on {service.loop}",
        f"configuration {service.config or 'built in'}, log level {service.log_level}",
        f"{service.listeners} following what happens",
        "",
    ]
    if not overview.vms:
        return [*lines, "no VM is attached"]
    rows = [
        [
            vm.name,
            str(vm.pid),
            duration(vm.attached_s),
            vm.remapper,
            str(vm.vectors),
            str(vm.assigned),
            str(vm.prepared),
            str(vm.deassigned - vm.prepared),
            str(vm.masked),
            f"{vm.operations:,}",
            f"{vm.stale:,}",
            f"{vm.faults:,}",
        ]
        for vm in overview.vms
    ]
    head = ["VM", "PID", "ATTACHED", "REMAPPER", "VECTORS", "ASSIGNED", "PREPARED", "DEASSIGNED", "MASKED"]
    return [*lines, *table([*head, "OPERATIONS", "STALE", "FAULTS"], rows)]


def _vm_lines(details: VmDetails) -> list[str]:
    vm = details.vm
    lines = [
        f"VM {vm.name}, process {vm.pid} of user {vm.uid}, attached {duration(vm.attached_s)} ago",
        f"remapper {vm.remapper}, features {', '.join(vm.features) or 'none'}",
        f"{vm.regions} memory regions, {vm.descriptors} descriptors",
        f"{vm.frames:,} frames with {vm.bytes:,} bytes received",
        f"{vm.operations:,} operations sent, {vm.stale:,} stale, {vm.faults:,} faults",
        f"woken {vm.doorbells:,} times by the doorbell, {vm.wakeups:,} times by eventfds",
        "",
    ]
    if not details.vectors:
        return [*lines, "no vectors"]
    rows = [
        [
            str(each.vector),
            bdf(each.requester),
            str(each.gsi),
            state_of(each),
            each.message.describe(),
            each.route.describe() if each.route else "-",
            f"{each.invalidations:,}",
            f"{each.caught:,}",
            f"{each.faults:,}",
            "-" if each.last_catch_us is None else f"{each.last_catch_us:.0f} us",
            _refusal(each.refused) or "-",
        ]
        for each in details.vectors
    ]
    head = ["VECTOR", "DEVICE", "GSI", "STATE", "MESSAGE", "ROUTE", "INVALIDATED", "CAUGHT", "FAULTS", "LAST CATCH"]
    return [*lines, *table([*head, "REFUSED"], rows)]


def _vector_lines(report: VectorReport) -> list[str]:
    refused = _refusal(report.refused)
    facts = [
        ("state", state_of(report)),
        ("device", bdf(report.requester)),
        ("GSI", str(report.gsi)),
        ("generation", str(report.generation)),
        ("message", f"{report.message.describe()}, as the guest gave it to the device"),
        ("route", report.route.describe() if report.route else "not translated yet"),
        ("invalidated by", "everything only" if report.cookie > 0xFFFF else f"cookie {report.cookie:#x}"),
        ("invalidations", f"{report.invalidations:,}"),
        ("caught", f"{report.caught:,} events taken in userspace and delivered"),
        ("faults", f"{report.faults:,} events blocked"),
        ("stale", f"{report.stale:,} operations came late"),
        ("discarded", f"{report.discarded:,} counts that KVM had injected"),
        ("last catch", "none yet" if report.last_catch_us is None else f"{report.last_catch_us:.1f} us"),
        ("refused", f"KVM refused this route: {refused}" if refused else "nothing"),
    ]
    widest = max(len(name) for name, _ in facts)
    return [f"VM {report.vm}, vector {report.vector}", *(f"  {name:<{widest}}  {value}" for name, value in facts)]


def _refusal(number: int) -> str:
    return os.strerror(number) if number else ""

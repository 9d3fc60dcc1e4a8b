"""``python -m bench``."""

import argparse
import asyncio
import contextlib
import os
import resource
import sys
from collections.abc import Collection, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Final, get_args

import msgspec
import uvloop

from bench import report
from bench.floor import Floor, FloorError
from bench.scale import Crowd, Scale, scale
from bench.vms import ColdServedVm, RoutedVm, ServedVm
from bench.workloads import GAP_S, RUN, Times, Workload, attach, miss, selective, steady
from irqrouter.errors import IrqrouterError
from irqrouter.proof.service import ServiceProcess

_CROWD: Final = Crowd(vms=64, vectors=256, idle_s=5.0, rounds=300)
_QUICK_CROWD: Final = Crowd(vms=2, vectors=8, idle_s=0.1, rounds=6)

_DESCRIPTION = """\
Compares irqrouter, on real VMs, with the bare system calls in C ("floor") and with what QEMU's algorithm asks of the
kernel ("peer"). All take turns, iteration by iteration, after equal idle gaps. "embedded" is the router in this
process; "service" is the agent in C in this process, with `irqrouter serve` in a process of its own.

  steady      signalling an eventfd whose irqfd is assigned: with the router attached, and without one
  selective   an invalidation of one table entry among n, as the VMM's thread sees it: per entry in a run of eight
              ("embedded", "service"), and of a single one ("embedded-idle", "service-idle"); "service-apart" is
              "service" with one CPU for the service alone, and the others for everybody else here
                floor: KVM_IRQFD deassign       peer: KVM_SET_GSI_ROUTING with all n routes, twice
  miss        from the signal on a deassigned eventfd to the MSI injected, everybody having slept
                floor: a C thread in epoll_wait, then read and KVM_SIGNAL_MSI
              on uvloop ("embedded"), on the stdlib's loop ("embedded-asyncio"), by an agent that was told before
              ("service"), and by one that the service tells only then ("service-cold")
  attach      adding n vectors until all are assigned
                floor: KVM_SET_GSI_ROUTING once, KVM_IRQFD for each
  scale       many VMs on one service: its memory, its CPU time at rest, and miss there
                floor: miss on a service with a single VM

The VMs' vCPUs exist, with local APICs that accept interrupts; they do not run.
"""

_EPILOG = """\
Ratios mean more than times: they are taken pair by pair, and their median is given. A ratio below 1 says that ours is
the cheaper. The bars are what the ratios are held against; on a machine that is busy with other things they
may be missed, which is an error only with --strict. docs/benchmarks.md tells how to read the table.

Needs /dev/kvm and a C compiler (cc, or what CC names).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0, or 1 where a bar was missed and --strict given, or 2 where the benchmark could not run."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a few iterations, for tests: the figures mean nothing")
    parser.add_argument(
        "--only",
        choices=get_args(Workload),
        action="append",
        metavar="WORKLOAD",
        help="this workload; may be given several times (default: all)",
    )
    parser.add_argument("--strict", action="store_true", help="exit with status 1 if a bar is missed")
    parser.add_argument(
        "--build",
        type=Path,
        default=Path("build"),
        metavar="DIR",
        help="for floor.so and bench.json (default: build)",
    )
    options = parser.parse_args(arguments)
    try:
        floor = Floor(options.build)
        _raise_descriptor_limit()
        times, scaled = _measure(floor, options.only or get_args(Workload), quick=options.quick)
    except (FloorError, IrqrouterError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    whole = report.report([report.Row.of(each) for each in times], scaled, gap_s=GAP_S)
    file: Path = options.build / "bench.json"
    file.write_bytes(msgspec.json.format(msgspec.json.encode(whole)) + b"\n")
    print(report.table(whole))
    print(f"\nwritten to {file}")
    return int(options.strict and not all(bar.met for bar in whole.bars))


def _measure(floor: Floor, wanted: Collection[Workload], *, quick: bool) -> tuple[list[Times], Scale | None]:
    rounds = 6 if quick else 300
    times: list[Times] = []
    scaled: Scale | None = None
    on_uvloop = partial(RoutedVm, new_event_loop=uvloop.new_event_loop)
    on_asyncio = partial(RoutedVm, new_event_loop=asyncio.SelectorEventLoop)
    if "steady" in wanted:
        _say("steady")
        times.append(steady(floor, uvloop.new_event_loop, rounds=rounds))
    with ServiceProcess() as service:
        service.start()
        served, served_cold = partial(ServedVm, path=service.path), partial(ColdServedVm, path=service.path)
        for n in _routes(quick=quick) if "selective" in wanted else ():
            _say(f"selective, n={n}")
            times += [
                selective(floor, on_uvloop, n=n, mode="embedded", run=RUN, rounds=rounds),
                selective(floor, on_uvloop, n=n, mode="embedded-idle", run=1, rounds=rounds),
            ]
            _say(f"selective, n={n}, with a service")
            times += [
                selective(floor, served, n=n, mode="service", run=RUN, rounds=rounds),
                selective(floor, served, n=n, mode="service-idle", run=1, rounds=rounds),
            ]
            with _apart(service) as apart:
                if apart:
                    times.append(selective(floor, served, n=n, mode="service-apart", run=RUN, rounds=rounds))
        if "miss" in wanted:
            _say("miss")
            times += [
                miss(floor, on_uvloop, mode="embedded", rounds=rounds),
                miss(floor, on_asyncio, mode="embedded-asyncio", rounds=rounds),
            ]
            _say("miss, with a service")
            times += [
                miss(floor, served, mode="service", rounds=rounds),
                miss(floor, served_cold, mode="service-cold", rounds=rounds),
            ]
        if "attach" in wanted:
            _say("attach")
            n, attachings = (16, 2) if quick else (1024, 30)
            times += [
                attach(floor, on_uvloop, n=n, mode="embedded", rounds=attachings),
                attach(floor, served, n=n, mode="service", rounds=attachings),
            ]
        service.check()
    if "scale" in wanted:
        _say("scale")
        scaled, caught = scale(floor, _QUICK_CROWD if quick else _CROWD)
        times += caught
    return times, scaled


@contextlib.contextmanager
def _apart(service: ServiceProcess) -> Generator[bool]:
    """The service has a CPU that no thread of ours uses; False where there is only one."""
    cpus = os.sched_getaffinity(0)
    alone = {max(cpus)}
    if len(cpus) == 1:
        yield False
        return
    os.sched_setaffinity(service.pid, alone)
    os.sched_setaffinity(0, cpus - alone)  # and so for the threads that are started meanwhile
    try:
        yield True
    finally:
        os.sched_setaffinity(0, cpus)
        os.sched_setaffinity(service.pid, cpus)


def _routes(*, quick: bool) -> tuple[int, ...]:
    return (64,) if quick else (64, 1024, 4000)


def _say(what: str) -> None:
    print(f"bench: {what}", file=sys.stderr, flush=True)


def _raise_descriptor_limit() -> None:
    """4000 sources take four descriptors each: ours, our duplicate, the floor's and the peer's."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main())

"""``python -m bench``."""

import argparse
import asyncio
import resource
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import uvloop

from bench import report
from bench.floor import Floor, FloorError
from bench.workloads import GAP_S, RUN, Times, miss, selective, steady
from irqrouter.errors import IrqrouterError

_DESCRIPTION = """\
Compares the router, on real VMs, with the bare system calls in C ("floor") and with what QEMU's algorithm asks of the
kernel ("peer"). All run in one process and take turns, iteration by iteration, after equal idle gaps.

  steady      signalling an eventfd whose irqfd is assigned: with the router attached, and without one
  selective   Router.invalidate() of one table entry among n, as the VMM's thread sees it: per entry in a run of eight
              ("embedded"), and of a single one ("embedded-idle")
                floor: KVM_IRQFD deassign       peer: KVM_SET_GSI_ROUTING with all n routes, twice
  miss        from the signal on a deassigned eventfd to the MSI injected, the loop having slept
                floor: a C thread in epoll_wait, then read and KVM_SIGNAL_MSI
              on uvloop ("embedded") and on the stdlib's loop ("embedded-asyncio")

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
        rows = [report.Row.of(times) for times in _measure(floor, quick=options.quick)]
    except (FloorError, IrqrouterError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    whole = report.report(rows, gap_s=GAP_S)
    file: Path = options.build / "bench.json"
    file.write_bytes(msgspec.json.format(msgspec.json.encode(whole)) + b"\n")
    print(report.table(whole))
    print(f"\nwritten to {file}")
    return int(options.strict and not all(bar.met for bar in whole.bars))


def _measure(floor: Floor, *, quick: bool) -> Iterator[Times]:
    rounds = 6 if quick else 300
    _say("steady")
    yield steady(floor, uvloop.new_event_loop, rounds=rounds)
    for n in (64,) if quick else (64, 1024, 4000):
        _say(f"selective, n={n}")
        yield selective(floor, uvloop.new_event_loop, n=n, mode="embedded", run=RUN, rounds=rounds)
        yield selective(floor, uvloop.new_event_loop, n=n, mode="embedded-idle", run=1, rounds=rounds)
    _say("miss")
    yield miss(floor, uvloop.new_event_loop, mode="embedded", rounds=rounds)
    _say("miss, on the stdlib's loop")
    yield miss(floor, asyncio.SelectorEventLoop, mode="embedded-asyncio", rounds=rounds)


def _say(what: str) -> None:
    print(f"bench: {what}", file=sys.stderr, flush=True)


def _raise_descriptor_limit() -> None:
    """4000 sources take four descriptors each: ours, the router's duplicate, the floor's and the peer's."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main())

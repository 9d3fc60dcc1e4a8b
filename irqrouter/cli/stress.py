"""``irqrouter stress``: events against invalidations, masks, retargets and removals, on a real VM."""

import argparse

import msgspec

from irqrouter.proof import command
from irqrouter.proof.guest import GUEST_VECTORS, Pairs
from irqrouter.proof.scenario import Progress, Scenario

_DESCRIPTION = """\
Device processes fire at many vectors while several threads retarget, invalidate (one entry, many, all), mask, break,
reprogram, remove and add them. Each event is followed to where the guest counted it.

By default every vector has one event outstanding at most (a handshake): each is told from every other, and must come
out exactly once, by a translation that was valid at or after it. With --free, devices fire bursts without waiting:
events may coalesce, and what is checked is that there are never more deliveries than events and that one comes after
the last of each burst.
"""

_EPILOG = """\
The first broken rule ends the run with the vector, the event, the end of the vector's history, and the seed. The exit
status is then 1. The seed decides every choice of the drivers and devices; the timing is the machine's.

examples:
  irqrouter stress --events 1000000 --seed 1
  irqrouter stress --events 1000000 --seed 1 --free
  irqrouter stress --events 100000 --vectors 16 --events-per-change 2
"""


# argparse has no public name for what add_subparsers() returns.
def add_parser(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",  # pyright: ignore[reportPrivateUsage]
) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "stress",
        help="events against invalidations, on a real VM; the first broken rule ends it",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--events", type=command.positive, default=1_000_000, metavar="N", help="fire this many (default: 1000000)"
    )
    parser.add_argument(
        "--vectors",
        type=command.positive,
        default=64,
        metavar="N",
        help=f"interrupt sources, at most {len(GUEST_VECTORS)} (default: 64)",
    )
    parser.add_argument("--free", action="store_true", help="fire bursts without waiting for each event")
    parser.add_argument(
        "--devices", type=command.positive, default=2, metavar="N", help="device processes (default: 2)"
    )
    parser.add_argument(
        "--drivers", type=command.positive, default=2, metavar="N", help="threads of the guest's driver (default: 2)"
    )
    parser.add_argument(
        "--events-per-change",
        type=command.positive,
        default=20,
        metavar="N",
        help="one change for every N events; with 1 hardly a vector stays assigned (default: 20)",
    )
    command.add_common_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the stress; 0 if every rule held, 1 if not."""
    scenario = Scenario(
        vcpus=args.vcpus,
        vectors=args.vectors,
        device_processes=args.devices,
        drivers=args.drivers,
        seed=args.seed,
        events=args.events,
        burst=16 if args.free else 1,
        events_per_change=args.events_per_change,
    )
    pairs = Pairs(scenario.vcpus, scenario.vectors)
    say = command.speaker(as_json=args.json)

    def watch(progress: Progress) -> None:
        say(command.progress_line(progress, events=args.events))

    machine = command.open_machine(scenario.vcpus, simulated=args.simulated, say=say)
    summary = command.run_scenario(scenario, machine, args.loop, watch, watch_every=5.0)
    for line in command.judgement(summary, pairs):
        say(line)
    if args.json:
        print(msgspec.json.encode(command.result(summary)).decode())
    return 0 if summary.good else 1

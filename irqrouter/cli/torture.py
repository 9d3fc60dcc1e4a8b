"""``irqrouter torture``: the service is killed again and again, and no interrupt may notice."""

import argparse

import msgspec

from irqrouter.errors import CallerError
from irqrouter.proof import command
from irqrouter.proof.chaos import Intent
from irqrouter.proof.guest import GUEST_VECTORS, Pairs
from irqrouter.proof.machine import KvmMachine
from irqrouter.proof.scenario import Progress, Scenario
from irqrouter.proof.served import AgentKind
from irqrouter.proof.service import COMMAND, ServiceProcess
from irqrouter.proof.torture import Result, Torture

_DESCRIPTION = """\
Runs a VM on KVM whose interrupts are routed by an agent in the VMM and a service beside it (`irqrouter serve`), as in
production, and kills the service with `kill -9` at random moments, again and again, starting it again at once.
Meanwhile devices fire, and the guest's driver retargets, invalidates (one entry, many, all), masks, breaks, reprograms,
removes and adds. Each event is followed to where the guest counted it: with or without a service, none may be lost, go
by an invalidated translation, or come twice.

With --stop the service is not killed but stopped (`kill -STOP`) for some seconds: alive, and silent. That is where a
vCPU could hang. No invalidation may wait for the service longer than the deadline.
"""

_EPILOG = """\
The first broken rule ends the run with the vector, the event, the end of the vector's history, and the seed. The exit
status is then 1. The seed decides the moments and every choice of the drivers and devices; the rest of the timing is
the machine's. docs/torture.md tells how to read the figures.

examples:
  irqrouter torture                              200 kills, some minutes
  irqrouter torture --kills 20                   a quick look
  irqrouter torture --stop 3                     stopped for 3 seconds, 10 times
  irqrouter torture --stop 1 --stops 5 --kills 50    a mix, in an order of the seed's
  irqrouter torture --agent python --kills 20    the other agent
  irqrouter torture --events-per-change 2        hardly anything stays assigned
"""

_KILLS, _STOPS = 200, 10


# argparse has no public name for what add_subparsers() returns.
def add_parser(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",  # pyright: ignore[reportPrivateUsage]
) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "torture",
        help="kill the service again and again, on a real VM; no interrupt may notice",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--kills", type=_count, metavar="N", help=f"kill -9 so often (default: {_KILLS}; with --stop: 0)"
    )
    parser.add_argument(
        "--stop", type=command.seconds, metavar="SECONDS", help="stop the service for so long at a time"
    )
    parser.add_argument(
        "--stops", type=command.positive, metavar="N", help=f"so often, with --stop (default: {_STOPS})"
    )
    parser.add_argument(
        "--agent",
        type=AgentKind,
        choices=list(AgentKind),
        default=AgentKind.C,
        metavar="|".join(kind.value for kind in AgentKind),
        help="the VMM's agent (default: c)",
    )
    parser.add_argument("--vcpus", type=command.positive, default=4, metavar="N", help="vCPUs (default: 4)")
    parser.add_argument(
        "--vectors",
        type=command.positive,
        default=32,
        metavar="N",
        help=f"interrupt sources, at most {len(GUEST_VECTORS)} (default: 32)",
    )
    parser.add_argument(
        "--events-per-change",
        type=command.positive,
        default=20,
        metavar="N",
        help="one change for every N events (default: 20)",
    )
    parser.add_argument(
        "--deadline",
        type=command.seconds,
        default=50.0,
        metavar="MS",
        help="how long an invalidation may wait for the service, in ms (default: 50)",
    )
    parser.add_argument(
        "--patience",
        type=command.seconds,
        default=30.0,
        metavar="SECONDS",
        help="an event is lost when nothing came of it for so long; above any time without a service (default: 30)",
    )
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="decides every choice and moment (default: 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, all else on stderr")
    parser.set_defaults(service=COMMAND)


def run(args: argparse.Namespace) -> int:
    """Run the torture; 0 if every rule held, 1 if not."""
    if args.stops and not args.stop:
        raise CallerError("--stops", "needs --stop, which says for how long")
    stops = (args.stops or _STOPS) if args.stop else 0
    kills = args.kills if args.kills is not None else 0 if args.stop else _KILLS
    intent = Intent(kills=kills, stops=stops, stop_s=args.stop or 0.0, seed=args.seed)
    scenario = Scenario(
        vcpus=args.vcpus,
        vectors=args.vectors,
        device_processes=1,
        drivers=min(2, args.vectors),
        steady_drivers=1,  # the other one waits when it adds a vector, and the service is stopped
        seed=args.seed,
        events_per_change=args.events_per_change,
        patience=args.patience + intent.stop_s,
    )
    pairs = Pairs(scenario.vcpus, scenario.vectors)
    say = command.speaker(as_json=args.json)
    with ServiceProcess(args.service) as service:
        torture = Torture(intent, service, args.agent, deadline_ms=args.deadline)
        machine = KvmMachine(scenario.vcpus)
        say(
            f"running on /dev/kvm: a guest with {scenario.vcpus} vCPUs and {scenario.vectors} vectors, "
            f"an agent in {args.agent.value.capitalize()}, and `irqrouter serve`"
        )
        summary = command.run_scenario(
            scenario,
            machine,
            command.Loop.UVLOOP,
            lambda progress: say(_progress_line(progress, torture)),
            watch_every=5.0,
            opener=torture.opener,
        )
    result = torture.result(summary)
    for line in [*command.judgement(summary, pairs), _waiting_line(result)]:
        say(line)
    if args.json:
        print(msgspec.json.encode(result).decode())
    return 0 if summary.good and not result.over_deadline else 1


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return number


def _progress_line(progress: Progress, torture: Torture) -> str:
    """How far the torture has come, and the time left at the pace so far."""
    blows, dealt = torture.intent.kills + torture.intent.stops, torture.dealt
    left = f", {progress.seconds / dealt * (blows - dealt):.0f} s left" if 0 < dealt < blows else ""
    return (
        f"{progress.seconds:5.1f} s: {dealt} of {blows} blows{left}; {progress.events:,} events, "
        f"{progress.faults:,} faults, {progress.invalidations:,} invalidations, the longest {torture.longest_ms:.1f} ms"
    )


def _waiting_line(result: Result) -> str:
    held = "ok" if not result.over_deadline else f"BROKEN {result.over_deadline:,} times"
    return (
        f"   {'nobody held up':<22} {held:<4} the longest wait for a service: {result.longest_wait_ms:.1f} ms "
        f"(deadline {result.deadline_ms:g} ms); invalidations took {result.invalidation_p50_us:.0f} µs (median), "
        f"{result.invalidation_max_us / 1000:.1f} ms at most"
    )

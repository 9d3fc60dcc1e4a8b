"""``irqrouter trace``: follow what happens to a VM, or to one of its vectors."""

import argparse
import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Final

import msgspec

from irqrouter.cli.status import add_admin_socket, state_of, vector_number
from irqrouter.errors import KernelError
from irqrouter.service.admin_client import AdminClient, AdminError, connected
from irqrouter.service.status import Happening, VectorReport, What

_DESCRIPTION = """\
Prints what happens to a VM, or to one of its vectors, as it happens: invalidations, events that are caught, faults,
decisions and assignments. The VM need not be attached yet. Nobody waits for this: what is not read in time is lost, and
how much is said.

With --perfetto the trace is also written as JSON trace events, which https://ui.perfetto.dev opens: a track for each
vector, its states as slices, catches and faults as instants.
"""

_EPILOG = """\
examples:
  irqrouter trace guest-1                              until Ctrl-C
  irqrouter trace guest-1 5 --seconds 10               one vector, for ten seconds
  irqrouter trace guest-1 --json                       one JSON object a line
  irqrouter trace guest-1 --seconds 5 --perfetto trace.json
"""


# argparse has no public name for what add_subparsers() returns.
def add_parser(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",  # pyright: ignore[reportPrivateUsage]
) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "trace",
        help="follow a VM or one of its vectors; also as a Perfetto trace",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("vm", metavar="VM", help="the VM's name")
    parser.add_argument("vector", nargs="?", type=vector_number, metavar="VECTOR", help="the vector's number")
    parser.add_argument("--seconds", type=_seconds, metavar="N", help="end after this long")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument("--perfetto", type=Path, metavar="FILE", help="write the trace here at the end, for Perfetto")
    add_admin_socket(parser)


def run(args: argparse.Namespace) -> int:
    """Follow until the time is over, Ctrl-C, or the end of the service."""
    return asyncio.run(_run(args))


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError("must be above 0")
    return number


async def _run(args: argparse.Namespace) -> int:
    show = _show_json if args.json else _Lines().show
    trace = PerfettoTrace(args.vm) if args.perfetto else None
    failure: AdminError | None = None
    async with connected(args.admin_socket) as service, connected(args.admin_socket) as asked:
        following = asyncio.ensure_future(_follow(args, service, asked, show, trace))
        with _ctrl_c(following.cancel):
            await asyncio.wait({following}, timeout=args.seconds)
        following.cancel()
        try:
            await following
        except asyncio.CancelledError:
            pass
        except AdminError as error:
            failure = error  # what was seen before the service went is still written
    if trace is not None:
        _write(args.perfetto, trace.encoded(time.monotonic_ns()))
        print(f"{args.perfetto}: {trace.instants} happenings; open it at https://ui.perfetto.dev", file=sys.stderr)
    if failure is not None:
        raise failure
    return 0


@contextlib.contextmanager
def _ctrl_c(then: Callable[[], object]) -> Generator[None]:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, then)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


async def _follow(
    args: argparse.Namespace,
    service: AdminClient,
    asked: AdminClient,
    show: Callable[[Happening], None],
    trace: "PerfettoTrace | None",
) -> None:
    follows = False
    async with contextlib.aclosing(service.monitor(args.vm, args.vector)) as news:
        async for each in news:
            if each.lost:
                print(f"irqrouter trace: {each.lost} happenings were lost: more than can be read", file=sys.stderr)
            if not follows:  # from here on nothing is missed: now look at how things stand
                follows = True
                if trace is not None:
                    now_ns = time.monotonic_ns()  # before asking: what happens meanwhile is later
                    trace.begin(now_ns, await _standing(asked, args.vm, args.vector))
            for happening in each.happenings:
                show(happening)
                if trace is not None:
                    trace.add(happening)


async def _standing(asked: AdminClient, vm: str, vector: int | None) -> list[VectorReport]:
    if vm not in {each.name for each in await asked.vms()}:
        return []
    return [each for each in await asked.vectors(vm) if vector in {None, each.vector}]


def _show_json(happening: Happening) -> None:
    print(msgspec.json.encode(happening).decode(), flush=True)


class _Lines:
    """Prints lines, with the time since the first."""

    def __init__(self) -> None:
        self._began: int | None = None

    def show(self, happening: Happening) -> None:
        """One line."""
        self._began = happening.time_ns if self._began is None else self._began
        about = "" if happening.vector is None else f"vector {happening.vector}"
        generation = "" if happening.generation is None else f"generation {happening.generation}"
        line = (
            f"{(happening.time_ns - self._began) / 1e9:12.6f}  {about:<12} {happening.what.value:<9} {generation:<16} "
            f"{happening.detail}"
        )
        print(line.rstrip(), flush=True)


# --- Perfetto ----------------------------------------------------------------------------------------------------

#: The state that a vector is in after something happened to it.
_STATE_AFTER: Final = {
    What.ADDED: "deassigned",
    What.RENEWED: "deassigned",
    What.PREPARED: "prepared",
    What.ASSIGNED: "assigned",
}
_STATES: Final = frozenset({"deassigned", "prepared", "assigned", "masked"})

#: Perfetto's own colours for slices, by name.
_COLOURS: Final = {"assigned": "good", "prepared": "yellow", "deassigned": "bad", "masked": "grey"}


class _Event(msgspec.Struct, omit_defaults=True):
    """One JSON trace event. Times are microseconds; ``s`` is an instant's scope: t(hread) or p(rocess)."""

    name: str
    ph: str
    pid: int
    tid: int
    ts: float
    dur: float | None = None
    s: str | None = None
    cname: str | None = None
    args: dict[str, str | int] = {}


class PerfettoTrace:
    """A trace in the JSON trace event format: the VM as a process, each vector as a thread of it.

    Slices are complete events ("X"), written when a state ends, so that a trace that begins or ends anywhere is whole.
    """

    _PID: Final = 1

    def __init__(self, vm: str) -> None:
        self._vm = vm
        self._events: list[_Event] = []
        self._slices: dict[int, tuple[str, int]] = {}
        self._tracks: set[int] = set()
        #: How many happenings it holds.
        self.instants = 0

    def begin(self, now_ns: int, vectors: list[VectorReport]) -> None:
        """How things stand at the beginning."""
        for report in vectors:
            self._enter(report.vector, state_of(report), now_ns)

    def add(self, happening: Happening) -> None:
        """Something happened."""
        self.instants += 1
        vector = happening.vector
        about: dict[str, str | int] = {} if happening.generation is None else {"generation": happening.generation}
        if happening.detail:
            about["detail"] = happening.detail
        self._events.append(
            _Event(
                name=happening.what.value,
                ph="i",
                pid=self._PID,
                tid=self._tid(vector),
                ts=happening.time_ns / 1000,
                s="p" if vector is None else "t",
                args=about,
            )
        )
        if vector is None:
            if happening.what is What.DETACHED:
                self._leave_all(happening.time_ns)
        elif happening.what is What.REMOVED:
            self._leave(vector, happening.time_ns)
        elif state := self._state_after(happening):
            self._enter(vector, state, happening.time_ns)

    def encoded(self, now_ns: int) -> bytes:
        """The file, at this moment."""
        self._leave_all(now_ns)
        names = [self._named("process_name", 0, f"VM {self._vm}"), self._named("thread_name", 0, "VM")]
        for vector in sorted(self._tracks):
            names.append(self._named("thread_name", self._tid(vector), f"vector {vector}"))
            names.append(self._sorted(vector))
        return msgspec.json.encode({"displayTimeUnit": "ns", "traceEvents": [*names, *self._events]})

    def _state_after(self, happening: Happening) -> str | None:
        if happening.what is What.RENEWED and happening.detail in _STATES:
            return happening.detail
        return _STATE_AFTER.get(happening.what)

    def _enter(self, vector: int, state: str, now_ns: int) -> None:
        if vector in self._slices and self._slices[vector][0] == state:
            return
        self._leave(vector, now_ns)
        self._slices[vector] = state, now_ns

    def _leave(self, vector: int, now_ns: int) -> None:
        if vector not in self._slices:
            return
        state, began_ns = self._slices.pop(vector)
        self._events.append(
            _Event(
                name=state,
                ph="X",
                pid=self._PID,
                tid=self._tid(vector),
                ts=began_ns / 1000,
                dur=max(now_ns - began_ns, 0) / 1000,
                cname=_COLOURS.get(state),
            )
        )

    def _leave_all(self, now_ns: int) -> None:
        for vector in list(self._slices):
            self._leave(vector, now_ns)

    def _tid(self, vector: int | None) -> int:
        if vector is None:
            return 0
        self._tracks.add(vector)
        return vector + 1

    def _named(self, kind: str, tid: int, name: str) -> _Event:
        return _Event(name=kind, ph="M", pid=self._PID, tid=tid, ts=0, args={"name": name})

    def _sorted(self, vector: int) -> _Event:
        tid = self._tid(vector)
        return _Event(name="thread_sort_index", ph="M", pid=self._PID, tid=tid, ts=0, args={"sort_index": tid})


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise KernelError(error.errno or 0, "write", str(path)) from error

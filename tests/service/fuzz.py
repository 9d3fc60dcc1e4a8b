"""A client made of chance, against a live service: ``python -m tests.service.fuzz --frames 1000000 --seed 1``.

The service is a process of its own. A few connections send it frames: good ones, good ones with a field changed, cut or
grown, sequences of both, and random bytes; with descriptors of every kind, in any number. Meanwhile they scribble over
their pages and their guests' tables, ring doorbells, fire eventfds, and answer batches rightly, wrongly or not at all.
Who is thrown out connects again. Beside them an honest client has its vector invalidated and fired, over and over.

What must hold, in between and at the end: the service lives, no session failed in a way that nobody foresaw, the honest
client got every decision and each was right, memory is bounded, and when the hostile have gone no descriptor is left.

Turn *n*, a few frames, is made of the seed and *n* alone, but for what the service answered. A failure prints both, and
the frames of the last turns.
"""

import argparse
import asyncio
import collections
import contextlib
import errno
import os
import random
import select
import socket
import struct
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import IO, Any, Final

import msgspec
import structlog
import uvloop

from irqrouter.scope import UNINDEXED
from irqrouter.service import wire
from irqrouter.service.config import Config, Limits
from irqrouter.service.server import Server
from irqrouter.service.status import Happenings
from irqrouter.service.wire import Added, Command, Feature, Frame, Hello, Kind, Operation, Region, RemapperKind
from irqrouter.x86.msi import Message
from tests.service.client import (
    IRTA,
    RAM_SIZE,
    TABLE,
    Agent,
    EndedError,
    Guest,
    connect,
    eventfd,
    hello,
    is_served,
    seqpackets,
)

SLOTS: Final = 48
CONNECTIONS: Final = 4
#: How often the honest client is looked at, and the process.
HONEST_EVERY: Final = 400
PROCESS_EVERY: Final = 20_000
#: By how much the process may grow after its first frames.
GROWTH_MAX: Final = 96 << 20
LAST: Final = 60

UNLIMITED: Final = Limits(frames_per_second=1 << 31, bytes_per_second=1 << 40)

#: Values at which things go wrong.
EDGES: Final = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFF_FFFF, 1 << 31, 0xFFFF_FFFF,
                1 << 63, (1 << 64) - 1)  # fmt: skip
ERRNOS: Final = (errno.ESTALE, errno.EAGAIN, errno.EALREADY, errno.EINPROGRESS, errno.ENXIO, errno.EBUSY, errno.ENOSPC,
                 errno.ECANCELED, errno.EIO, 4095, 1 << 31, 0xFFFF_FFFF)  # fmt: skip


class FuzzError(Exception):
    """Something that must hold did not."""


class Result(msgspec.Struct, kw_only=True):
    """What a run did."""

    seed: int
    frames: int = 0
    seconds: float = 0
    frames_per_second: float = 0
    connections: int = 0
    #: Replies read: the good ones, and the refusals by code.
    answered: int = 0
    refused: dict[str, int] = msgspec.field(default_factory=dict)
    batches: int = 0
    #: Events of the honest client, every one of which was delivered by the entry of its moment.
    honest: int = 0
    rss_before: int = 0
    rss_after: int = 0
    descriptors_before: int = 0
    descriptors_after: int = 0


# --- the service ---------------------------------------------------------------------------------------------------


def serve(listener: socket.socket, *, stdlib: bool) -> None:
    """In the child: serve until standard input ends. What is worse than a warning goes to standard error."""

    def only_errors(_: object, method: str, event: Any) -> Any:  # noqa: ANN401 - structlog's
        if method not in ("error", "exception", "critical"):
            raise structlog.DropEvent
        return event

    structlog.configure(
        processors=[only_errors, structlog.processors.format_exc_info, structlog.processors.JSONRenderer()],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )

    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = asyncio.ensure_future(Server(Config(limits=UNLIMITED), Happenings()).serve(listener))
        loop.add_reader(sys.stdin.fileno(), server.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await server
        loop.remove_reader(sys.stdin.fileno())

    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop if stdlib else uvloop.new_event_loop) as runner:
        runner.run(run())


class Process:
    """The child, from outside."""

    def __init__(self, child: asyncio.subprocess.Process, errors: IO[bytes]) -> None:
        self._child = child
        self._errors = errors

    def check(self) -> None:
        """Raise unless it lives and has nothing to say."""
        if self._child.returncode is not None:
            raise FuzzError(f"the service ended with {self._child.returncode}: {self.said()}")
        if said := self.said():
            raise FuzzError(f"the service said: {said}")

    def said(self) -> str:
        """Its standard error."""
        self._errors.seek(0)
        return self._errors.read(100_000).decode(errors="replace")

    def rss(self) -> int:
        """Its memory, in bytes."""
        return int(self._file("statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def descriptors(self) -> int:
        """How many it has."""
        return len(list(self._file("fd").iterdir()))

    def _file(self, name: str) -> Path:
        return Path(f"/proc/{self._child.pid}/{name}")


@contextlib.asynccontextmanager
async def running(*, stdlib: bool) -> AsyncGenerator[tuple[Process, bytes]]:
    """A service in a child process, and its address."""
    with (
        tempfile.TemporaryFile() as errors,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
    ):
        listener.bind("")
        listener.listen(128)
        arguments = ["-m", __name__ if __name__ != "__main__" else "tests.service.fuzz"]
        arguments += ["--serve", str(listener.fileno()), *(["--stdlib"] if stdlib else [])]
        child = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, stdin=asyncio.subprocess.PIPE, stderr=errors, pass_fds=[listener.fileno()]
        )
        process, address = Process(child, errors), listener.getsockname()
        listener.close()  # or one could connect to a service that is dead
        try:
            yield process, address
            process.check()
        finally:
            assert child.stdin is not None
            child.stdin.close()
            try:
                await asyncio.wait_for(child.wait(), 20)
            except TimeoutError:
                child.kill()
                await child.wait()
                raise FuzzError("the service did not end when it was told to") from None
        if child.returncode or process.said():
            raise FuzzError(f"the service ended with {child.returncode}: {process.said()}")


# --- the mutator ---------------------------------------------------------------------------------------------------


def mutated(raw: bytes, chance: random.Random) -> bytes:
    """``raw`` with something wrong: a field, a bit, its length, or all of it."""
    packet = bytearray(raw)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        match chance.randrange(8):
            case 0 | 1 | 2:  # a field, where fields are
                width = chance.choice((1, 2, 4, 4, 8))
                at = chance.randrange(max(1, len(packet) // width)) * width
                value = chance.choice(EDGES) if chance.random() < 0.7 else chance.getrandbits(64)
                packet[at : at + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
            case 3 if packet:
                packet[chance.randrange(len(packet))] ^= 1 << chance.randrange(8)
            case 4:
                del packet[chance.randrange(len(packet) + 1) :]
            case 5:
                packet += chance.randbytes(chance.choice((1, 4, 16, 1000)))
            case 6 if packet:  # something twice
                at = chance.randrange(len(packet))
                packet[at:at] = packet[at : at + chance.choice((4, 16, 32))]
            case _:
                packet = bytearray(chance.randbytes(chance.choice((0, 1, 15, 16, 17, 64, 300))))
    if chance.random() < 0.9:  # get past the first check, which would end the connection
        packet[: wire.HEADER_SIZE] = raw[: wire.HEADER_SIZE]
    if chance.random() < 0.98 and len(packet) >= wire.HEADER_SIZE:
        packet[4:8] = len(packet).to_bytes(4, "little")
    return bytes(packet)


class Strange:
    """Descriptors of every kind."""

    def __init__(self, others: int) -> None:
        pipe, listener, inet = os.pipe(), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET), socket.socket()
        listener.bind("")
        listener.listen()
        with select.epoll() as epoll:
            self.fds = [
                *pipe,
                listener.detach(),
                inet.detach(),
                os.dup(epoll.fileno()),
                *(sock.detach() for sock in seqpackets()),
                *(sock.detach() for sock in socket.socketpair()),
                os.open("/dev/null", os.O_RDWR),
                os.open(tempfile.gettempdir(), os.O_PATH),
                os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR),
                os.pidfd_open(os.getpid()),
                os.memfd_create("strange"),
                eventfd(flags=os.EFD_NONBLOCK | os.EFD_SEMAPHORE),
                eventfd(flags=0),
                eventfd(),
            ]
        self._owned = list(self.fds)
        self.fds.append(others)  # a vector of another VM

    def close(self) -> None:
        for fd in self._owned:
            os.close(fd)


# --- a hostile connection ------------------------------------------------------------------------------------------


class Hostile:
    """One connection, and what it has to send. All of it is made when the connection is: a crash loses nothing."""

    def __init__(self, number: int, address: bytes, strange: Strange, result: Result) -> None:
        self._number = number
        self._address = address
        self._strange = strange
        self._result = result
        self._agent: Agent | None = None
        self._eventfds = [eventfd() for _ in range(SLOTS)]
        self._next = 0
        self._deaf = 0

    async def send(self, chance: random.Random) -> str:
        """Send some frames, after some mischief; returns what they were."""
        if self._agent is None:
            return await self._connect(chance)
        try:
            for _ in range(chance.choice((0, 0, 1, 2))):
                chance.choice(self._mischief)(self, self._agent, chance)
            self._read(self._agent, chance)
            sent = [await self._frame(self._agent, chance) for _ in range(chance.choice((1, 1, 2, 4, 8)))]
            return f"{self._number}: " + ", then ".join(sent)
        except (EndedError, ConnectionError):
            self.close()
            return f"{self._number}: was thrown out"

    def close(self) -> None:
        """Go away."""
        if self._agent is not None:
            self._agent.close()
            self._agent = None

    def release(self) -> None:
        """And never come back."""
        self.close()
        for fd in self._eventfds:
            os.close(fd)

    # --- HELLO

    async def _connect(self, chance: random.Random) -> str:
        self._result.connections += 1
        self._result.frames += 1
        remapper = chance.choice((RemapperKind.VTD, RemapperKind.VTD, RemapperKind.AMDVI, *RemapperKind))
        said = Hello(
            name=f"hostile-{self._number}",
            slots=SLOTS,
            remapper=remapper,
            host_address_width=chance.choice((12, 39, 52, 64)) if remapper is RemapperKind.VTD else 0,
            features=Feature(chance.randrange(4)),
        )
        if chance.random() < 0.2:
            return self._mutated_hello(said, chance)
        agent = Agent(connect(self._address), said, Guest())
        self._agent = agent
        self._deaf = 0
        try:
            await agent.hello()
            if remapper in (RemapperKind.VTD, RemapperKind.AMDVI):
                await agent.memory()
        except (EndedError, ConnectionError):
            self.close()
        except wire.WireError:
            self.close()
        return f"{self._number}: HELLO as {remapper.name}"

    def _mutated_hello(self, said: Hello, chance: random.Random) -> str:
        raw = wire.encode(Frame(chance.getrandbits(16), Command.HELLO, wire.encode_hello(said)))
        packet = mutated(raw, chance) if chance.random() < 0.7 else raw
        ours, theirs = seqpackets()
        with ours, theirs, connect(self._address) as sock:
            given = [theirs.fileno(), self._eventfds[0]]
            if chance.random() < 0.5:
                given = self._some_descriptors(chance)
            with contextlib.suppress(BlockingIOError):
                _send(sock, packet, given)
        return f"{self._number}: HELLO {packet[:48].hex()} with {len(given)} descriptors"

    # --- frames

    async def _frame(self, agent: Agent, chance: random.Random) -> str:
        kind, frame, given = self._good(agent, chance)
        raw = wire.encode(frame)
        what = chance.random()
        if what < 0.2:
            raw = mutated(raw, chance)
        elif what < 0.203:
            raw = chance.randbytes(chance.choice((0, 1, 16, 100, 5000, 65_536, 65_537, 100_000)))
        if chance.random() < 0.02:
            given = self._some_descriptors(chance)
        for _ in range(100):
            try:
                _send(agent.requests.sock, raw, given)
                break
            except BlockingIOError:  # it does not read: listen to what it has to say first
                self._deaf = 0
                self._read(agent, chance)
                await asyncio.sleep(0)
        self._result.frames += 1
        return f"{kind} {raw[:40].hex()}, {len(raw)} bytes, {len(given)} descriptors"

    def _good(self, agent: Agent, chance: random.Random) -> tuple[str, Frame, Sequence[int]]:
        id, number = chance.getrandbits(16), chance.randrange(20)  # noqa: A001 - the field's name
        if number < 9:
            return self._add(agent, chance, id)
        if number < 12:
            first = chance.randrange(SLOTS)
            last = chance.choice((first, SLOTS, UNINDEXED))
            return "INVALIDATE", Frame(id, Command.INVALIDATE, struct.pack("<II", first, last)), ()
        if number == 12:
            cut = chance.randrange(1, RAM_SIZE >> 12) << 12
            regions = [Region(0, cut, 0, 0), Region(cut, RAM_SIZE - cut, cut, chance.randrange(2))]
            given = [agent.guest.fd] * (1 + max(region.descriptor for region in regions))
            return "MEMORY", Frame(id, Command.MEMORY, wire.encode_memory(regions)), given
        if number == 13:
            return "a command", Frame(id, chance.choice((0, 1, 6, 16, 17, 0xFFFF)), chance.randbytes(16)), ()
        return "PING", Frame(id, Command.PING), ()

    def _add(self, agent: Agent, chance: random.Random, id: int) -> tuple[str, Frame, Sequence[int]]:  # noqa: A002
        added: list[Added] = []
        for number in chance.sample(range(SLOTS), chance.choice((1, 1, 1, 2, 8))):
            self._slot(agent, chance, number, born=True)
            added.append(Added(number, agent.vectors[number].slot.born, chance.random() < 0.5))
        return "ADD", Frame(id, Command.ADD, wire.encode_add(added)), [self._eventfds[each.vector] for each in added]

    def _some_descriptors(self, chance: random.Random) -> list[int]:
        count = chance.choice((0, 1, 1, 2, 3, 10, 240, 241, 253)) if chance.random() < 0.3 else chance.randrange(4)
        return [chance.choice((*self._strange.fds, *self._eventfds[:10])) for _ in range(count)]

    # --- mischief

    def _slot(self, agent: Agent, chance: random.Random, number: int, *, born: bool) -> None:
        """A plausible slot."""
        if number not in agent.vectors:
            agent.create(number, fd=self._eventfds[number])
            born = False
        vector = agent.vectors[number]
        vector.route = vector.route or Message(0, 0)  # it may claim to have one
        agent.renew(vector, ring=False)
        address = 0xFEE0_0010 | number << 5 if chance.random() < 0.8 else chance.getrandbits(64)
        agent.store(
            vector,
            born=vector.slot.generation if born else vector.slot.born,
            address=address,
            data=chance.getrandbits(32) if chance.random() < 0.2 else 0,
            requester=chance.getrandbits(16),
            state=chance.choice((0, 1, 1, 1, 1, 2, 2, 3, 0x11, 0x21, 0x31, 0x22, 9, 0xFF)),
            refused=chance.choice((0, 0, 0, 16, 255)),
            cookie=number if chance.random() < 0.8 else chance.getrandbits(32),
        )

    def _change(self, agent: Agent, chance: random.Random) -> None:
        for _ in range(chance.choice((1, 1, 5))):
            self._slot(agent, chance, chance.randrange(SLOTS), born=chance.random() < 0.1)
        agent.ring()

    def _scribble(self, agent: Agent, chance: random.Random) -> None:
        at = chance.randrange(agent.page.size)
        raw = chance.randbytes(chance.choice((1, 8, 64, 1000)))[: agent.page.size - at]
        agent.page.map[at : at + len(raw)] = raw
        agent.ring()

    def _registers(self, agent: Agent, chance: random.Random) -> None:
        table = chance.choice((IRTA, IRTA, TABLE | 8, chance.getrandbits(64)))
        agent.page.header(wire.PageHeader(SLOTS, table, chance.choice((1, 1, 1, 0, 3, chance.getrandbits(64)))))
        agent.ring()

    def _tables(self, agent: Agent, chance: random.Random) -> None:
        for _ in range(4):
            number = chance.randrange(SLOTS)
            if chance.random() < 0.6:
                agent.guest.route(number, chance.randrange(16, 255), chance.randrange(255))
            else:
                agent.guest.entry(number, chance.getrandbits(64), chance.getrandbits(64))
        os.pwrite(agent.guest.fd, chance.randbytes(256), chance.randrange(RAM_SIZE - 256))

    def _truncate(self, agent: Agent, chance: random.Random) -> None:
        os.ftruncate(agent.guest.fd, chance.randrange(RAM_SIZE))
        if chance.random() < 0.8:
            os.ftruncate(agent.guest.fd, RAM_SIZE)

    def _ring(self, agent: Agent, chance: random.Random) -> None:
        agent.ring()

    def _fire(self, agent: Agent, chance: random.Random) -> None:
        for fd in chance.sample(self._eventfds, chance.choice((1, 1, 10))):
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(fd, chance.choice((1, 1, 5, 1 << 40)))

    def _drain(self, agent: Agent, chance: random.Random) -> None:
        for fd in self._eventfds:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(fd)

    def _be_deaf(self, agent: Agent, chance: random.Random) -> None:
        if chance.random() < 0.05:
            self._deaf = chance.randrange(300)

    def _leave(self, agent: Agent, chance: random.Random) -> None:
        if chance.random() < 0.01:
            line = chance.choice((agent.requests, agent.batches))
            if chance.random() < 0.5:
                line.sock.shutdown(chance.choice((socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR)))
            raise EndedError

    _mischief: Final[Sequence[Callable[["Hostile", Agent, random.Random], None]]] = (
        _change, _change, _change, _scribble, _registers, _tables, _tables, _truncate, _ring, _fire, _fire, _drain,
        _be_deaf, _leave,
    )  # fmt: skip

    # --- what the service says

    def _read(self, agent: Agent, chance: random.Random) -> None:
        if self._deaf:
            self._deaf -= 1
            return
        while (packet := agent.requests.receive_now()) is not None:
            frame = wire.decode(packet[0])
            if not frame.reply or packet[1]:
                raise FuzzError(f"the service sent {frame}")
            if frame.errno:
                name = wire.error_of(frame).code.name
                self._result.refused[name] = self._result.refused.get(name, 0) + 1
            else:
                self._result.answered += 1
        while (packet := agent.batches.receive_now()) is not None:
            self._result.batches += 1
            self._answer(agent, wire.decode(packet[0]), chance)

    def _answer(self, agent: Agent, frame: Frame, chance: random.Random) -> None:
        if frame.reply or frame.command not in (Command.BATCH, Command.TRANSLATE):
            raise FuzzError(f"the service sent {frame}")
        kinds = wire.IN_BATCH if frame.command == Command.BATCH else wire.IN_TRANSLATE
        operations = wire.decode_operations(frame.payload, kinds)
        if any(operation.vector >= SLOTS for operation in operations):
            raise FuzzError(f"the service sent {operations}")
        if chance.random() < 0.02:
            return  # never
        if frame.command == Command.TRANSLATE:
            payload = wire.encode_operations([_translation(operation, chance) for operation in operations])
        elif chance.random() < 0.5:
            payload = wire.encode_errnos(agent.carry_out(operations))
        else:
            payload = wire.encode_errnos([chance.choice((0, 0, *ERRNOS)) for _ in operations])
        raw = wire.encode(Frame(frame.id, frame.command, payload, reply=True))
        if chance.random() < 0.003:
            raw = mutated(raw, chance)
        given = self._some_descriptors(chance) if chance.random() < 0.001 else ()
        with contextlib.suppress(BlockingIOError):
            _send(agent.batches.sock, raw, given)
        self._result.frames += 1


def _translation(miss: Operation, chance: random.Random) -> Operation:
    generation = miss.generation if chance.random() < 0.8 else chance.getrandbits(64)
    match chance.randrange(4):
        case 0:
            return miss
        case 1:
            record = chance.getrandbits(64), chance.getrandbits(64)
            return Operation(Kind.FAULT, miss.vector, generation, record=record)
        case _:
            return Operation(
                Kind.UPDATE, miss.vector, generation, address=chance.getrandbits(64), data=chance.getrandbits(32)
            )


def _send(sock: socket.socket, raw: bytes, given: Sequence[int]) -> None:
    try:
        socket.send_fds(sock, [raw], given, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
    except OSError as error:
        if error.errno in (errno.ETOOMANYREFS, errno.ENOBUFS):  # too many on their way already
            raise BlockingIOError from error
        raise


# --- a run ---------------------------------------------------------------------------------------------------------


async def fuzz(
    frames: int, seed: int, *, stdlib: bool = False, progress: Callable[[Result], None] | None = None
) -> Result:
    """Send ``frames`` frames; raises :class:`FuzzError` where something did not hold."""
    result = Result(seed=seed)
    last: collections.deque[str] = collections.deque(maxlen=LAST)
    began = time.monotonic()
    try:
        async with running(stdlib=stdlib) as (process, address):
            honest = Agent(connect(address), hello("honest"), Guest())
            try:
                await _run(result, last, frames, process, address, honest, progress)
            finally:
                honest.close()
    except Exception as error:
        lines = "\n  ".join(last)
        raise FuzzError(f"{error!r}\nseed {seed}, frame {result.frames}; the last were\n  {lines}") from error
    result.seconds = time.monotonic() - began
    result.frames_per_second = result.frames / result.seconds
    return result


async def _run(
    result: Result,
    last: collections.deque[str],
    frames: int,
    process: Process,
    address: bytes,
    honest: Agent,
    progress: Callable[[Result], None] | None,
) -> None:
    await honest.hello()
    await honest.memory()
    await honest.add(honest.create(0))
    obeying = asyncio.create_task(honest.serve())
    await is_served(honest)
    result.descriptors_before = process.descriptors()
    strange = Strange(honest.vectors[0].fd)
    hostile = [Hostile(number, address, strange, result) for number in range(CONNECTIONS)]
    began = time.monotonic()
    turn = honest_at = process_at = 0
    try:
        while result.frames < frames:
            chance = random.Random(seed_of(result.seed, turn))
            turn += 1
            last.append(f"turn {turn}, {await chance.choice(hostile).send(chance)}")
            if turn % 4 == 0:
                await asyncio.sleep(0)
            if result.frames >= honest_at:
                honest_at = result.frames + HONEST_EVERY
                await _look_at_the_honest(honest, obeying)
            if result.frames >= process_at:
                process_at = result.frames + PROCESS_EVERY
                process.check()
                if result.frames < frames // 4:
                    result.rss_before = process.rss()
                result.rss_after = process.rss()
                if result.rss_after > result.rss_before + GROWTH_MAX:
                    raise FuzzError(f"the service grew from {result.rss_before} to {result.rss_after} bytes")
                result.seconds = time.monotonic() - began
                result.honest = len(honest.delivered)
                if progress is not None:
                    progress(result)
    finally:
        for each in hostile:
            each.release()
        strange.close()
    async with asyncio.timeout(20):  # their descriptors are gone when they are
        while (now := process.descriptors()) > result.descriptors_before:
            last.append(f"{now} descriptors")
            await asyncio.sleep(0.01)
    result.descriptors_after = now
    await _look_at_the_honest(honest, obeying)
    process.check()
    result.honest = len(honest.delivered)
    result.rss_after = process.rss()
    obeying.cancel()
    await asyncio.wait([obeying])


async def _look_at_the_honest(honest: Agent, obeying: "asyncio.Task[None]") -> None:
    served = asyncio.create_task(is_served(honest, rounds=1))
    await asyncio.wait([served, obeying], return_when=asyncio.FIRST_COMPLETED)
    if obeying.done():
        served.cancel()
        raise FuzzError(f"the honest client was thrown out: {obeying}")
    await served


def seed_of(seed: int, turn: int) -> int:
    """The seed of a turn's chance."""
    return seed << 40 | turn


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.service.fuzz", description="Fuzz a live service.")
    parser.add_argument("--frames", type=int, default=1_000_000, help="how many frames to send (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="what they are made of (%(default)s)")
    parser.add_argument("--stdlib", action="store_true", help="the stdlib's event loop in the service, not uvloop")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.serve is not None:
        with socket.socket(fileno=given.serve) as listener:
            serve(listener, stdlib=given.stdlib)
        return 0

    def progress(result: Result) -> None:
        rate = result.frames / result.seconds if result.seconds else 0
        print(
            f"\r{result.frames:>9,} frames, {rate:>7,.0f}/s, {result.honest:,} honest events, "
            f"{result.connections:,} connections, {result.rss_after >> 20} MiB ",
            end="",
            file=sys.stderr,
            flush=True,
        )

    try:
        result = asyncio.run(fuzz(given.frames, given.seed, stdlib=given.stdlib, progress=progress))
    except FuzzError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    finally:
        print(file=sys.stderr)
    if given.json:
        print(msgspec.json.encode(result).decode())
    else:
        refused = ", ".join(f"{count:,} {name}" for name, count in sorted(result.refused.items()))
        print(
            f"{result.frames:,} frames with seed {result.seed} in {result.seconds:.0f} s "
            f"({result.frames_per_second:,.0f}/s), over {result.connections:,} connections\n"
            f"{result.answered:,} commands answered; refused: {refused}\n"
            f"{result.batches:,} batches; {result.honest:,} events of an honest client, each delivered rightly\n"
            f"memory {result.rss_before >> 20} to {result.rss_after >> 20} MiB; "
            f"descriptors {result.descriptors_before} before, {result.descriptors_after} after"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The server: accepts agents, checks who they are and what they may, and runs a session for each.

A session is a task group of its own: whatever becomes of one VM, the others notice nothing.
"""

import array
import asyncio
import contextlib
import socket
import struct
from typing import Final

import structlog

from irqrouter.errors import CallerError, IrqrouterError
from irqrouter.kvm.eventfd import KvmEventfd
from irqrouter.service import wire
from irqrouter.service.channel import Channel, GoneError, Packet, closer, is_eventfd
from irqrouter.service.config import Config
from irqrouter.service.session import Claims, Peer, Session
from irqrouter.service.shares import LogShare
from irqrouter.service.status import Happenings, VectorReport, VmStatus, What
from irqrouter.service.wire import Code, Command, Feature, Frame, Hello, Welcome, WireError

log = structlog.get_logger("irqrouter")

#: An agent that has not said ``HELLO`` after this has wasted its chance.
HELLO_S: Final = 5.0
#: Connections that have not said ``HELLO`` yet, all together: of those who may attach, and of those who may not and are
#: heard only to be told so.
STRANGERS_MAX: Final = 64
UNWELCOME_MAX: Final = 8
#: Lines that all who come and go may cause in the log in a second: every VM there may be, once each.
COMINGS_PER_S: Final = 512
#: How often it is looked whether what strangers sent has been closed, where that is too much to let others in.
_CLOSING_S: Final = 0.01
#: How often the pages are looked at for those who want to hear what happens.
_OBSERVE_S: Final = 0.01

_UCRED: Final = struct.Struct("iII")
_SO_PEERGROUPS: Final = 59  # asm-generic/socket.h; Python's socket module does not name it
_GROUPS_SIZE: Final = 1024  # 256 groups: the most that getsockopt takes in Python
_OURS: Final = Feature.PREPARE | Feature.WIDE


class UnknownVmError(CallerError):
    """No VM of that name is attached."""


class Server:
    """Serves every VM that attaches. Run :meth:`serve`; the rest may be called on the same loop meanwhile."""

    def __init__(self, config: Config, happenings: Happenings) -> None:
        self._config = config
        self._happenings = happenings
        self._sessions: dict[str, Session] = {}
        self._ended: dict[str, asyncio.Event] = {}
        self._claims = Claims()
        self._strangers = {True: 0, False: 0}  # those who may attach, and those who may not
        self._lines = LogShare()
        self._comings = LogShare(COMINGS_PER_S)

    async def serve(self, listener: socket.socket) -> None:
        """Accept agents on ``listener``, a listening ``SOCK_SEQPACKET`` socket, until cancelled."""
        listener.setblocking(False)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._observe())
            while True:
                await _readable(listener)
                if closer.busy >= STRANGERS_MAX:  # whoever comes now brings more of it, perhaps, and waits outside
                    if self._lines.take():
                        suppressed = self._lines.forget_suppressed()
                        log.warning("nobody is let in", why="closes take their time", suppressed=suppressed)
                    await asyncio.sleep(_CLOSING_S)
                    continue
                try:
                    connection, _ = listener.accept()
                except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                    continue
                except OSError:  # out of descriptors: those that are attached go on
                    log.exception("cannot accept")
                    await asyncio.sleep(1)
                    continue
                peer = _peer(connection)
                welcome = self._may_attach(peer)
                if self._strangers[welcome] + closer.busy >= (STRANGERS_MAX if welcome else UNWELCOME_MAX):
                    self._turned_away(peer, CallerError("the service", "has too many strangers"))
                    Channel(connection).close()  # which takes care of what it has sent already
                    continue
                self._strangers[welcome] += 1
                group.create_task(self._welcome(connection, peer, welcome=welcome))

    def reconfigure(self, config: Config) -> None:
        """From now on ``config`` holds: who may attach for newcomers, limits and prefetching for all."""
        self._config = config
        for session in self._sessions.values():
            session.limits, session.prefetch = config.limits, config.prefetch

    def vms(self) -> list[VmStatus]:
        """A snapshot of every VM."""
        return [session.status() for session in self._sessions.values()]

    def vectors(self, vm: str) -> list[VectorReport]:
        """A snapshot of a VM's vectors. Raises :class:`UnknownVmError`."""
        return self._session(vm).vectors()

    def detach(self, vm: str) -> None:
        """End a VM's session, soon; its agent will connect again. Raises :class:`UnknownVmError`."""
        self._session(vm).end("was detached by the administrator")

    def _session(self, vm: str) -> Session:
        try:
            return self._sessions[vm]
        except KeyError:
            raise UnknownVmError(f"VM {vm!r}", "is not attached") from None

    async def _observe(self) -> None:
        while True:
            listened_to = bool(self._happenings)
            await self._happenings.wanted()
            for session in list(self._sessions.values()):
                session.observe(tell=listened_to)  # what was before anybody listened is no news
            await asyncio.sleep(_OBSERVE_S)

    # --- one connection ------------------------------------------------------------------------------------------

    async def _welcome(self, connection: socket.socket, peer: Peer, *, welcome: bool) -> None:
        """From the connection to its end. Nothing that goes wrong with one leaves this."""
        channel = Channel(connection)
        try:
            session, reply = await self._hello(channel, peer)
        except BaseException as error:
            channel.close()
            if not isinstance(error, Exception):
                raise
            self._turned_away(peer, error)
            return
        finally:
            self._strangers[welcome] -= 1
        await self._run(session, reply)

    async def _run(self, session: Session, welcome: Frame) -> None:
        logger = log.bind(vm=session.name, pid=session.peer.pid, uid=session.peer.uid)
        self._log(logger, "attached", remapper=session.hello.remapper.name, features=session.hello.features.name)
        self._happenings.tell(session.name, What.ATTACHED)
        why: Exception | None = None
        try:
            await session.run(welcome)
        except (GoneError, WireError) as error:
            why = error
        except Exception as error:
            logger.exception("a session failed")
            why = error
        finally:
            session.close()
            del self._sessions[session.name]
            self._ended.pop(session.name).set()
            self._happenings.tell(session.name, What.DETACHED, detail=str(why or ""))
            self._log(logger, "detached", why=str(why or "the service ends"))

    def _log(self, logger: structlog.stdlib.BoundLogger, event: str, **fields: object) -> None:
        """A line about one who comes or goes; an agent may do that thousands of times in a second."""
        if self._comings.take():
            logger.info(event, suppressed=self._comings.forget_suppressed(), **fields)

    async def _hello(self, channel: Channel, peer: Peer) -> tuple[Session, Frame]:
        """Hear ``HELLO``, and register the session. What is refused is told to the agent before it is raised."""
        async with asyncio.timeout(HELLO_S):
            packet = await channel.receive()
        id = command = 0  # noqa: A001 - the field's name
        try:
            frame = packet.frame(with_descriptors=True)
            id, command = frame.id, frame.command  # noqa: A001 - as above
            return await self._register(frame, packet, channel, peer)
        except IrqrouterError as error:
            # Any other than a WireError: out of descriptors, or of memory.
            told = error if isinstance(error, WireError) else WireError(Code.INTERNAL, error.object, error.rule)
            with contextlib.suppress(GoneError):
                channel.send_now(wire.error_frame(id, command, told))
            raise
        finally:
            if (closed := packet.close()) is not None:
                await closed  # who keeps us busy stays a stranger

    async def _register(self, frame: Frame, packet: Packet, channel: Channel, peer: Peer) -> tuple[Session, Frame]:
        if frame.reply or frame.command != Command.HELLO:
            raise WireError(Code.ORDER, f"command {frame.command}", "must come after HELLO")
        if not self._may_attach(peer):
            raise WireError(Code.PEER, f"process {peer.pid} of user {peer.uid}", "may not attach")
        hello = wire.decode_hello(frame.payload)
        await self._end_former(hello, peer)
        limits = self._config.limits
        if len(self._sessions) >= limits.vms:
            raise WireError(Code.QUOTA, f"VM {hello.name}", f"{limits.vms} VMs are attached already")
        welcome = Welcome(
            vectors_max=min(limits.vectors, hello.slots),
            features=hello.features & _OURS,
            regions_max=limits.regions,
            frames_per_second=limits.frames_per_second,
        )
        session = self._session_for(hello, peer, channel, packet)
        self._sessions[hello.name] = session
        self._ended[hello.name] = asyncio.Event()
        return session, Frame(frame.id, frame.command, wire.encode_welcome(welcome), reply=True)

    async def _end_former(self, hello: Hello, peer: Peer) -> None:
        """A name belongs to one connection: end a former one of the same process, completely."""
        while (former := self._sessions.get(hello.name)) is not None:
            if former.peer.pid != peer.pid or not peer.pid:  # 0: a process in a namespace that we cannot see into
                raise WireError(Code.NAME, f"VM {hello.name}", "is the name of another process's VM")
            ended = self._ended[hello.name]
            former.end("its agent connected again")
            await ended.wait()

    def _session_for(self, hello: Hello, peer: Peer, channel: Channel, packet: Packet) -> Session:
        if len(packet.descriptors) != 2:
            raise WireError(Code.DESCRIPTOR, "HELLO", f"has {len(packet.descriptors)} descriptors, must have 2")
        with contextlib.ExitStack() as opened:
            if not is_eventfd(packet.descriptors[1]):
                raise WireError(Code.DESCRIPTOR, "descriptor 1, the doorbell", "is not an eventfd", index=1)
            try:
                doorbell = KvmEventfd(packet.descriptors[1])
            except CallerError as error:
                raise WireError(Code.DESCRIPTOR, "descriptor 1, the doorbell", error.rule, index=1) from error
            opened.callback(doorbell.close)
            batches = Channel(_batch_socket(packet))
            opened.callback(batches.close)
            session = Session(
                hello,
                peer,
                channel,
                batches,
                doorbell,
                limits=self._config.limits,
                prefetch=self._config.prefetch,
                claims=self._claims,
                happenings=self._happenings,
                has_company=lambda: len(self._sessions) > 1,
            )
            opened.pop_all()
        return session

    def _may_attach(self, peer: Peer) -> bool:
        return self._config.permitted(peer.uid, peer.gid, peer.groups)

    def _turned_away(self, peer: Peer, error: Exception) -> None:
        if self._lines.take():
            why = str(error) or f"said nothing for {HELLO_S:g} s"
            log.warning("turned away", pid=peer.pid, uid=peer.uid, why=why, suppressed=self._lines.forget_suppressed())
        self._happenings.tell("", What.REFUSED, detail=f"process {peer.pid}: {error}")


def _peer(connection: socket.socket) -> Peer:
    pid, uid, gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    groups = array.array("I")
    try:
        groups.frombytes(connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_SIZE))
    except OSError:
        pass  # ERANGE: it has more of them than Python can ask for; its user and its own group count all the same
    return Peer(pid, uid, gid, tuple(groups))


def _batch_socket(packet: Packet) -> socket.socket:
    """The batch socket of ``HELLO``, if that is what descriptor 0 is."""
    rule = "must be an AF_UNIX SOCK_SEQPACKET socket, of a socketpair"
    try:
        sock = socket.socket(fileno=packet.descriptors[0])
    except OSError:
        raise WireError(Code.DESCRIPTOR, "descriptor 0, the batch socket", rule, index=0) from None
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_SEQPACKET or not _is_of_a_pair(sock):
        sock.detach()
        raise WireError(Code.DESCRIPTOR, "descriptor 0, the batch socket", rule, index=0)
    packet.take(0)
    return sock


def _is_of_a_pair(sock: socket.socket) -> bool:
    """Whether its peer has no name. A client's end of a connection to us would keep that open after its death."""
    try:
        return not sock.getpeername()
    except OSError:
        return False


async def _readable(listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(listener.fileno(), wake)
    try:
        await ready
    finally:
        loop.remove_reader(listener.fileno())

"""The varlink interface ``io.irqrouter.Admin``: look into the service, follow what happens, detach a VM.

It is served by asyncvarlink, so that ``varlinkctl`` and any other client can ask for the interface's description, and
call it. Whoever listens and does not keep up loses the oldest; nobody waits for a listener.
"""

import asyncio
import errno
import socket
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Final, Literal, Protocol, TypedDict, cast

import msgspec
import structlog
from asyncvarlink import (
    AnnotatedResult,
    FileDescriptorArray,
    GenericVarlinkErrorReply,
    TypedVarlinkErrorReply,
    VarlinkInterface,
    VarlinkInterfaceRegistry,
    VarlinkInterfaceServerProtocol,
    VarlinkMethodCall,
    VarlinkMethodReply,
    VarlinkTransport,
    varlinkmethod,
)
from asyncvarlink.conversion import ConversionError
from asyncvarlink.serviceinterface import InvalidParameter, PermissionDenied, VarlinkServiceInterface

from irqrouter.errors import CallerError
from irqrouter.service.config import LogLevel
from irqrouter.service.status import Happening, Happenings, Subscription, VectorReport, VmStatus

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("irqrouter")

INTERFACE: Final = "io.irqrouter.Admin"

#: Connections at a time; one more is closed at once.
CONNECTIONS_MAX: Final = 64
#: Bytes of one call. No method needs a thousand.
CALL_MAX: Final = 1 << 16
#: Happenings in one reply of ``Monitor``.
BATCH_MAX: Final = 256


class Core(Protocol):
    """What is looked into: a :class:`~irqrouter.service.server.Server`."""

    def vms(self) -> list[VmStatus]:
        """Every attached VM."""
        ...

    def vectors(self, vm: str) -> list[VectorReport]:
        """The VM's vectors; a ``CallerError`` if it is not attached."""
        ...

    def detach(self, vm: str) -> None:
        """End the VM's connection; a ``CallerError`` if it is not attached."""
        ...


class ServiceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The service at one moment."""

    version: str
    pid: int
    uptime_s: float
    #: The event loop's class.
    loop: str
    log_level: str
    #: The configuration file; None where there is none.
    config: str | None
    vms: int
    vectors: int
    #: Who follows what happens (``Monitor``).
    listeners: int


class Host(Protocol):
    """The service around the core."""

    def status(self) -> ServiceStatus:
        """The service at this moment."""
        ...

    def set_log_level(self, level: LogLevel) -> None:
        """Log from this level on, until the configuration is read again."""
        ...

    def administered_by(self, uid: int, gid: int, groups: Iterable[int]) -> bool:
        """Whether a process like this may use the interface."""
        ...


# --- the interface's types ---------------------------------------------------------------------------------------
# What varlink's description is made of. Their fields are those of the structs that are sent (a test compares them), yet
# written down once more: what this interface promises changes when somebody means it to.


@dataclass
class Message:
    """An MSI message."""

    address: int
    data: int


@dataclass
class Vm:
    """See :class:`VmStatus`."""

    name: str
    pid: int
    uid: int
    attached_s: float
    remapper: str
    features: list[str]
    vectors: int
    assigned: int
    deassigned: int
    masked: int
    prepared: int
    regions: int
    descriptors: int
    frames: int
    bytes: int
    operations: int
    stale: int
    faults: int
    doorbells: int
    wakeups: int


@dataclass
class Vector:
    """See :class:`VectorReport`."""

    vm: str
    vector: int
    gsi: int
    state: str
    prepared: bool
    generation: int
    requester: int
    message: Message
    cookie: int
    route: Message | None
    invalidations: int
    caught: int
    faults: int
    stale: int
    discarded: int
    refused: int
    last_catch_us: float | None


@dataclass
class Happened:
    """See :class:`Happening`."""

    time_ns: int
    vm: str
    what: Literal[
        "attached",
        "detached",
        "refused",
        "added",
        "removed",
        "renewed",
        "fired",
        "prepared",
        "caught",
        "faulted",
        "assigned",
        "stale",
    ]
    vector: int | None
    generation: int | None
    detail: str


@dataclass
class Service:
    """See :class:`ServiceStatus`."""

    version: str
    pid: int
    uptime_s: float
    loop: str
    log_level: str
    config: str | None
    vms: int
    vectors: int
    listeners: int


class Monitored(TypedDict):
    """A reply of ``Monitor``."""

    happenings: list[Happened]
    lost: int


class _News(TypedDict):
    """What a reply of ``Monitor`` is made of here."""

    happenings: list[Happening]
    lost: int


class NoSuchVm(TypedVarlinkErrorReply, interface=INTERFACE):
    """No VM of this name is attached."""

    class Parameters:
        """What it was about."""

        vm: str


class NoSuchVector(TypedVarlinkErrorReply, interface=INTERFACE):
    """The VM has no vector of this number."""

    class Parameters:
        """What it was about."""

        vm: str
        vector: int


class Admin(VarlinkInterface, name=INTERFACE):
    """Look into irqrouter, follow what happens, detach a VM."""

    errors = (NoSuchVm, NoSuchVector)

    def __init__(self, core: Core, host: Host, happenings: Happenings, listens: Callable[[Subscription], None]) -> None:
        self._core = core
        self._host = host
        self._happenings = happenings
        self._listens = listens

    @varlinkmethod(return_parameter="status", return_type=Service)
    def GetStatus(self) -> ServiceStatus:  # noqa: N802 - varlink's names
        """The service itself."""
        return self._host.status()

    @varlinkmethod(return_parameter="vms", return_type=list[Vm])
    def ListVms(self) -> list[VmStatus]:  # noqa: N802
        """Every attached VM."""
        return self._core.vms()

    @varlinkmethod(return_parameter="vectors", return_type=list[Vector])
    def ListVectors(self, *, vm: str) -> list[VectorReport]:  # noqa: N802
        """Every vector of a VM."""
        try:
            return self._core.vectors(vm)
        except CallerError:
            raise _no_such_vm(vm) from None

    @varlinkmethod(return_parameter="vector", return_type=Vector)
    def GetVector(self, *, vm: str, vector: int) -> VectorReport:  # noqa: N802
        """One vector of a VM."""
        try:
            found = [each for each in self._core.vectors(vm) if each.vector == vector]
        except CallerError:
            raise _no_such_vm(vm) from None
        if not found:
            raise GenericVarlinkErrorReply(NoSuchVector.name, {"vm": vm, "vector": vector})
        return found[0]

    @varlinkmethod(return_type=Monitored, delay_generator=False)
    async def Monitor(self, *, vm: str | None = None, vector: int | None = None) -> AsyncIterator[_News]:  # noqa: N802
        """What happens from now on, to everything, to one VM, or to one of its vectors.

        The first reply is empty: it says that from here on nothing is missed. The VM need not be attached yet. "lost"
        counts what was thrown away since the reply before, because it was not read in time.
        """
        with self._happenings.subscribed() as subscription:
            self._listens(subscription)
            yield _News(happenings=[], lost=0)
            told = 0
            while taken := await subscription.take(BATCH_MAX):
                wanted = [each for each in taken if _wanted(each, vm, vector)]
                lost, told = subscription.lost - told, subscription.lost
                if wanted or lost:
                    yield _News(happenings=wanted, lost=lost)

    @varlinkmethod
    def SetLogLevel(self, *, level: Literal["debug", "info", "warning", "error"]) -> None:  # noqa: N802
        """Log from this level on, until the configuration is read again."""
        self._host.set_log_level(level)

    @varlinkmethod
    def Detach(self, *, vm: str) -> None:  # noqa: N802
        """End a VM's connection. Its agent may connect again; what it holds in the kernel goes on."""
        try:
            self._core.detach(vm)
        except CallerError:
            raise _no_such_vm(vm) from None


# Type checkers see no parameters in a typed error's constructor: asyncvarlink makes it while the program runs.
def _no_such_vm(vm: str) -> GenericVarlinkErrorReply:
    return GenericVarlinkErrorReply(NoSuchVm.name, {"vm": vm})


def _wanted(happening: Happening, vm: str | None, vector: int | None) -> bool:
    return (vm is None or happening.vm == vm) and (vector is None or happening.vector in {None, vector})


# --- the server --------------------------------------------------------------------------------------------------


class AdminServer:
    """Serves the interface to administrators."""

    def __init__(self, core: Core, host: Host, happenings: Happenings) -> None:
        self._core = core
        self._host = host
        self._happenings = happenings
        self._connections: set[_Connection] = set()

    @property
    def listeners(self) -> int:
        """How many streams of ``Monitor`` there are."""
        return sum(len(connection.subscriptions) for connection in self._connections)

    async def serve(self, listener: socket.socket) -> None:
        """Accept on a listening ``SOCK_STREAM`` socket until cancelled; then close every connection."""
        listener.setblocking(False)
        try:
            while True:
                self._connected(await accepted(listener))
        finally:
            for connection in list(self._connections):
                connection.abort()
            while self._connections:
                await next(iter(self._connections)).closed.wait()

    def _connected(self, sock: socket.socket) -> None:
        if len(self._connections) >= CONNECTIONS_MAX:
            log.warning("admin connection refused", rule=f"at most {CONNECTIONS_MAX} at a time")
            sock.close()
            return
        pid, uid, gid, groups = peer(sock)
        admitted = self._host.administered_by(uid, gid, groups)
        (log.debug if admitted else log.warning)("admin connected", pid=pid, uid=uid, admitted=admitted)
        registry = VarlinkInterfaceRegistry()
        connection = _Connection(registry, self._connections, admitted=admitted)
        registry.register_interface(Admin(self._core, self._host, self._happenings, connection.subscriptions.append))
        registry.register_interface(
            VarlinkServiceInterface("irqrouter", "irqrouter", version("irqrouter"), "https://irqrouter.io", registry)
        )
        self._connections.add(connection)
        sock.setblocking(False)
        VarlinkTransport(asyncio.get_running_loop(), sock, sock, connection)


class _Connection(VarlinkInterfaceServerProtocol):
    """One client: its calls are answered one after the other, and each answer is sent before the next call is read."""

    def __init__(self, registry: VarlinkInterfaceRegistry, connections: "set[_Connection]", *, admitted: bool) -> None:
        super().__init__(registry)
        self._connections = connections
        self._admitted = admitted
        self._connected: VarlinkTransport | None = None
        self._unfinished = 0
        self._answering: set[asyncio.Task[None]] = set()
        self.subscriptions: list[Subscription] = []
        #: It is gone, and nothing is left of it.
        self.closed = asyncio.Event()

    def abort(self) -> None:
        """Close it now, whatever was not sent yet."""
        self._end_streams()
        if self._connected is not None:
            self._connected.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert isinstance(transport, VarlinkTransport)
        self._connected = transport

    def message_received(self, data: bytes, fds: FileDescriptorArray | None) -> None:
        """Bytes arrived. asyncvarlink sets no limit to a call, and lets JSON's own errors escape."""
        self._unfinished = len(data) - 1 - data.rfind(b"\0") + (0 if b"\0" in data else self._unfinished)
        try:
            # Nothing may be said while a stream is on: it would be kept until the stream is over, which is never.
            if self._unfinished > CALL_MAX or self.subscriptions:
                raise ValueError  # noqa: TRY301 - as what json raises
            super().message_received(data, fds)
        except (ValueError, RecursionError):
            self.abort()

    def error_received(self, err: Exception, data: bytes, fds: FileDescriptorArray | None) -> None:  # noqa: ARG002
        """What arrived is no call."""
        self.abort()

    def call_received(
        self,
        call: VarlinkMethodCall,
        fds: FileDescriptorArray | None,  # noqa: ARG002 - no method takes any
    ) -> asyncio.Future[None]:
        """Answer a call.

        asyncvarlink's own way does not wait until a reply is sent, so that a client which only ever calls fills our
        memory; and it converts replies field by field in Python, where thousands of vectors would hold up the loop.
        """
        answering = asyncio.ensure_future(self._answer(call))
        self._answering.add(answering)
        answering.add_done_callback(self._answered)
        return answering

    def eof_received(self) -> None:
        self._end_streams()
        super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._end_streams()
        self._connected = None
        self._forget_when_done()

    async def _answer(self, call: VarlinkMethodCall) -> None:
        if not self._admitted:
            raise PermissionDenied
        method, signature = self._registry.lookup_method(call)
        try:
            parameters = signature.parameter_type.fromjson(call.parameters)
        except ConversionError as error:
            raise GenericVarlinkErrorReply(InvalidParameter.name, {"parameter": str(error.location[0])}) from None
        result: object = method(**parameters)
        if signature.more:
            assert isinstance(result, AsyncGenerator)
            await self._stream(cast("AsyncGenerator[AnnotatedResult, None]", result))
        elif not call.oneway:
            assert isinstance(result, AnnotatedResult)
            await self._sent(result)

    async def _stream(self, results: AsyncGenerator[AnnotatedResult, None]) -> None:
        # asyncvarlink does not read while it answers, and would not notice that the client of a quiet stream has gone.
        if self._connected is not None:
            asyncio.get_running_loop().call_soon(self._connected.resume_reading)
        async for result in results:  # always to its end: nothing is left for a garbage collector to finish
            if not await self._sent(result):
                self.abort()

    async def _sent(self, result: AnnotatedResult) -> bool:
        reply = VarlinkMethodReply(msgspec.to_builtins(result.parameters), continues=result.continues)
        try:
            await self.send_reply(reply)
        except OSError:
            return False
        return True

    def _answered(self, answering: asyncio.Task[None]) -> None:
        self._answering.discard(answering)
        self._forget_when_done()

    def _forget_when_done(self) -> None:
        if self._connected is None and not self._answering:
            self._connections.discard(self)
            self.closed.set()

    def _end_streams(self) -> None:
        for subscription in self.subscriptions:
            subscription.end()


async def accepted(listener: socket.socket) -> socket.socket:
    """The next connection. What keeps the kernel from making one is waited out."""
    while True:
        try:
            connection, _ = await asyncio.get_running_loop().sock_accept(listener)
        except OSError as error:
            if error.errno not in {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED}:
                raise
            log.warning("accept failed", errno=errno.errorcode[error.errno])
            await asyncio.sleep(0.1)
        else:
            return connection


#: ``<asm-generic/socket.h>``; :mod:`socket` does not have it.
_SO_PEERGROUPS: Final = 59
#: The most that Python asks the kernel for: 256 groups.
_GROUPS_SIZE: Final = 1024


def peer(connection: socket.socket) -> tuple[int, int, int, Sequence[int]]:
    """Process, user, group and supplementary groups at the other end, as they were when it connected."""
    pid, uid, gid = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        groups = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_SIZE)
    except OSError:  # it has more: its user and its own group count all the same
        groups = b""
    return pid, uid, gid, struct.unpack(f"{len(groups) // 4}I", groups)

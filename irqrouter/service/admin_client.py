"""What the command line asks a service, over varlink; :mod:`irqrouter.service.admin` is the other side.

It decodes straight into the types of :mod:`irqrouter.service.status`. Whatever goes wrong is an :class:`AdminError`
that says what to do.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Final, TypeVar

import msgspec

from irqrouter.errors import CallerError
from irqrouter.service.admin import INTERFACE, NoSuchVector, NoSuchVm, ServiceStatus
from irqrouter.service.config import LogLevel
from irqrouter.service.status import Happening, VectorReport, VmStatus

#: For this long a service may take to answer.
_ANSWER_S: Final = 10.0
#: The longest reply: 4,096 vectors are two megabytes.
_REPLY_MAX: Final = 1 << 26


class AdminError(CallerError):
    """The service cannot be asked, or will not answer."""


class News(msgspec.Struct, frozen=True):
    """What happened, and how much was lost before it because it was not read in time."""

    happenings: list[Happening]
    lost: int


class _Call(msgspec.Struct, omit_defaults=True):
    method: str
    parameters: dict[str, str | int | None]
    more: bool = False


class _Reply(msgspec.Struct):
    parameters: msgspec.Raw = msgspec.Raw(b"{}")
    error: str | None = None
    continues: bool = False


class _Status(msgspec.Struct):
    status: ServiceStatus


class _Vms(msgspec.Struct):
    vms: list[VmStatus]


class _Vectors(msgspec.Struct):
    vectors: list[VectorReport]


class _Vector(msgspec.Struct):
    vector: VectorReport


class _Nothing(msgspec.Struct):
    pass


class _About(msgspec.Struct):
    vm: str = "?"
    vector: int = -1


T = TypeVar("T")


class AdminClient:
    """A connection to a service. One question at a time; a connection that follows what happens answers none."""

    def __init__(self, path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._path = path
        self._reader = reader
        self._writer = writer

    async def status(self) -> ServiceStatus:
        """The service itself."""
        return (await self._ask("GetStatus", _Status)).status

    async def vms(self) -> list[VmStatus]:
        """Every attached VM."""
        return (await self._ask("ListVms", _Vms)).vms

    async def vectors(self, vm: str) -> list[VectorReport]:
        """The VM's vectors."""
        return (await self._ask("ListVectors", _Vectors, vm=vm)).vectors

    async def vector(self, vm: str, vector: int) -> VectorReport:
        """One vector."""
        return (await self._ask("GetVector", _Vector, vm=vm, vector=vector)).vector

    async def set_log_level(self, level: LogLevel) -> None:
        """Have the service log from this level on."""
        await self._ask("SetLogLevel", _Nothing, level=level)

    async def detach(self, vm: str) -> None:
        """End the VM's connection."""
        await self._ask("Detach", _Nothing, vm=vm)

    async def monitor(self, vm: str | None = None, vector: int | None = None) -> AsyncGenerator[News, None]:
        """What happens from now on. The first news is empty: from there on nothing is missed."""
        await self._send(_Call(f"{INTERFACE}.Monitor", {"vm": vm, "vector": vector}, more=True))
        while True:
            yield self._decoded(await self._receive(), News)

    async def _ask(self, method: str, answer: type[T], **parameters: str | int | None) -> T:
        try:
            async with asyncio.timeout(_ANSWER_S):
                await self._send(_Call(f"{INTERFACE}.{method}", parameters))
                return self._decoded(await self._receive(), answer)
        except TimeoutError:
            raise AdminError(self._path, f"did not answer within {_ANSWER_S:.0f} s") from None

    async def _send(self, call: _Call) -> None:
        self._writer.write(msgspec.json.encode(call) + b"\0")
        with suppress(ConnectionError):  # the answer, or that there is none, is more telling
            await self._writer.drain()

    async def _receive(self) -> _Reply:
        try:
            raw = await self._reader.readuntil(b"\0")
            return msgspec.json.decode(raw[:-1], type=_Reply)
        except (asyncio.IncompleteReadError, ConnectionError):
            raise AdminError(self._path, "the service closed the connection") from None
        except (msgspec.MsgspecError, asyncio.LimitOverrunError) as error:
            raise AdminError(self._path, f"does not speak varlink as irqrouter does: {error}") from None

    def _decoded(self, reply: _Reply, answer: type[T]) -> T:
        if reply.error is not None:
            raise self._refusal(reply.error, reply.parameters)
        try:
            return msgspec.json.decode(reply.parameters, type=answer)
        except msgspec.MsgspecError as error:
            raise AdminError(self._path, f"the service's answer is not this version's: {error}") from None

    def _refusal(self, error: str, parameters: msgspec.Raw) -> AdminError:
        about = _About()
        with suppress(msgspec.MsgspecError):
            about = msgspec.json.decode(parameters, type=_About)
        if error == NoSuchVm.name:
            return AdminError(f"VM {about.vm}", "is not attached; see irqrouter status")
        if error == NoSuchVector.name:
            return AdminError(f"VM {about.vm}", f"has no vector {about.vector}; see irqrouter status {about.vm}")
        if error == "org.varlink.service.PermissionDenied":
            return AdminError(self._path, "answers administrators only: see admins in irqrouter.toml")
        return AdminError(self._path, f"refuses: {error}")


@asynccontextmanager
async def connected(path: str) -> "AsyncGenerator[AdminClient]":
    """A client of the service that listens at ``path``."""
    try:
        async with asyncio.timeout(_ANSWER_S):
            reader, writer = await asyncio.open_unix_connection(path, limit=_REPLY_MAX)
    except TimeoutError:
        raise AdminError(path, "the service does not accept") from None
    except OSError as error:
        raise _unreachable(path, error) from None
    try:
        yield AdminClient(path, reader, writer)
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def _unreachable(path: str, error: OSError) -> AdminError:
    match error:
        case FileNotFoundError():
            rule = "there is no socket: start irqrouter.socket or irqrouter serve, or name it with --admin-socket"
        case ConnectionRefusedError():
            rule = "no service listens: start irqrouter.socket or irqrouter serve"
        case PermissionError():
            rule = "this user may not open it: see SocketGroup= in docs/service.md"
        case _:
            rule = f"cannot be reached: {error.strerror or error}"
    return AdminError(path, rule)

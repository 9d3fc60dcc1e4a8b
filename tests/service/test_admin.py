"""The varlink interface, through asyncvarlink's own client, through the command line's, and through a bare socket."""

import asyncio
import contextlib
import dataclasses
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from asyncvarlink import TypedVarlinkErrorReply, VarlinkClientProtocol, VarlinkErrorReply, VarlinkInterface
from asyncvarlink.serviceinterface import InvalidParameter, PermissionDenied, VarlinkServiceInterface
from asyncvarlink.util import connect_unix_varlink

from irqrouter.service import admin
from irqrouter.service.admin import Admin, AdminServer, NoSuchVector, NoSuchVm, peer
from irqrouter.service.admin_client import AdminClient, AdminError, connected
from irqrouter.service.config import Access
from irqrouter.service.status import Happening, Happenings, VectorReport, VmStatus, What
from irqrouter.x86.msi import Message
from tests.service.fakes import FakeCore, FakeHost, listening_at, vector, vm

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("nothing_leaks")]


class Served:
    """An admin plane on the test's loop."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.core = FakeCore()
        self.host = FakeHost()
        self.happenings: Happenings = self.core.happenings
        self.server = AdminServer(self.core, self.host, self.happenings)
        self.host.listeners = lambda: self.server.listeners

    @contextlib.asynccontextmanager
    async def bare(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_unix_connection(self.path)
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


@pytest_asyncio.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    served = Served(tmp_path / "admin")
    with listening_at(Path(served.path)) as listener:
        serving = asyncio.ensure_future(served.server.serve(listener))
        yield served
        serving.cancel()
        await asyncio.wait({serving})
        assert serving.cancelled()
        assert not served.server.listeners
        assert not served.happenings


@contextlib.asynccontextmanager
async def proxy(served: Served, interface: type[VarlinkInterface] = Admin) -> AsyncIterator[Any]:
    """asyncvarlink's own client."""
    transport, protocol = await connect_unix_varlink(VarlinkClientProtocol, served.path)
    try:
        yield protocol.make_proxy(interface)
    finally:
        transport.close()
        await transport.closed_future


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


# --- the interface -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("promised", "sent"),
    [
        (admin.Vm, VmStatus),
        (admin.Vector, VectorReport),
        (admin.Happened, Happening),
        (admin.Service, admin.ServiceStatus),
        (admin.Message, Message),
    ],
)
async def test_admin_what_is_promised_is_what_is_sent(promised: type, sent: type[msgspec.Struct]) -> None:
    assert [field.name for field in dataclasses.fields(promised)] == list(sent.__struct_fields__)


async def test_admin_every_happening_has_its_word() -> None:
    words = {field.name: field.type for field in dataclasses.fields(admin.Happened)}["what"]
    assert {what.value for what in What} == set(words.__args__)  # type: ignore[union-attr]


async def test_admin_describes_itself(served: Served) -> None:
    async with proxy(served, VarlinkServiceInterface) as service:
        info = await service.GetInfo()
        assert info["interfaces"] == ["io.irqrouter.Admin", "org.varlink.service"]
        described = (await service.GetInterfaceDescription(interface="io.irqrouter.Admin"))["description"]
    assert described.startswith(
        "# Look into irqrouter, follow what happens, detach a VM.\ninterface io.irqrouter.Admin\n"
    )
    for line in (
        "method ListVms() -> (vms: []Vm)",
        "method ListVectors(vm: string) -> (vectors: []Vector)",
        "method GetVector(vm: string, vector: int) -> (vector: Vector)",
        "method Monitor(vm: ?string, vector: ?int) -> (happenings: []Happened, lost: int)",
        "method SetLogLevel(level: (debug, info, warning, error)) -> ()",
        "method Detach(vm: string) -> ()",
        "method GetStatus() -> (status: Service)",
        "error NoSuchVm (vm: string)",
        "error NoSuchVector (vm: string, vector: int)",
        "type Message (address: int, data: int)",
    ):
        assert f"\n{line}\n" in described


async def test_admin_answers_another_client_as_described(served: Served) -> None:
    served.core.attach(vm(), vector(0), vector(5, route=None, last_catch_us=None))
    async with proxy(served) as service:
        [attached] = (await service.ListVms())["vms"]
        assert dataclasses.asdict(attached) == msgspec.to_builtins(vm())
        first, second = (await service.ListVectors(vm="guest"))["vectors"]
        assert dataclasses.asdict(first) == msgspec.to_builtins(vector(0))
        assert (second.vector, second.route, second.last_catch_us) == (5, None, None)
        assert (await service.GetVector(vm="guest", vector=5))["vector"] == second
        assert (await service.GetStatus())["status"].loop == "fake"
        assert await service.SetLogLevel(level="debug") == {}
        assert served.host.log_level == "debug"
        assert await service.Detach(vm="guest") == {}
        assert served.core.detached == ["guest"]


async def test_admin_values_that_fill_64_bits_survive(served: Served) -> None:
    served.core.attach(vm(), vector(0, generation=2**64 - 1, message=Message(2**64 - 1, 2**32 - 1)))
    async with connected(served.path) as client:
        assert await client.vector("guest", 0) == served.core.vectors("guest")[0]


@pytest.mark.parametrize(
    ("method", "parameters", "error", "about"),
    [
        ("ListVectors", {"vm": "x"}, NoSuchVm, {"vm": "x"}),
        ("GetVector", {"vm": "x", "vector": 1}, NoSuchVm, {"vm": "x"}),
        ("GetVector", {"vm": "guest", "vector": -1}, NoSuchVector, {"vm": "guest", "vector": -1}),
        ("Detach", {"vm": "x"}, NoSuchVm, {"vm": "x"}),
    ],
)
async def test_admin_errors_are_typed(
    served: Served, method: str, parameters: dict[str, object], error: type[TypedVarlinkErrorReply], about: object
) -> None:
    served.core.attach(vm(), vector(0))
    async with proxy(served) as service:
        with pytest.raises(error) as refused:
            await getattr(service, method)(**parameters)
    assert refused.value.paramstojson() == about


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ({"method": "io.irqrouter.Admin.SetLogLevel", "parameters": {"level": "loud"}}, InvalidParameter.name),
        ({"method": "io.irqrouter.Admin.ListVectors"}, InvalidParameter.name),
        ({"method": "io.irqrouter.Admin.ListVms", "parameters": {"a": 1}}, InvalidParameter.name),
        ({"method": "io.irqrouter.Admin.Monitor"}, "org.varlink.service.ExpectedMore"),
        ({"method": "io.irqrouter.Admin.Errors"}, "org.varlink.service.MethodNotFound"),
        ({"method": "io.irqrouter.Other.ListVms"}, "org.varlink.service.InterfaceNotFound"),
        ({"method": 5}, "invalid.asyncvarlink.ProtocolViolation"),
    ],
)
async def test_admin_a_wrong_call_is_answered_and_the_next_one_too(
    served: Served, call: dict[str, object], error: str
) -> None:
    async with served.bare() as (reader, writer):
        writer.write(json.dumps(call).encode() + b"\0" + b'{"method":"io.irqrouter.Admin.ListVms"}\0')
        assert json.loads((await reader.readuntil(b"\0"))[:-1])["error"] == error
        assert json.loads((await reader.readuntil(b"\0"))[:-1]) == {"parameters": {"vms": []}}


async def test_admin_oneway_is_carried_out_and_not_answered(served: Served) -> None:
    async with served.bare() as (reader, writer):
        call = {"method": "io.irqrouter.Admin.SetLogLevel", "parameters": {"level": "error"}, "oneway": True}
        writer.write(json.dumps(call).encode() + b'\0{"method":"io.irqrouter.Admin.ListVms"}\0')
        assert b"vms" in await reader.readuntil(b"\0")
    assert served.host.log_level == "error"


# --- who may -----------------------------------------------------------------------------------------------------


async def test_admin_answers_administrators_only(served: Served) -> None:
    served.host.admins = Access(users=(4_000_000_000,))
    async with proxy(served) as service:
        with pytest.raises(VarlinkErrorReply) as refused:
            await service.Detach(vm="guest")
        # asyncvarlink's client knows an interface's own errors by their types, others by their names.
        assert refused.value.name == PermissionDenied.name
    async with connected(served.path) as client:
        with pytest.raises(AdminError, match="answers administrators only"):
            await client.vms()
    async with proxy(served, VarlinkServiceInterface) as service:
        with pytest.raises(PermissionDenied):
            await service.GetInfo()


async def test_admin_peer_is_who_connected() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        assert peer(ours) == (os.getpid(), os.geteuid(), os.getegid(), tuple(os.getgroups()))


# --- misbehaviour ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"{" * 70_000, id="endless"),
        pytest.param(b"[" * 60_000 + b"\0", id="deep"),
        pytest.param(b"no json\0", id="no json"),
        pytest.param(b"\xff\xfe\0", id="no text"),
        pytest.param(b"[]\0", id="no object"),
    ],
)
async def test_admin_what_is_no_call_ends_the_connection(served: Served, sent: bytes) -> None:
    async with served.bare() as (reader, writer):
        writer.write(sent)
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 10) == b""
    async with connected(served.path) as client:
        assert await client.vms() == []


async def test_admin_one_connection_too_many_is_closed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "CONNECTIONS_MAX", 1)
    async with connected(served.path) as client:
        assert await client.vms() == []
        async with served.bare() as (reader, _):
            assert await asyncio.wait_for(reader.read(), 10) == b""
        assert await client.vms() == []


async def test_admin_a_client_that_only_calls_is_not_served_ahead(served: Served) -> None:
    """Who does not read its answers is asked nothing more: the memory it takes is bounded."""
    served.core.attach(vm(), *(vector(number) for number in range(500)))
    calls = 0
    listed = served.core.vectors

    def counted(name: str) -> list[VectorReport]:
        nonlocal calls
        calls += 1
        return listed(name)

    served.core.vectors = counted  # type: ignore[method-assign]
    call = b'{"method":"io.irqrouter.Admin.ListVectors","parameters":{"vm":"guest"}}\0'
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, served.path)
        await asyncio.get_running_loop().sock_sendall(sock, call * 200)
        await until(lambda: calls)
        async with connected(served.path) as client:
            for _ in range(20):
                await client.vms()
    assert 0 < calls < 20


# --- following ---------------------------------------------------------------------------------------------------


async def test_admin_monitor_from_its_first_reply_on_misses_nothing(served: Served) -> None:
    async with connected(served.path) as client, contextlib.aclosing(client.monitor()) as news:
        first = await anext(news)
        assert (first.happenings, first.lost) == ([], 0)
        assert served.server.listeners == 1
        served.happenings.tell("a", What.ATTACHED)
        served.happenings.tell("a", What.CAUGHT, 3, 9, "twice")
        told = (await anext(news)).happenings
    assert [(each.vm, each.what, each.vector, each.generation, each.detail) for each in told] == [
        ("a", What.ATTACHED, None, None, ""),
        ("a", What.CAUGHT, 3, 9, "twice"),
    ]


async def test_admin_monitor_of_one_vector_hears_of_its_vm_too(served: Served) -> None:
    async with connected(served.path) as client, contextlib.aclosing(client.monitor("a", 3)) as news:
        await anext(news)
        for name, what, number in [
            ("b", What.ATTACHED, None), ("a", What.CAUGHT, 4), ("b", What.CAUGHT, 3), ("a", What.CAUGHT, 3),
            ("a", What.DETACHED, None),
        ]:  # fmt: skip
            served.happenings.tell(name, what, number)
        told = (await anext(news)).happenings
    assert [(each.vm, each.what, each.vector) for each in told] == [("a", What.CAUGHT, 3), ("a", What.DETACHED, None)]


async def test_admin_monitor_with_another_client(served: Served) -> None:
    async with proxy(served) as service:
        stream = service.Monitor()
        assert await anext(stream) == {"happenings": [], "lost": 0}
        served.happenings.tell("a", What.FAULTED, 3, 9)
        [told] = (await anext(stream))["happenings"]
        assert (told.vm, told.what, told.vector, told.generation) == ("a", "faulted", 3, 9)
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        waiting.cancel()  # what is pending in asyncvarlink's client is taken back like this
        await asyncio.wait({waiting})


async def test_admin_monitor_never_waits_for_a_listener_that_is_slow(served: Served) -> None:
    async with connected(served.path) as client, contextlib.aclosing(client.monitor()) as news:
        await anext(news)
        sent = 200_000
        for number in range(sent):
            served.happenings.tell("a", What.CAUGHT, 0, number)
            if not number % 10_000:
                await asyncio.sleep(0)
        received, lost, last = 0, 0, -1
        async for each in news:
            received += len(each.happenings)
            lost += each.lost
            generations = [happening.generation or 0 for happening in each.happenings]
            assert generations == sorted(generations)
            assert generations[0] > last
            last = generations[-1]
            if last == sent - 1:
                break
    assert received + lost == sent
    assert lost


@pytest.mark.parametrize("goodbye", ["close", "half-close", "reset", "talk"])
async def test_admin_monitor_notices_that_its_client_has_gone(served: Served, goodbye: str) -> None:
    async with served.bare() as (reader, writer):
        writer.write(b'{"method":"io.irqrouter.Admin.Monitor","more":true}\0')
        await reader.readuntil(b"\0")
        assert served.server.listeners == 1
        match goodbye:
            case "close":
                writer.close()
            case "half-close":
                writer.write_eof()
            case "reset":
                served.happenings.tell("a", What.ATTACHED)  # a message that it never reads
                await asyncio.sleep(0)
                writer.transport.abort()
            case _:
                writer.write(b'{"method":"io.irqrouter.Admin.ListVms"}\0')
        await until(lambda: not served.server.listeners)
        await until(lambda: not served.happenings)


async def test_admin_client_says_that_the_service_ended(tmp_path: Path) -> None:
    served = Served(tmp_path / "admin")
    with listening_at(Path(served.path)) as listener:
        serving = asyncio.ensure_future(served.server.serve(listener))
        async with connected(served.path) as client, contextlib.aclosing(client.monitor()) as news:
            await anext(news)
            serving.cancel()
            with pytest.raises(AdminError, match="the service closed the connection"):
                await anext(news)
        await asyncio.wait({serving})


# --- the command line's client -----------------------------------------------------------------------------------


async def test_admin_client_reads_what_the_server_says(served: Served) -> None:
    served.core.attach(vm(), vector(0), vector(5, route=None, last_catch_us=None))
    async with connected(served.path) as client:
        assert await client.vms() == [vm()]
        assert await client.vectors("guest") == served.core.vectors("guest")
        assert await client.vector("guest", 5) == vector(5, route=None, last_catch_us=None)
        assert (await client.status()).uptime_s == 2.5
        await client.set_log_level("warning")
        await client.detach("guest")
    assert (served.host.log_level, served.core.detached) == ("warning", ["guest"])


async def test_admin_client_4096_vectors_in_one_answer(served: Served) -> None:
    served.core.attach(vm(), *(vector(number) for number in range(4096)))
    async with connected(served.path) as client:
        assert len(await client.vectors("guest")) == 4096


async def test_admin_client_errors_say_what_to_do(served: Served, tmp_path: Path) -> None:
    served.core.attach(vm(), vector(0))
    async with connected(served.path) as client:
        with pytest.raises(AdminError, match="VM x: is not attached; see irqrouter status"):
            await client.vectors("x")
        with pytest.raises(AdminError, match="VM guest: has no vector 7; see irqrouter status guest"):
            await client.vector("guest", 7)
    with pytest.raises(AdminError, match=r"there is no socket: start irqrouter\.socket"):
        async with connected(str(tmp_path / "none")):
            pass
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "stale"))
    with pytest.raises(AdminError, match="no service listens"):
        async with connected(str(tmp_path / "stale")):
            pass
    with pytest.raises(AdminError, match="cannot be reached: "):
        async with connected("/dev/null/socket"):
            pass


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"220 mail.example SMTP\0", "does not speak varlink"),
        (b'{"parameters":{"vms":[{"name":1}]}}\0', "the service's answer is not this version's"),
        (b'{"error":"org.example.No"}\0', "refuses: org.example.No"),
        (b'{"error":"io.irqrouter.Admin.NoSuchVm","parameters":[]}\0', r"VM \?: is not attached"),
        (b"", "the service closed the connection"),
    ],
)
async def test_admin_client_withstands_any_answer(answer: bytes, says: str) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with theirs:
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        theirs.sendall(answer)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(AdminError, match=says):
            await AdminClient("path", reader, writer).vms()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_admin_accept_survives_that_there_are_no_descriptors(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    tries = 0

    class Refusing:
        async def sock_accept(self, listener: socket.socket) -> tuple[socket.socket, object]:
            nonlocal tries
            tries += 1
            if tries == 1:
                raise OSError(24, "Too many open files")
            return await loop.sock_accept(listener)

    monkeypatch.setattr("irqrouter.service.admin.asyncio.get_running_loop", Refusing)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind("")
        listener.listen()
        listener.setblocking(False)
        client.connect(listener.getsockname())
        (await admin.accepted(listener)).close()
    assert tries == 2

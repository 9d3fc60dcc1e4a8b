"""Who may attach and how, what one VM may take, and that nothing is left of one that goes."""

import asyncio
import errno
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from irqrouter.service import server as server_module
from irqrouter.service.config import Access, Config, Limits
from irqrouter.service.server import Server, UnknownVmError
from irqrouter.service.session import Peer
from irqrouter.service.status import Happening, Happenings, Subscription, What
from irqrouter.service.wire import (
    Code,
    Command,
    Feature,
    Frame,
    Kind,
    RemapperKind,
    SlotState,
    WireError,
    decode,
    encode_hello,
    error_of,
)
from irqrouter.x86.msi import Message
from tests.service.client import (
    BOTH,
    EndedError,
    Line,
    Service,
    attached,
    connect,
    connect_from_another_process,
    connected,
    delivered,
    descriptors,
    eventfd,
    hello,
    msi,
    seqpackets,
    serving,
    turns,
    until,
)

pytestmark = pytest.mark.asyncio


async def refused(line: Line) -> WireError:
    """The error reply that comes, and then the end."""
    (frame,) = await line.ended()
    return error_of(frame)


async def told(subscription: Subscription, what: What) -> Happening:
    """The next thing of that kind that happens."""
    while (happening := await subscription.get()).what is not what:
        pass
    return happening


# --- HELLO -------------------------------------------------------------------------------------------------------


async def test_welcome_says_what_holds() -> None:
    config = Config(limits=Limits(vectors=100, regions=7, frames_per_second=1234))
    async with serving(config) as service, attached(service, hello("big", slots=200)):
        with connected(service, hello("small", slots=10, features=Feature.WIDE)) as agent:
            welcome = await agent.hello()
            assert (welcome.version, welcome.vectors_max, welcome.features) == (1, 10, Feature.WIDE)
            assert (welcome.regions_max, welcome.frames_per_second) == (7, 1234)
        with connected(service, hello("third", slots=200)) as agent:
            assert (await agent.hello()).vectors_max == 100


async def test_version_from_the_future_is_refused_with_the_range_we_speak() -> None:
    async with serving() as service:
        with connected(service, msgspec.structs.replace(hello(), version_low=2, version_high=9)) as agent:
            with pytest.raises(WireError, match="the service 1 to 1") as caught:
                await agent.hello()
            assert (caught.value.code, caught.value.errno) == (Code.VERSION, errno.EPROTONOSUPPORT)
            await agent.requests.ended()
        with connected(service, msgspec.structs.replace(hello(), version_low=1, version_high=9)) as agent:
            assert (await agent.hello()).version == 1


async def test_hello_that_appends_what_we_do_not_know_is_welcome() -> None:
    async with serving() as service:
        line = Line(connect(service.address))
        ours, theirs = seqpackets()
        with ours, theirs:
            bell = eventfd()
            line.send(Frame(0, Command.HELLO, encode_hello(hello()) + bytes(100)), [theirs.fileno(), bell])
            raw, given = await line.receive()
            assert not decode(raw).errno
            for fd in (*given, bell):
                os.close(fd)
        line.close()
        await until(lambda: not service.server.vms())


@pytest.mark.parametrize("command", [Command.PING, Command.ADD, Command.MEMORY, Command.INVALIDATE, 99])
async def test_anything_before_hello_is_refused(command: int) -> None:
    async with serving() as service, attached(service) as honest:
        line = Line(connect(service.address))
        line.send(Frame(7, command))
        error = await refused(line)
        assert (error.code, error.errno) == (Code.ORDER, errno.EPROTO)
        line.close()
        await honest.ping()
        assert service.logged("turned away")[0]["pid"] == os.getpid()


async def test_second_hello_changes_nothing() -> None:
    async with serving() as service, attached(service) as agent:
        with pytest.raises(WireError) as caught:
            await agent.request(Command.HELLO, encode_hello(hello("other")))
        assert caught.value.code is Code.ORDER
        await agent.ping()
        assert [vm.name for vm in service.server.vms()] == ["vm"]


async def test_page_is_sealed_and_of_the_size_the_protocol_says() -> None:
    import fcntl

    async with serving() as service, attached(service, hello(slots=65)) as agent:
        assert os.fstat(agent.page.fd).st_size == 4096 + 8192
        assert agent.page.seals() & 7 == fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        with pytest.raises(PermissionError):
            os.ftruncate(agent.page.fd, 4096)
        with pytest.raises(PermissionError):
            os.ftruncate(agent.page.fd, 1 << 20)
        with pytest.raises(PermissionError):
            fcntl.fcntl(agent.page.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


async def test_process_that_may_not_attach_is_refused() -> None:
    config = Config(clients=Access(users=(os.getuid() + 1,)))
    async with serving(config) as service, _stranger(service) as line:
        error = await refused(line)
        assert (error.code, error.errno) == (Code.PEER, errno.EACCES)
        assert service.logged("turned away")[0]["uid"] == os.getuid()


async def test_process_may_attach_by_any_of_its_groups() -> None:
    groups = [os.getgid(), *os.getgroups()]
    config = Config(clients=Access(groups=(groups[-1],)))
    async with serving(config) as service, attached(service) as agent:
        await agent.ping()


class _stranger:  # noqa: N801 - used like a function
    """A connection that has just said HELLO with all it takes."""

    def __init__(self, service: Service, connection: socket.socket | None = None, name: str = "vm") -> None:
        self._line = Line(connection or connect(service.address))
        self._name = name

    async def __aenter__(self) -> Line:
        ours, theirs = seqpackets()
        bell = eventfd()
        with ours, theirs:
            self._line.send(Frame(0, Command.HELLO, encode_hello(hello(self._name))), [theirs.fileno(), bell])
        os.close(bell)
        return self._line

    async def __aexit__(self, *_: object) -> None:
        self._line.close()


# --- names -------------------------------------------------------------------------------------------------------


async def test_c3_same_process_replaces_its_former_connection_completely() -> None:
    async with serving() as service:
        before = descriptors()
        async with attached(service) as former:
            vector = former.create(0, index=5)
            await former.add(vector)
            async with attached(service) as agent:
                assert await former.requests.ended() == []
                with pytest.raises(EndedError):
                    await former.batches.receive()
                # The eventfd is no vector any more, so it can be one again.
                again = agent.create(0, index=5, fd=vector.fd)
                await agent.add(again)
                agent.guest.route(5, 0x41)
                agent.fire(again)
                agent.obey(await agent.batch())
                assert agent.delivered == [(0, delivered(0x41))]
                assert [vm.vectors for vm in service.server.vms()] == [1]
        assert descriptors() == before


async def test_other_process_cannot_take_a_name() -> None:
    async with serving() as service, attached(service) as agent:
        async with _stranger(service, connect_from_another_process(service.address)) as line:
            error = await refused(line)
            assert (error.code, error.errno) == (Code.NAME, errno.EADDRINUSE)
        await agent.ping()
        assert service.logged("turned away")[0]["pid"] != os.getpid()
        async with _stranger(service, connect_from_another_process(service.address), name="other") as line:
            raw, given = await line.receive()
            assert not decode(raw).errno
            os.close(given[0])
        await until(lambda: len(service.server.vms()) == 1)


async def test_processes_we_cannot_see_are_never_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel gives pid 0 for each of those in another namespace."""
    monkeypatch.setattr(server_module, "_peer", lambda _: Peer(0, os.getuid(), os.getgid()))
    async with serving() as service, attached(service) as agent:
        async with _stranger(service) as line:
            assert (await refused(line)).code is Code.NAME
        await agent.ping()


@pytest.mark.parametrize("name", [b"", b"a b", b"a/b", b"\xc3\xa9", b"a\0b", b"x" * 64])
async def test_names_that_are_none(name: bytes) -> None:
    async with serving() as service:
        line = Line(connect(service.address))
        payload = encode_hello(hello("x"))[:32] + name.ljust(64, b"\0")
        line.send(Frame(0, Command.HELLO, payload))
        error = await refused(line)
        assert (error.code, error.errno) == (Code.NAME, errno.EINVAL)
        line.close()


# --- limits ------------------------------------------------------------------------------------------------------


async def test_more_vms_than_may_be() -> None:
    async with serving(Config(limits=Limits(vms=2))) as service, attached(service, hello("one")):
        async with attached(service, hello("two")):
            async with _stranger(service, name="three") as line:
                error = await refused(line)
                assert (error.code, error.errno) == (Code.QUOTA, errno.EDQUOT)
            async with attached(service, hello("two")) as again:  # who replaces itself takes no more
                await again.ping()
        async with attached(service, hello("three")) as agent:
            await agent.ping()


async def test_more_vectors_than_may_be_and_reconfigure() -> None:
    async with serving(Config(limits=Limits(vectors=3))) as service, attached(service) as agent:
        vectors = [agent.create(number) for number in range(5)]
        await agent.add(*vectors[:2])
        before = descriptors()
        with pytest.raises(WireError) as caught:
            await agent.add(*vectors[2:4])
        assert (caught.value.code, caught.value.errno) == (Code.QUOTA, errno.EDQUOT)
        assert descriptors() == before
        await agent.add(vectors[2])
        service.server.reconfigure(Config(limits=Limits(vectors=4)))
        await agent.add(vectors[3])
        with pytest.raises(WireError):
            await agent.add(vectors[4])
        agent.free(vectors[0])
        await until(lambda: service.server.vms()[0].vectors == 3)
        await agent.add(vectors[4])


async def test_more_regions_than_may_be() -> None:
    async with serving(Config(limits=Limits(regions=1))) as service, attached(service) as agent:
        regions = [msgspec.structs.replace(each, size=4096) for each in agent.guest.regions]
        with pytest.raises(WireError) as caught:
            await agent.memory([*regions, msgspec.structs.replace(regions[0], gpa=1 << 30)])
        assert caught.value.code is Code.QUOTA
        await agent.ping()


async def test_frames_beyond_the_limit_wait_and_are_answered_all_the_same() -> None:
    async with (
        serving(Config(limits=Limits(frames_per_second=100))) as service,
        attached(service) as agent,
        attached(service, hello("honest"), obedient=True) as honest,
    ):
        for count in range(150):
            agent.requests.send(Frame(count, Command.PING))
        vector = honest.create(0, index=5)
        honest.guest.route(5, 0x41)
        await honest.add(vector)
        await until(lambda: honest.operations == 1)  # nobody else waits for that
        assert next(vm for vm in service.server.vms() if vm.name == "vm").frames <= 101
        for count in range(150):
            assert (await agent.requests.frame()).id == count


async def test_reconfigured_prefetching_holds_at_once() -> None:
    async with serving() as service, attached(service) as agent:
        service.server.reconfigure(Config(prefetch=False))
        agent.guest.route(5, 0x41)
        await agent.add(agent.create(0, index=5))
        await turns()
        assert agent.no_batch()
        service.server.reconfigure(Config(prefetch=True))
        agent.deassign(agent.vectors[0])
        assert (await agent.batch()).kinds == [Kind.PREPARE]


async def test_reconfigured_clients_hold_for_newcomers() -> None:
    async with serving() as service, attached(service) as agent:
        service.server.reconfigure(Config(clients=Access()))
        await agent.ping()
        async with _stranger(service, name="late") as line:
            assert (await refused(line)).code is Code.PEER


# --- strangers -----------------------------------------------------------------------------------------------------


async def test_who_does_not_say_hello_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HELLO_S", 0.05)
    async with serving() as service:
        line = Line(connect(service.address))
        assert await line.ended() == []
        line.close()
        (entry,) = service.logged("turned away")
        assert (entry["pid"], "said nothing" in entry["why"]) == (os.getpid(), True)


async def test_strangers_are_limited_and_the_attached_notice_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "STRANGERS_MAX", 4)
    async with serving() as service, attached(service) as agent:
        strangers = [Line(connect(service.address)) for _ in range(4)]
        await turns()
        late = Line(connect(service.address))
        assert await late.ended() == []
        late.close()
        await agent.ping()
        assert "strangers" in service.logged("turned away")[0]["why"]
        strangers.pop().close()
        await until(lambda: len(service.logged("turned away")) == 2)
        async with attached(service, hello("other")) as other:
            await other.ping()
        for stranger in strangers:
            stranger.close()


async def test_newcomers_wait_while_too_much_is_being_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    closing = SimpleNamespace(busy=server_module.STRANGERS_MAX)
    monkeypatch.setattr(server_module, "closer", closing)
    async with serving() as service:
        line = Line(connect(service.address))
        line.send(Frame(0, Command.PING))
        await asyncio.sleep(0.05)
        assert line.receive_now() is None
        assert service.logged("nobody is let in")
        closing.busy = 0
        assert (await refused(line)).code is Code.ORDER
        line.close()


async def test_who_leaves_without_a_word_leaves_nothing() -> None:
    async with serving() as service:
        before = descriptors()
        for _ in range(20):
            connect(service.address).close()
        await until(lambda: descriptors() == before)


# --- its end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["requests", "batches"])
async def test_everything_is_released_when_an_agent_closes_a_socket(which: str) -> None:
    async with serving() as service:
        before, maps = descriptors(), _pages()
        async with attached(service, hello(slots=300)) as agent:
            vectors = [agent.create(number, index=number) for number in range(200)]
            await agent.add(*vectors)
            (status,) = service.server.vms()
            ours = 2 + 1 + 1 + 2 + len(vectors)  # sockets, doorbell, memory, the page and its map's, eventfds
            assert len(descriptors()) == len(before) + ours + status.descriptors
            assert _pages() == maps + 2  # the agent's and the service's
            (agent.requests if which == "requests" else agent.batches).close()
            await until(lambda: not service.server.vms())
            assert len(descriptors()) == len(before) + ours - 1
            assert _pages() == maps + 1
        assert descriptors() == before
        (line,) = service.logged("detached")
        assert (line["vm"], line["pid"], line["log_level"]) == ("vm", os.getpid(), "info")


def _pages() -> int:
    return Path("/proc/self/maps").read_text().count("irqrouter-state")


async def test_everything_is_released_when_the_service_ends() -> None:
    before = descriptors()
    async with serving() as service:
        with connected(service) as agent:
            await agent.hello()
            await agent.memory()
            await agent.add(agent.create(0), agent.create(1))
    assert descriptors() == before


async def test_detach_ends_a_vm_and_it_may_come_again() -> None:
    async with serving() as service, attached(service) as agent, attached(service, hello("other")) as other:
        with pytest.raises(UnknownVmError):
            service.server.detach("nobody")
        service.server.detach("vm")
        assert await agent.requests.ended() == []
        assert [vm.name for vm in service.server.vms()] == ["other"]
        await other.ping()
        async with attached(service) as again:
            await again.ping()
        assert "administrator" in service.logged("detached")[0]["why"]


async def test_detach_twice_and_death_at_once_are_one_end() -> None:
    async with serving() as service, attached(service) as agent:
        service.server.detach("vm")
        service.server.detach("vm")
        agent.requests.close()
        agent.batches.close()
        await until(lambda: not service.server.vms())
        assert len(service.logged("detached")) == 1


async def test_b5_agent_that_is_stopped_costs_nobody_anything() -> None:
    async with serving() as service, attached(service) as stopped, attached(service, hello("other")) as agent:
        vectors = [stopped.create(number, index=number) for number in range(60)]
        for vector in vectors:
            stopped.guest.route(vector.number, 0x41)
        await stopped.add(*vectors)
        for _ in range(50):  # and it reads nothing
            for vector in vectors:
                stopped.renew(vector, ring=False)
            stopped.ring()
            await agent.ping()
        assert next(vm for vm in service.server.vms() if vm.name == "vm").operations <= 60


# --- what it tells -------------------------------------------------------------------------------------------------


async def test_status_and_vectors_say_what_is() -> None:
    async with serving() as service, attached(service) as agent:
        with pytest.raises(UnknownVmError):
            service.server.vectors("nobody")
        wanted = agent.guest.route(5, 0x41)
        prepared = agent.create(2, index=5, requester=0x1234)
        masked = agent.create(1, index=6, state=SlotState.MASKED)
        odd = agent.create(7, state=9)
        await agent.add(prepared, masked, odd)
        agent.obey(await agent.batch())
        agent.store(prepared, last_catch_ns=1500, discarded=3)
        (status,) = service.server.vms()
        assert (status.name, status.pid, status.uid) == ("vm", os.getpid(), os.getuid())
        assert (status.remapper, sorted(status.features)) == ("VTD", ["PREPARE", "WIDE"])
        assert (status.vectors, status.deassigned, status.masked, status.prepared, status.assigned) == (3, 1, 1, 1, 0)
        assert (status.regions, status.descriptors, status.operations) == (1, 3 + 6 + 1, 1)
        assert (status.frames, status.attached_s >= 0, status.bytes > 0) == (2, True, True)
        reports = service.server.vectors("vm")
        assert [(report.vector, report.state) for report in reports] == [
            (1, "masked"),
            (2, "deassigned"),
            (7, "unknown (9)"),
        ]
        report = reports[1]
        assert (report.message, report.route, report.prepared) == (msi(5), wanted, True)
        assert (report.requester, report.cookie, report.gsi, report.discarded) == (0x1234, 5, 26, 3)
        assert (report.generation, report.last_catch_us) == (prepared.slot.generation, 1.5)


async def test_happenings_tell_a_vectors_life() -> None:
    async with serving() as service:
        with service.happenings.subscribed() as happening:
            async with attached(service) as agent:
                assert (await told(happening, What.ATTACHED)).vm == "vm"
                agent.guest.route(5, 0x41)
                vector = agent.create(3, index=5)
                await agent.add(vector)
                assert (await told(happening, What.ADDED)).vector == 3
                agent.obey(await agent.batch())
                assert (await told(happening, What.PREPARED)).generation == vector.slot.generation
                agent.fire(vector)  # the service sees it in the page alone
                assert (await told(happening, What.CAUGHT)).vector == 3
                late = agent.deassign
                late(vector)
                assert (await told(happening, What.RENEWED)).generation == vector.slot.generation
                agent.guest.entry(5, 0)
                agent.obey(await agent.batch())
                agent.deassign(vector)
                agent.fire(vector)
                assert (await told(happening, What.FIRED)).vector == 3
                agent.obey(await agent.batch())
                assert (await told(happening, What.FAULTED)).vector == 3
                agent.store(vector, state=SlotState.ASSIGNED)
                assert (await told(happening, What.ASSIGNED)).vector == 3
                agent.free(vector)
                assert (await told(happening, What.REMOVED)).vector == 3
            assert "closed" in (await told(happening, What.DETACHED)).detail
            Line(connect(service.address)).close()
            assert str(os.getpid()) in (await told(happening, What.REFUSED)).detail


async def test_slow_subscribers_lose_the_oldest_and_hold_up_nobody() -> None:
    async with serving() as service, attached(service) as agent:
        with service.happenings.subscribed() as slow:
            for _ in range(Happenings.KEPT // 2):
                await agent.invalidate()
            for number in range(20):
                vector = agent.create(number)
                await agent.add(vector)
            for _ in range(Happenings.KEPT // 2):
                await agent.invalidate()
            assert slow.lost >= 20
            kept = await slow.take(1 << 20)
            assert len(kept) == Happenings.KEPT
            assert kept[-1].what is What.RENEWED
        assert not service.happenings


async def test_cannot_accept_for_want_of_descriptors_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are attached go on, and newcomers wait."""
    real = asyncio.sleep
    naps: list[float] = []

    async def nap(seconds: float) -> None:
        naps.append(seconds)
        await real(0)

    class Exhausted(socket.socket):
        failures = 1

        def accept(self) -> tuple[socket.socket, object]:
            if self.failures:
                self.failures -= 1
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    monkeypatch.setattr(asyncio, "sleep", nap)
    with Exhausted(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind("")
        listener.listen()
        server = Server(Config(), Happenings())
        task = asyncio.create_task(server.serve(listener))
        line = Line(connect(listener.getsockname()))
        line.send(Frame(0, Command.PING))
        assert (await refused(line)).code is Code.ORDER
        line.close()
        task.cancel()
        await asyncio.wait([task])
    assert 1 in naps


async def test_remappers_are_those_of_the_protocol() -> None:
    async with serving() as service:
        for kind in RemapperKind:
            async with attached(service, hello(kind.name, remapper=kind, features=BOTH)) as agent:
                await agent.ping()
                if kind in (RemapperKind.NONE, RemapperKind.VMM):
                    with pytest.raises(WireError) as caught:
                        await agent.memory()
                    assert caught.value.code is Code.ORDER
                agent.create(0, message=Message(0xFEE0_0000, 1))
                await agent.add(agent.vectors[0])

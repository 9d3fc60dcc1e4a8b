"""irqrouter.uevents on real netlink sockets, on both event loops.

What the machine's own kernel says is provoked by synthetic events, told apart by their UUID. What must not reach
anybody else (PCI removals, malformed and forged messages, floods) is sent in a network namespace of the test's own,
through the kernel: lib/kobject_uevent.c:uevent_net_rcv broadcasts, as the kernel's, whatever a privileged process
of that namespace sends it.
"""

import asyncio
import ctypes
import os
import resource
import select
import socket
import struct
import uuid
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias, TypeVar

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from irqrouter.errors import CallerError, KernelError
from irqrouter.uevents import (
    MalformedUeventError,
    Uevent,
    Uevents,
    UeventsLost,
    departed_pci_device,
    parse_uevent,
)

T = TypeVar("T")

Run: TypeAlias = Callable[[Coroutine[object, object, T]], T]

NULL = Path("/sys/class/mem/null/uevent")

# As the kernel sends them when a device bound to vfio-pci is unbound, then removed.
UNBIND = (
    b"unbind@/devices/pci0000:00/0000:00:1c.0/0000:03:00.0\0ACTION=unbind\0"
    b"DEVPATH=/devices/pci0000:00/0000:00:1c.0/0000:03:00.0\0SUBSYSTEM=pci\0PCI_CLASS=20000\0PCI_ID=8086:10D3\0"
    b"PCI_SUBSYS_ID=8086:0000\0PCI_SLOT_NAME=0000:03:00.0\0"
    b"MODALIAS=pci:v00008086d000010D3sv00008086sd00000000bc02sc00i00\0SEQNUM=1844\0"
)
REMOVE = UNBIND.replace(b"unbind", b"remove").replace(b"1844", b"1845")


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run[object]:
    """Run a coroutine to its end on a fresh loop, within a time limit."""

    async def limited(main: Coroutine[object, object, object]) -> object:
        async with asyncio.timeout(20):
            return await main

    def run_it(main: Coroutine[object, object, object]) -> object:
        factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.SelectorEventLoop
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(limited(main))

    return run_it


class Namespace:
    """A network namespace of the test's own: a listener in it, and the means to send there as the kernel does."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self.events = thread.submit(Uevents).result()
        self.sender = thread.submit(socket.socket, socket.AF_NETLINK, socket.SOCK_DGRAM, 15).result()

    def broadcast(self, *messages: bytes) -> None:
        """Have the kernel send each message, with its SEQNUM appended, to its group."""
        for message in messages:
            self.sender.sendto(struct.pack("=IHHII", 16 + len(message), 16, 1, 0, 0) + message, (0, 0))

    def unicast(self, message: bytes) -> None:
        """Send a message to the listener without the kernel's doing."""
        with socket.socket(fileno=os.dup(self.events.fileno())) as listener:
            self.sender.sendto(message, (listener.getsockname()[0], 0))


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    libc = ctypes.CDLL(None, use_errno=True)
    with ThreadPoolExecutor(max_workers=1) as thread:
        clone_newnet = 0x40000000
        if thread.submit(libc.unshare, clone_newnet).result() != 0:
            cannot("unshare(CLONE_NEWNET) is refused: needs CAP_SYS_ADMIN")
        namespace = Namespace(thread)
        try:
            yield namespace
        finally:
            namespace.sender.close()
            namespace.events.close()


def cannot(reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def provoke(marker: str) -> None:
    """Have the kernel send a change of /dev/null that carries ``marker``, a UUID."""
    if not os.access(NULL, os.W_OK):
        cannot(f"{NULL} is not writable")
    NULL.write_text(f"change {marker} TEST=irqrouter")


async def awaited(events: Uevents, marker: str) -> Uevent:
    """The event that carries ``marker``; others on this machine are passed over."""
    async for event in events:
        if isinstance(event, Uevent) and event.properties.get("SYNTH_UUID") == marker:
            return event
    raise AssertionError("the iteration ended")


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_provoked_event_arrives_with_every_field(run: Run[Uevent]) -> None:
    async def main() -> Uevent:
        async with Uevents() as events:
            marker = str(uuid.uuid4())
            provoke(marker)
            return await awaited(events, marker)

    event = run(main())

    assert (event.action, event.devpath, event.subsystem) == ("change", "/devices/virtual/mem/null", "mem")
    assert event.properties["DEVNAME"] == "null"
    assert event.properties["SYNTH_ARG_TEST"] == "irqrouter"
    assert event.properties["ACTION"] == "change"


def test_event_provoked_while_waiting_wakes_the_reader(run: Run[str]) -> None:
    async def main() -> str:
        async with Uevents() as events:
            marker = str(uuid.uuid4())
            waiting = asyncio.create_task(awaited(events, marker))
            await asyncio.sleep(0)
            provoke(marker)
            return (await waiting).action

    assert run(main()) == "change"


def test_events_before_the_first_read_are_kept_in_order(run: Run[None], namespace: Namespace) -> None:
    async def main() -> None:
        namespace.broadcast(UNBIND, REMOVE, UNBIND)
        got = [await anext(namespace.events) for _ in range(3)]
        assert [event.action for event in got if isinstance(event, Uevent)] == ["unbind", "remove", "unbind"]

    run(main())


def test_removal_through_the_kernel_gives_the_address(run: Run[None], namespace: Namespace) -> None:
    async def main() -> None:
        namespace.broadcast(UNBIND, REMOVE)
        for action in ("unbind", "remove"):
            event = await anext(namespace.events)
            assert isinstance(event, Uevent)
            assert event.action == action
            assert departed_pci_device(event) == "0000:03:00.0"

    run(main())


def test_malformed_messages_are_logged_and_passed_over(run: Run[object], namespace: Namespace) -> None:
    hostile = [
        b"\0",
        b"\xff\xfe@/x\0ACTION=remove\0",
        b"remove@/x\0ACTION=remove\0DEVPATH=/y\0SUBSYSTEM=pci\0",
        b"libudev\0" + bytes(64) + b"\0ACTION=remove\0DEVPATH=/x\0SUBSYSTEM=pci\0",
        b"libudev\0",
        b"remove@/x\0header=1\0junk\0ACTION=remove\0",
        b"A" * 1900,
    ]
    namespace.broadcast(*hostile, REMOVE)

    with capture_logs() as logs:
        event = run(anext(namespace.events))

    assert isinstance(event, Uevent)
    assert event.action == "remove"
    assert [log["event"] for log in logs] == ["uevent ignored: malformed"] * len(hostile)
    assert all("rule" in log for log in logs)


def test_message_of_another_process_is_logged_and_passed_over(run: Run[object], namespace: Namespace) -> None:
    namespace.unicast(REMOVE)
    namespace.broadcast(UNBIND)

    with capture_logs() as logs:
        event = run(anext(namespace.events))

    assert isinstance(event, Uevent)
    assert event.action == "unbind"
    assert [log["event"] for log in logs] == ["uevent ignored: not from the kernel, or too long"]
    assert logs[0]["sender"][0] != 0


def test_overrun_is_reported_once_and_reading_goes_on(run: Run[None], namespace: Namespace) -> None:
    sent = 2000

    async def main() -> None:
        namespace.broadcast(*[UNBIND] * sent)
        assert await anext(namespace.events) == UeventsLost()
        kept = 0
        while select.select([namespace.events.fileno()], [], [], 0)[0]:
            assert isinstance(await anext(namespace.events), Uevent)
            kept += 1
        assert 0 < kept < sent
        namespace.broadcast(REMOVE)
        event = await anext(namespace.events)
        assert isinstance(event, Uevent)
        assert event.action == "remove"

    run(main())


def test_flood_leaves_the_loop_to_others(run: Run[None], namespace: Namespace) -> None:
    async def main() -> None:
        others = 0

        async def other() -> None:
            nonlocal others
            while True:
                others += 1
                await asyncio.sleep(0)

        namespace.broadcast(*[UNBIND] * 40)
        task = asyncio.create_task(other())
        for _ in range(40):
            await anext(namespace.events)
        task.cancel()
        assert others >= 40

    run(main())


def test_unread_events_cost_no_processor_time(run: Run[None], namespace: Namespace) -> None:
    async def main() -> None:
        namespace.broadcast(*[UNBIND] * 10)
        await anext(namespace.events)
        before = resource.getrusage(resource.RUSAGE_THREAD)
        await asyncio.sleep(0.3)
        after = resource.getrusage(resource.RUSAGE_THREAD)
        assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 0.1

    run(main())


def test_cancelled_reader_loses_no_event(run: Run[None], namespace: Namespace) -> None:
    async def main() -> None:
        reader = asyncio.ensure_future(anext(namespace.events))
        await asyncio.sleep(0)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        namespace.broadcast(REMOVE)
        event = await anext(namespace.events)
        assert isinstance(event, Uevent)
        assert event.action == "remove"

    run(main())


def test_second_reader_is_refused_and_the_first_goes_on(run: Run[None], namespace: Namespace) -> None:
    async def main() -> None:
        first = asyncio.ensure_future(anext(namespace.events))
        await asyncio.sleep(0)
        with pytest.raises(CallerError, match="one task reads at a time"):
            await anext(namespace.events)
        namespace.broadcast(REMOVE)
        assert isinstance(await first, Uevent)

    run(main())


def test_close_ends_a_waiting_iteration(run: Run[None], namespace: Namespace) -> None:
    async def main() -> None:
        async def consume() -> int:
            return len([event async for event in namespace.events])

        consumer = asyncio.create_task(consume())
        await asyncio.sleep(0)
        namespace.events.close()
        assert await consumer == 0
        with pytest.raises(StopAsyncIteration):
            await anext(namespace.events)

    run(main())


def test_descriptor_reused_after_close_is_still_watched(run: Run[None], namespace: Namespace) -> None:
    """A reader left behind on a closed descriptor makes the stdlib loop deaf to the next one of that number."""

    async def main() -> None:
        ours, theirs = socket.socketpair()
        waiting = asyncio.ensure_future(anext(namespace.events))
        await asyncio.sleep(0)
        number = namespace.events.fileno()
        namespace.events.close()
        with pytest.raises(StopAsyncIteration):
            await waiting
        with theirs, ours:
            theirs.send(b"!")
            os.dup2(ours.fileno(), number)
            readable = asyncio.Event()
            asyncio.get_running_loop().add_reader(number, readable.set)
            await readable.wait()
            asyncio.get_running_loop().remove_reader(number)
            os.close(number)

    run(main())


def test_use_to_the_end_leaves_no_descriptor_open(run: Run[None]) -> None:
    async def main() -> None:
        before = open_descriptors()
        for _ in range(5):
            async with Uevents() as events:
                marker = str(uuid.uuid4())
                provoke(marker)
                await awaited(events, marker)
                assert open_descriptors() > before
            assert events.fileno() == -1
            events.close()
        assert open_descriptors() == before

    run(main())


def test_no_descriptor_to_be_had_raises_kernel_error() -> None:
    Uevents().close()  # what is imported lazily is imported
    before = open_descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(KernelError, match=r"uevents: socket.* EMFILE"):
            Uevents()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert open_descriptors() == before


def test_parse_recorded_unbind_keeps_every_property() -> None:
    event = parse_uevent(UNBIND)

    assert event == Uevent(
        "unbind",
        "/devices/pci0000:00/0000:00:1c.0/0000:03:00.0",
        "pci",
        {
            "ACTION": "unbind",
            "DEVPATH": "/devices/pci0000:00/0000:00:1c.0/0000:03:00.0",
            "SUBSYSTEM": "pci",
            "PCI_CLASS": "20000",
            "PCI_ID": "8086:10D3",
            "PCI_SUBSYS_ID": "8086:0000",
            "PCI_SLOT_NAME": "0000:03:00.0",
            "MODALIAS": "pci:v00008086d000010D3sv00008086sd00000000bc02sc00i00",
            "SEQNUM": "1844",
        },
    )


@pytest.mark.parametrize("datagram", [UNBIND, REMOVE])
def test_departed_pci_device_on_unbind_or_remove_gives_the_address(datagram: bytes) -> None:
    assert departed_pci_device(parse_uevent(datagram)) == "0000:03:00.0"


@pytest.mark.parametrize(
    "datagram",
    [
        UNBIND.replace(b"unbind", b"bind"),
        UNBIND.replace(b"unbind", b"change"),
        UNBIND.replace(b"SUBSYSTEM=pci", b"SUBSYSTEM=vfio-dev"),
        UNBIND.replace(b"PCI_SLOT_NAME=", b"OTHER="),
        REMOVE + b"SYNTH_UUID=0\0",
    ],
)
def test_departed_pci_device_on_anything_else_is_none(datagram: bytes) -> None:
    assert departed_pci_device(parse_uevent(datagram)) is None


@pytest.mark.parametrize("key", [b"ACTION", b"DEVPATH", b"SUBSYSTEM"])
def test_parse_without_a_required_property_names_it(key: bytes) -> None:
    with pytest.raises(MalformedUeventError, match=f"must have {key.decode()}"):
        parse_uevent(UNBIND.replace(key + b"=", b"OTHER="))


LINES = st.one_of(
    st.binary(max_size=20),
    st.sampled_from(
        [b"ACTION=remove", b"DEVPATH=/x", b"SUBSYSTEM=pci", b"header=1", b"attrs=1", b"value=1", b"=", b"junk"]
    ),
)


@given(first=st.sampled_from([b"remove@/x", b"libudev", b"", b"\xff"]), lines=st.lists(LINES, max_size=8))
def test_parse_of_arbitrary_bytes_gives_an_event_or_malformed(first: bytes, lines: list[bytes]) -> None:
    try:
        event = parse_uevent(b"\0".join([first, *lines, b""]))
    except MalformedUeventError:
        return
    assert (event.action, event.devpath, event.subsystem) == ("remove", "/x", "pci")
    assert all(isinstance(value, str) for value in event.properties.values())

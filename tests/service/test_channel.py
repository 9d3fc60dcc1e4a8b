"""One SOCK_SEQPACKET socket on the loop, its descriptors, and those that are better closed elsewhere."""

import array
import asyncio
import errno
import fcntl
import os
import resource
import socket
import struct
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from irqrouter.service import channel as channel_module
from irqrouter.service.channel import Channel, GoneError, Packet, closer, is_eventfd
from irqrouter.service.wire import FRAME_MAX, Code, Command, Frame, WireError, decode, encode
from tests.service.client import descriptors, eventfd, seqpackets, turns, until

pytestmark = pytest.mark.asyncio

PING = Frame(1, Command.PING)


@contextmanager
def pair() -> Generator[tuple[Channel, socket.socket]]:
    """A channel and its peer; afterwards nothing is left."""
    before = descriptors()
    ours, theirs = seqpackets()
    theirs.setblocking(False)
    channel = Channel(ours)
    try:
        yield channel, theirs
    finally:
        channel.close()
        channel.close()
        theirs.close()
    assert not closer.busy
    assert descriptors() == before


def send(sock: socket.socket, raw: bytes, given: Sequence[int]) -> None:
    sock.sendmsg([raw], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", given))])


async def test_frames_arrive_in_order_and_whole() -> None:
    with pair() as (channel, theirs):
        frames = [Frame(number, Command.PING, bytes(number)) for number in range(50)]
        for frame in frames:
            theirs.send(encode(frame))
        assert [(await channel.receive()).frame() for _ in frames] == frames
        assert channel.receive_now() is None


async def test_receive_waits() -> None:
    with pair() as (channel, theirs):
        waiting = asyncio.create_task(channel.receive())
        await turns()
        assert not waiting.done()
        theirs.send(encode(PING))
        assert (await waiting).frame() == PING


async def test_receive_that_is_cancelled_loses_nothing() -> None:
    with pair() as (channel, theirs):
        waiting = asyncio.create_task(channel.receive())
        await turns()
        theirs.send(encode(PING))
        waiting.cancel()
        await asyncio.wait([waiting])
        assert (await channel.receive()).frame() == PING


async def test_largest_frame_and_one_more_byte() -> None:
    with pair() as (channel, theirs):
        largest = Frame(1, Command.PING, bytes(FRAME_MAX - 16))
        theirs.send(encode(largest))
        assert (await channel.receive()).frame() == largest
        theirs.send(bytes(FRAME_MAX + 1))
        packet = await channel.receive()
        assert packet.truncated
        with pytest.raises(WireError) as caught:
            packet.frame()
        assert caught.value.code is Code.FRAME


async def test_descriptors_are_received_close_on_exec_and_closed_unless_taken() -> None:
    with pair() as (channel, theirs):
        fd = eventfd()
        before = descriptors()
        send(theirs, encode(PING), [fd] * 3)
        packet = await channel.receive()
        assert len(packet.descriptors) == 3
        assert all(fcntl.fcntl(each, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for each in packet.descriptors)
        with pytest.raises(WireError):
            packet.frame()
        assert packet.frame(with_descriptors=True) == PING
        taken = packet.take(1)
        assert packet.descriptors[1] == -1
        assert packet.close() is None
        assert packet.close() is None
        assert len(descriptors()) == len(before) + 1
        os.close(taken)
        os.close(fd)


@pytest.mark.parametrize("count", [240, 241, 253])
async def test_all_descriptors_a_packet_can_have_arrive_and_are_released(count: int) -> None:
    with pair() as (channel, theirs):
        fd = eventfd()
        send(theirs, encode(PING), [fd] * count)
        packet = await channel.receive()
        assert (len(packet.descriptors), packet.truncated) == (count, False)
        if count > 240:
            with pytest.raises(WireError) as caught:
                packet.frame(with_descriptors=True)
            assert caught.value.code is Code.FRAME
        else:
            assert packet.frame(with_descriptors=True) == PING
        packet.close()
        os.close(fd)


async def test_descriptors_without_a_frame_are_no_farewell() -> None:
    with pair() as (channel, theirs):
        fd = eventfd()
        send(theirs, b"", [fd])
        os.close(fd)
        packet = await channel.receive()
        with pytest.raises(WireError):
            packet.frame()
        packet.close()


@pytest.mark.parametrize("farewell", [b"", None])
async def test_peer_that_goes(farewell: bytes | None) -> None:
    with pair() as (channel, theirs):
        waiting = asyncio.create_task(channel.receive())
        await turns()
        if farewell is None:
            theirs.close()
        else:
            theirs.send(farewell)
        with pytest.raises(GoneError):
            await waiting
        if farewell is None:
            with pytest.raises(GoneError):
                channel.send_now(PING)


async def test_send_waits_for_a_peer_that_does_not_read() -> None:
    with pair() as (channel, theirs):
        frame = Frame(1, Command.PING, bytes(10_000))
        sent = 0
        while channel.send_now(frame):
            sent += 1
        assert sent
        waiting = asyncio.create_task(channel.send(Frame(2, Command.PING)))
        writable: list[bool] = []
        await turns()
        assert not waiting.done()
        for _ in range(sent):
            assert decode(theirs.recv(FRAME_MAX)) == frame
        await waiting
        assert decode(theirs.recv(FRAME_MAX)).id == 2
        channel.when_writable(lambda: writable.append(True))
        await until(lambda: bool(writable))
        await turns()
        assert writable == [True]  # once


async def test_send_hears_of_a_peer_that_goes_instead_of_reading() -> None:
    with pair() as (channel, theirs):
        while channel.send_now(Frame(1, Command.PING, bytes(10_000))):
            pass
        waiting = asyncio.create_task(channel.send(PING))
        await turns()
        theirs.close()
        with pytest.raises(GoneError):
            await waiting


async def test_on_readable_goes_on_until_ignored() -> None:
    with pair() as (channel, theirs):
        packets: list[Packet] = []

        def take() -> None:
            while (packet := channel.receive_now()) is not None:
                packets.append(packet)

        channel.on_readable(take)
        theirs.send(encode(PING))
        await until(lambda: len(packets) == 1)
        channel.ignore()
        theirs.send(encode(PING))
        await turns()
        assert len(packets) == 1


# --- closing -------------------------------------------------------------------------------------------------------


async def test_close_lets_the_peer_read_what_was_sent_though_it_had_sent_more() -> None:
    """The kernel resets a connection that is closed with packets unread, and what it was told would be lost."""
    with pair() as (channel, theirs):
        for _ in range(5):
            theirs.send(encode(PING))
        channel.send_now(Frame(9, Command.PING))
        channel.close()
        assert decode(theirs.recv(FRAME_MAX)).id == 9
        assert theirs.recv(FRAME_MAX) == b""


async def test_b8_close_leaves_the_loop_first() -> None:
    """Or the loop would report a number that is somebody else's by then."""
    with pair() as (channel, theirs):
        called: list[bool] = []
        channel.on_readable(lambda: called.append(True))
        number = channel._sock.fileno()
        other = os.dup(channel._sock.fileno())  # the file stays open
        channel.close()
        os.dup2(other, number)
        with suppress(OSError):
            theirs.send(encode(PING))
        await turns()
        assert not called
        os.close(number)
        os.close(other)


async def test_only_eventfds_are_eventfds(tmp_path: Path) -> None:
    fds = [eventfd(), os.memfd_create("anon_inode:[eventfd]"), os.open(tmp_path, os.O_PATH)]
    liar = tmp_path / "anon_inode:[eventfd]"
    liar.write_bytes(b"")
    fds.append(os.open(liar, os.O_RDONLY))
    assert [is_eventfd(fd) for fd in fds] == [True, False, False, False]
    for fd in fds:
        os.close(fd)
    assert not is_eventfd(fds[0])
    assert not is_eventfd(-1)


async def test_what_may_take_time_is_closed_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with pair() as (channel, theirs):
        reader, writer = os.pipe()
        send(theirs, encode(PING), [writer])
        packet = await channel.receive()
        closed = packet.close()
        assert closed is not None
        await closed
        os.close(writer)
        assert os.read(reader, 1) == b""  # it is closed indeed
        os.close(reader)
        assert not closer.busy


async def test_socket_that_lingers_is_made_not_to() -> None:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
    channel_module._no_lingering(sock.fileno())
    assert struct.unpack("ii", sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))[0] == 0
    sock.close()
    reader, writer = os.pipe()
    channel_module._no_lingering(reader)  # no socket: nothing happens
    os.close(reader)
    os.close(writer)


async def test_out_of_descriptors_is_a_frame_that_did_not_arrive_whole() -> None:
    with pair() as (channel, theirs):
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        fd = eventfd()
        send(theirs, encode(PING), [fd] * 20)
        free = sorted(set(range(1000)) - set(map(int, descriptors())))
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[4], limits[1]))  # four more, and no other
        try:
            packet = await channel.receive()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert packet.truncated
        with pytest.raises(WireError):
            packet.frame(with_descriptors=True)
        packet.close()
        os.close(fd)


async def test_errors_of_the_socket_are_the_peers_end() -> None:
    with pair() as (channel, _):
        channel._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        with pytest.raises(GoneError, match=os.strerror(errno.EMSGSIZE)):
            channel.send_now(Frame(1, Command.PING, bytes(60_000)))

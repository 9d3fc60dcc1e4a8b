"""Kernel uevents on the caller's event loop: a VFIO device that leaves takes its vectors with it.

A ``NETLINK_KOBJECT_UEVENT`` socket in the kernel's multicast group, never in udev's (a privileged process
composes those messages), read on the running loop and parsed by pyroute2. pyroute2's own asyncio classes want
a datagram transport, which uvloop has not got for netlink; ``add_reader`` works on both loops.

The kernel tells of devices only in network namespaces that the initial user namespace owns
(lib/kobject_uevent.c:uevent_net_init), and a sandbox must allow ``AF_NETLINK``.
"""

import asyncio
import errno
import functools
import re
import socket
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, Protocol, Self

import msgspec
import structlog

from irqrouter.errors import CallerError, KernelError, SpecError

_log = structlog.stdlib.get_logger(__name__)

_NETLINK_KOBJECT_UEVENT: Final = 15  # linux/netlink.h; the socket module does not have it
_KERNEL_GROUP: Final = 1

# The kernel writes action@devpath and at most UEVENT_BUFFER_SIZE (2048) bytes of properties.
_DATAGRAM_BYTES_MAX: Final = 8192

# sockaddr_nl: nl_pid 0 is the kernel itself. Another process's unicast shows its own, and group 0.
_FROM_KERNEL: Final = (0, _KERNEL_GROUP)


_PCI_ADDRESS: Final = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")


class MalformedUeventError(SpecError):
    """Not a kernel uevent: ``action@devpath`` and ``KEY=value`` strings, each ended by a zero byte."""


class Uevent(msgspec.Struct, frozen=True):
    """One uevent. ``properties`` holds all of its ``KEY=value`` strings, ``ACTION`` and the like included."""

    action: str
    devpath: str
    subsystem: str
    properties: Mapping[str, str]


class UeventsLost(msgspec.Struct, frozen=True):
    """The socket's buffer ran over and events were lost: see in sysfs what is still there.

    Events that still were in the buffer come after this one.
    """


class _Marshal(Protocol):
    """What is used of ``pyroute2.netlink.uevent.MarshalUevent``."""

    def parse(self, data: bytes) -> Iterable[Mapping[str, object]]: ...


@functools.cache
def _marshal() -> _Marshal:
    from pyroute2.netlink.uevent import MarshalUevent  # pyright: ignore[reportMissingTypeStubs] - has none

    marshal: _Marshal = MarshalUevent()
    return marshal


def parse_uevent(datagram: bytes) -> Uevent:
    """The uevent in a datagram of the kernel (lib/kobject_uevent.c:alloc_uevent_skb).

    Raises :class:`MalformedUeventError`.
    """
    try:
        (message,) = _marshal().parse(datagram)
    except (TypeError, ValueError) as error:
        # not UTF-8; or a property named "header", which takes the place of the marshal's own
        raise MalformedUeventError(_excerpt(datagram), f"the marshal cannot read it: {error}") from error
    properties = {key: value for key, value in message.items() if isinstance(value, str)}
    try:
        action, devpath, subsystem = (properties[key] for key in ("ACTION", "DEVPATH", "SUBSYSTEM"))
    except KeyError as error:
        raise MalformedUeventError(_excerpt(datagram), f"must have {error.args[0]}") from error
    if not datagram.startswith(f"{action}@{devpath}\0".encode()):
        raise MalformedUeventError(_excerpt(datagram), "must begin with its own action@devpath")
    return Uevent(action, devpath, subsystem, types.MappingProxyType(properties))


def departed_pci_device(event: Uevent) -> str | None:
    """The address (``0000:03:00.0``) of the PCI device that has left or lost its driver; None otherwise.

    That is ``remove`` or ``unbind`` of subsystem ``pci``, and ``PCI_SLOT_NAME`` (drivers/pci/pci-driver.c:
    pci_uevent). ``unbind`` does not say from which driver: the kernel has cleared it by then
    (drivers/base/dd.c:__device_release_driver), so compare with the addresses in use. vfio-pci lets a device
    go only when its last descriptor is closed (drivers/vfio/vfio_main.c:vfio_unregister_group_dev): what is
    left to do is to forget its vectors. An event somebody wrote into ``/sys/.../uevent`` has ``SYNTH_UUID``
    and is no departure (Documentation/ABI/testing/sysfs-uevent).
    """
    departed = event.subsystem == "pci" and event.action in {"remove", "unbind"}
    synthetic = "SYNTH_UUID" in event.properties
    return event.properties.get("PCI_SLOT_NAME") if departed and not synthetic else None


def unbound_pci_devices(addresses: Iterable[str]) -> set[str]:
    """Those of ``addresses`` that are no longer there, or have no driver: what to ask after :class:`UeventsLost`."""
    devices = Path("/sys/bus/pci/devices")
    return {
        address
        for address in addresses
        if _PCI_ADDRESS.fullmatch(address) and not (devices / address / "driver").exists()
    }


class Uevents:
    """The kernel's uevents from the moment of construction on.

    ::

        async with Uevents() as events:
            async for event in events:
                match event:
                    case UeventsLost():
                        ...  # see in sysfs which devices are still there
                    case Uevent() if address := departed_pci_device(event):
                        ...

    Events wait in the socket's buffer until asked for, nowhere else: a slow reader costs no memory and gets
    :class:`UeventsLost` when the buffer ran over. One task reads at a time, and the loop runs between two
    events, so a flood starves nobody. What is not a kernel uevent is logged and left out. :meth:`close` ends
    the iteration. The first construction imports pyroute2, which takes a quarter of a second.

    Raises :class:`~irqrouter.errors.KernelError` when the socket cannot be had or fails.
    """

    def __init__(self) -> None:
        _marshal()  # imported now, not when the first event holds up the loop
        self._waiting: asyncio.Future[None] | None = None
        kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        try:
            self._socket = socket.socket(socket.AF_NETLINK, kind, _NETLINK_KOBJECT_UEVENT)
        except OSError as error:
            raise _kernel_error(error, "socket(AF_NETLINK, NETLINK_KOBJECT_UEVENT)") from error
        try:
            self._socket.bind((0, _KERNEL_GROUP))
        except OSError as error:
            self._socket.close()
            raise _kernel_error(error, "bind") from error

    def fileno(self) -> int:
        """The socket's descriptor; -1 once closed."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket and end the iteration. Idempotent."""
        self._wake()
        self._socket.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Uevent | UeventsLost:
        while self.fileno() >= 0:
            await self._readable()
            # one datagram each time: what is left makes the socket readable again at once
            if self.fileno() >= 0 and (event := self._receive()) is not None:
                return event
        raise StopAsyncIteration

    async def _readable(self) -> None:
        """Wait until the socket is readable or closed. Watched only meanwhile: unread events would spin."""
        if self._waiting is not None:
            raise CallerError("uevents", "one task reads at a time")
        loop = asyncio.get_running_loop()
        self._waiting = waiting = loop.create_future()
        try:
            loop.add_reader(self.fileno(), self._wake)
            await waiting
        finally:
            self._wake()

    def _wake(self) -> None:
        """Stop watching, always before the descriptor is closed, and let the waiting task go on."""
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        waiting.get_loop().remove_reader(self.fileno())
        if not waiting.done():
            waiting.set_result(None)

    def _receive(self) -> Uevent | UeventsLost | None:
        try:
            datagram, _, flags, sender = self._socket.recvmsg(_DATAGRAM_BYTES_MAX)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                return UeventsLost()
            raise _kernel_error(error, "recvmsg") from error
        if sender != _FROM_KERNEL or flags & socket.MSG_TRUNC:
            _log.warning("uevent ignored: not from the kernel, or too long", sender=sender, flags=flags)
            return None
        try:
            return parse_uevent(datagram)
        except MalformedUeventError as error:
            _log.warning("uevent ignored: malformed", uevent=error.object, rule=error.rule)
            return None


def _excerpt(datagram: bytes) -> str:
    return f"uevent {datagram[:80]!r}"


def _kernel_error(error: OSError, call: str) -> KernelError:
    return KernelError(error.errno or errno.EIO, call, "uevents")

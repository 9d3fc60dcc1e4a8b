"""A core that serves what it was told to, and an admin plane over it in a thread of its own."""

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec
from structlog.testing import capture_logs

from irqrouter.errors import CallerError
from irqrouter.service.admin import AdminServer, ServiceStatus
from irqrouter.service.config import Access, Config, LogLevel
from irqrouter.service.status import Happenings, VectorReport, VmStatus, What
from irqrouter.x86.msi import Message


def vm(name: str = "guest", **changes: object) -> VmStatus:
    status = VmStatus(
        name=name, pid=4711, uid=64055, attached_s=3723.5, remapper="VTD", features=["PREPARE"], vectors=3, assigned=1,
        deassigned=1, masked=1, prepared=1, regions=1, descriptors=9, frames=10, bytes=1000, operations=5, stale=1,
        faults=2, doorbells=4, wakeups=3,
    )  # fmt: skip
    return msgspec.structs.replace(status, **changes)


def vector(number: int = 0, name: str = "guest", **changes: object) -> VectorReport:
    report = VectorReport(
        vm=name, vector=number, gsi=24 + number, state="assigned", prepared=False, generation=7, requester=0x0018,
        message=Message(0xFEE000B8, 0), cookie=5, route=Message(0xFEE03000, 0x41), invalidations=6, caught=4, faults=1,
        stale=0, discarded=2, refused=0, last_catch_us=35.5,
    )  # fmt: skip
    return msgspec.structs.replace(report, **changes)


class FakeCore:
    """What a server tells, without one."""

    def __init__(self, config: Config | None = None, happenings: Happenings | None = None) -> None:
        self.config = config or Config()
        self.happenings = happenings or Happenings()
        self.reports: dict[str, list[VectorReport]] = {}
        self.statuses: dict[str, VmStatus] = {}
        self.detached: list[str] = []

    def attach(self, status: VmStatus, *reports: VectorReport) -> None:
        self.statuses[status.name] = status
        self.reports[status.name] = list(reports)

    def vms(self) -> list[VmStatus]:
        return list(self.statuses.values())

    def vectors(self, name: str) -> list[VectorReport]:
        if name not in self.statuses:
            raise CallerError(f"VM {name!r}", "is not attached")
        return self.reports[name]

    def detach(self, name: str) -> None:
        self.vectors(name)
        self.detached.append(name)

    def reconfigure(self, config: Config) -> None:
        self.config = config

    async def serve(self, listener: socket.socket) -> None:
        await asyncio.Event().wait()


class FakeHost:
    """The service around the core."""

    def __init__(self) -> None:
        self.log_level: LogLevel = "info"
        self.admins = Access(users=(os.geteuid(),))
        self.listeners: Callable[[], int] = lambda: 0

    def status(self) -> ServiceStatus:
        return ServiceStatus(
            version="1", pid=1, uptime_s=2.5, loop="fake", log_level=self.log_level, config=None, vms=1, vectors=3,
            listeners=self.listeners(),
        )  # fmt: skip

    def set_log_level(self, level: LogLevel) -> None:
        self.log_level = level

    def administered_by(self, uid: int, gid: int, groups: Iterable[int]) -> bool:
        return self.admins.permits(uid, gid, groups)


def listening_at(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()
    listener.setblocking(False)
    return listener


class Plane:
    """An admin plane at ``path``, on a loop in another thread: for clients that have a loop of their own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.core = FakeCore()
        self.host = FakeHost()
        self._begun = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def tell(
        self, name: str, what: What, number: int | None = None, generation: int | None = None, detail: str = ""
    ) -> None:
        self._loop.call_soon_threadsafe(self.core.happenings.tell, name, what, number, generation, detail)

    def when_followed(self, then: Callable[[], None]) -> None:
        """Call ``then`` on the loop as soon as somebody follows what happens."""

        async def wait() -> None:
            await self.core.happenings.wanted()
            then()

        asyncio.run_coroutine_threadsafe(wait(), self._loop)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        with listening_at(self.path) as listener:
            serving = asyncio.ensure_future(AdminServer(self.core, self.host, self.core.happenings).serve(listener))
            self._stop = serving.cancel
            self._begun.set()
            await asyncio.wait({serving})

    @contextlib.contextmanager
    def running(self) -> Iterator["Plane"]:
        with capture_logs():  # they would stand in the way of what a command in this process prints
            self._thread.start()
            assert self._begun.wait(10)
            try:
                yield self
            finally:
                self.stop()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop)
            self._thread.join(10)

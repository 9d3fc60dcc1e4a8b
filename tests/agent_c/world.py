"""A VM on the real KVM with vCPUs that do not run, the C agent on it, and a service that a test scripts."""

import contextlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

from irqrouter.core.vectors import VectorStatus
from irqrouter.eventfd_loop import Source
from irqrouter.iommu.fault import Fault
from irqrouter.kvm.vcpu import Vcpu
from irqrouter.kvm.vm import KvmVm
from irqrouter.proof.c_agent import CAgent, CVector
from irqrouter.service import wire
from irqrouter.service.wire import Feature, Kind, Operation, Record, RemapperKind
from irqrouter.x86.msi import Message, Request
from tests.agent_c.fake import BOTH, FakeService, Session, eventually

T = TypeVar("T")

REQUESTER: Final = 0x18
#: The sanitizer that the library is built with, if these tests are run under one.
SANITIZE: Final = os.environ.get("IRQROUTER_TEST_SANITIZE", "")


def remappable(index: int) -> Message:
    """The MSI of the remapping table's entry ``index``."""
    return Message(0xFEE00010 | index << 5, 0)


def to(vector: int, cpu: int = 0) -> Message:
    """A message for one vCPU."""
    return Message(0xFEE00000 | cpu << 12, 0x4000 | vector)


class World:
    """``with World(tmp_path) as world``: the agent is there, and not connected yet."""

    def __init__(
        self,
        directory: Path,
        *,
        remapper: RemapperKind = RemapperKind.VTD,
        deadline_s: float = 5.0,
        translate: Callable[[Request], Message | Fault] | None = None,
        cookie: Callable[[Request], int] | None = None,
    ) -> None:
        self._opened = contextlib.ExitStack()
        self.path = directory / "agent.socket"
        self.faults: list[tuple[CVector, Record]] = []
        self.said: list[str] = []
        self.eventfds: list[int] = []
        self.sessions: list[Session] = []
        with contextlib.ExitStack() as opened:
            self._threads = opened.enter_context(ThreadPoolExecutor(8))
            self.service = FakeService(self.path)
            opened.callback(self.service.close)
            opened.callback(self._close_sessions)
            self.vm = KvmVm.create()
            opened.callback(self.vm.close)
            self.cpus = [Vcpu(self.vm, number) for number in range(2)]
            for cpu in self.cpus:
                opened.callback(cpu.close)
            self.agent = CAgent(
                self.vm,
                name="vm-1",
                path=str(self.path),
                remapper=remapper,
                on_fault=lambda vector, record: self.faults.append((vector, record)),
                on_log=self.said.append,
                translate=translate,
                cookie=cookie,
                deadline_s=deadline_s,
                library=SANITIZE,
            )
            opened.callback(self.agent.close)
            self._opened = opened.pop_all()

    def attach(self, features: Feature = BOTH) -> Session:
        """The agent's next connection, which it believes to be complete."""
        session = self.service.attach(features)
        self.sessions.append(session)
        assert self.agent.wait_connected(10)
        return session

    def accept(self) -> Session:
        """The agent's next connection, HELLO not answered."""
        session = self.service.accept()
        self.sessions.append(session)
        return session

    def eventfd(self, count: int = 0, flags: int = os.EFD_NONBLOCK) -> int:
        """An eventfd that is closed with the world."""
        fd = os.eventfd(count, flags | os.EFD_CLOEXEC)
        self.eventfds.append(fd)
        return fd

    def source(self, index: int, *, masked: bool = False) -> Source:
        """A source with an eventfd of its own, by the table's entry ``index``."""
        return Source(eventfd=self.eventfd(), message=remappable(index), requester=REQUESTER, masked=masked)

    def add(self, session: Session, *routes: Message | None, first: int = 0) -> list[tuple[CVector, int]]:
        """Add vectors with cookies from ``first`` up; those with a route are assigned. Handles and eventfds."""
        sources = [self.source(first + number) for number in range(len(routes))]
        adding = self.background(self.agent.add_all, sources)
        done = 0
        while done < len(sources):
            frame, added = session.expect_add()
            operations: list[Operation] = []
            for each, route in zip(added, routes[done:], strict=False):
                assert each.new
                if route is not None:
                    operations += [session.op(Kind.SET_ROUTE, each.vector, route), session.op(Kind.ASSIGN, each.vector)]
            session.reply_operations(frame, operations)
            done += len(added)
        return [(vector, source.eventfd) for vector, source in zip(adding.result(10), sources, strict=True)]

    def add_one(self, session: Session, route: Message | None = None, cookie: int = 0) -> tuple[CVector, int]:
        """Add one vector."""
        return self.add(session, route, first=cookie)[0]

    def background(self, function: Callable[..., T], *arguments: object) -> "Future[T]":
        """Call ``function`` on another thread: a vCPU's, say."""
        return self._threads.submit(function, *arguments)

    def status(self, vector: CVector) -> VectorStatus:
        """What the agent says of a vector."""
        return next(status for status in self.agent.vectors() if status.id == vector.id)

    def pending(self, fd: int) -> int:
        """The count in an eventfd, without taking it."""
        for line in Path(f"/proc/self/fdinfo/{fd}").read_text("ascii").splitlines():
            if line.startswith("eventfd-count:"):
                return int(line.split()[1], 16)
        raise AssertionError(fd)

    def arrived(self) -> list[tuple[int, int]]:
        """What KVM put into the vCPUs' IRRs since the last call, as (vCPU, vector)."""
        found = [(cpu.apic_id, vector) for cpu in self.cpus for vector in sorted(cpu.irr())]
        for cpu in self.cpus:
            cpu.clear_irr()
        return found

    def next_arrived(self) -> list[tuple[int, int]]:
        """Wait until something arrives."""
        eventually(lambda: any(cpu.irr() for cpu in self.cpus), "a delivery")
        return self.arrived()

    def states(self, session: Session, vectors: Sequence[tuple[CVector, int]]) -> list[wire.SlotState]:
        """What the page says of vectors."""
        return [session.state(vector.id) for vector, _ in vectors]

    def _close_sessions(self) -> None:
        for session in self.sessions:
            session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened.close()
        for fd in self.eventfds:
            os.close(fd)
        if value is None:
            assert not self.agent.callback_errors

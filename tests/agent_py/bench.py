"""An agent over a VM, on the real kernel or on the simulated one, and a service that does what the test says."""

import os
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

from irqrouter.agent import Agent
from irqrouter.core.vectors import Vector
from irqrouter.kvm.port import Vm
from irqrouter.kvm.simulated import SimulatedEventfd, SimulatedKernel, SimulatedVm
from irqrouter.kvm.vcpu import Vcpu
from irqrouter.memory import MemoryRegion
from irqrouter.service import wire
from irqrouter.service.wire import Command, Kind, Operation, RemapperKind
from irqrouter.x86.msi import Message
from tests.fake_service import WAIT_S, FakeService, Session
from tests.machine import CountingVm

P = ParamSpec("P")
T = TypeVar("T")

REQUESTER = 0x18


class Kernel(Protocol):
    """The kernel under the agent, with two vCPUs that do not run."""

    vm: Vm

    def eventfd(self) -> int: ...

    def signal(self, fd: int) -> None: ...

    def arrived(self) -> list[tuple[int, int]]:
        """What is in the IRRs, as (vCPU, vector); they are empty afterwards."""
        ...

    def calls(self, call: str) -> int:
        """How often ``assign``, ``deassign`` or ``routing`` was called."""
        ...

    def refuse(self, call: str, code: int) -> None:
        """The next call fails."""
        ...

    def close_fd(self, fd: int) -> None: ...

    def close(self) -> None: ...


class RealKernel:
    def __init__(self) -> None:
        self.vm = CountingVm.create()
        self._cpus = [Vcpu(self.vm, number) for number in range(2)]
        self._fds: set[int] = set()

    def eventfd(self) -> int:
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._fds.add(fd)
        return fd

    def signal(self, fd: int) -> None:
        os.eventfd_write(fd, 1)

    def arrived(self) -> list[tuple[int, int]]:
        found = [(cpu.apic_id, vector) for cpu in self._cpus for vector in sorted(cpu.irr())]
        for cpu in self._cpus:
            cpu.clear_irr()
        return found

    def calls(self, call: str) -> int:
        return self.vm.calls[call]

    def refuse(self, call: str, code: int) -> None:
        self.vm.refuse(call, code)

    def close_fd(self, fd: int) -> None:
        self._fds.discard(fd)
        os.close(fd)

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        for cpu in self._cpus:
            cpu.close()
        self.vm.close()


class SendableEventfd(SimulatedEventfd):
    """A simulated eventfd with a real descriptor, which can be sent; nothing ever signals that."""

    def __init__(self, like: SimulatedEventfd) -> None:
        super().__init__(like._host, like._ctx, like._fd)
        self._real = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._real

    def close(self) -> None:
        super().close()
        if self._real >= 0:
            os.close(self._real)
            self._real = -1


class SendingVm(SimulatedVm):
    def adopt(self, fd: int) -> SimulatedEventfd:
        return SendableEventfd(super().adopt(fd))


_CALLS = {
    "assign": "KVM_IRQFD",
    "deassign": "KVM_IRQFD with KVM_IRQFD_FLAG_DEASSIGN",
    "routing": "KVM_SET_GSI_ROUTING",
}


class PlainKernel:
    def __init__(self) -> None:
        self._kernel = SimulatedKernel()
        self._vm = self._kernel.vm(vcpus=range(2))
        self._vm.__class__ = SendingVm
        self.vm: Vm = self._vm
        self.eventfd = self._kernel.eventfd
        self.close_fd = self._kernel.close

    def signal(self, fd: int) -> None:
        self._kernel.signal(fd)

    def arrived(self) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for cpu in range(2):
            while (vector := self._vm.accept(cpu)) is not None:
                found.append((cpu, vector))
        return found

    def calls(self, call: str) -> int:
        return self._kernel.calls(_CALLS[call])  # type: ignore[arg-type]

    def refuse(self, call: str, code: int) -> None:
        self._kernel.fail_next(_CALLS[call], code)  # type: ignore[arg-type]

    def close(self) -> None:
        self._vm.close()


class Bench:
    """``make(...)`` makes the agent; ``during(verb, ...)`` calls it beside the test, which plays the service."""

    def __init__(self, kernel: Kernel, path: Path) -> None:
        self.kernel = kernel
        self.service = FakeService(path / "service")
        self.faults: list[tuple[Vector, wire.Record]] = []
        self.on_fault: Callable[[Vector, wire.Record], None] = lambda vector, record: self.faults.append(
            (vector, record)
        )
        self._agents: list[Agent] = []
        self._pool = ThreadPoolExecutor(4)

    def make(self, **options: object) -> Agent:
        """An agent named ``vm``."""
        given: dict[str, object] = {"name": "vm", "remapper": RemapperKind.VTD, **options}
        agent = Agent(
            self.kernel.vm,
            path=self.service.path,
            on_fault=lambda vector, record: self.on_fault(vector, record),
            **given,  # type: ignore[arg-type]
        )
        self._agents.append(agent)
        return agent

    def connected(self, **options: object) -> tuple[Agent, Session]:
        """One that is connected."""
        agent = self.make(**options)
        session = self.service.accept()
        assert agent.wait_connected(WAIT_S)
        return agent, session

    def during(self, verb: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> "Future[T]":
        return self._pool.submit(verb, *arguments, **named)

    def add(
        self, agent: Agent, session: Session, index: int, *, cpu: int = 0, assigned: bool = True
    ) -> tuple[Vector, int]:
        """A vector of entry ``index``, which the service gives vector number 40h + ``index`` if ``assigned``."""
        fd = self.kernel.eventfd()
        adding = self.during(agent.add, fd, message_of(index), requester=REQUESTER)
        frame, _ = session.receive()
        added = wire.decode_add(frame.payload, 1)[0]
        answer = (
            [set_route(session, added.vector, route(index, cpu)), assign(session, added.vector)] if assigned else []
        )
        session.operations(frame, *answer)
        vector = adding.result(WAIT_S)
        session.rung()
        return vector, fd

    def add_many(self, agent: Agent, session: Session, count: int) -> list[tuple[Vector, int]]:
        return [self.add(agent, session, index) for index in range(count)]

    def close(self) -> None:
        for agent in self._agents:
            agent.close()
        self._pool.shutdown()
        self.service.die()
        self.kernel.close()


@contextmanager
def bench(kernel: Callable[[], Kernel], path: Path) -> Generator[Bench]:
    made = Bench(kernel(), path)
    try:
        yield made
    finally:
        made.close()


def message_of(index: int) -> Message:
    """The MSI of the table's entry ``index``: remappable format, SHV=0."""
    return Message(0xFEE00010 | index << 5, 0)


def route(index: int, cpu: int = 0, *, logical: bool = False) -> Message:
    return Message(0xFEE00000 | cpu << 12 | logical << 2, 0x4040 + index)


def set_route(session: Session, slot: int, message: Message, generation: int | None = None) -> Operation:
    generation = session.slot(slot).generation if generation is None else generation
    return Operation(Kind.SET_ROUTE, slot, generation, message.address, message.data)


def catch(session: Session, slot: int, message: Message, generation: int | None = None) -> Operation:
    generation = session.slot(slot).generation if generation is None else generation
    return Operation(Kind.CATCH, slot, generation, message.address, message.data)


def assign(session: Session, slot: int, generation: int | None = None, *, delivering: bool = False) -> Operation:
    generation = session.slot(slot).generation if generation is None else generation
    return Operation(Kind.ASSIGN, slot, generation, flag=delivering)


def catch_fault(
    session: Session, slot: int, record: wire.Record, generation: int | None = None, *, recorded: bool = True
) -> Operation:
    generation = session.slot(slot).generation if generation is None else generation
    return Operation(Kind.CATCH_FAULT, slot, generation, record=record, flag=recorded)


def invalidation(session: Session) -> wire.Frame:
    """The INVALIDATE that comes next."""
    frame, _ = session.receive()
    assert frame.command == Command.INVALIDATE
    return frame


def eventually(condition: Callable[[], object], what: str = "it") -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.001)


def memory() -> tuple[int, list[MemoryRegion]]:
    ram = os.memfd_create("ram", os.MFD_CLOEXEC)
    os.ftruncate(ram, 1 << 20)
    return ram, [MemoryRegion(0, 1 << 19, ram, 0), MemoryRegion(1 << 32, 1 << 19, ram, 1 << 19)]

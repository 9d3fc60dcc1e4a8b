"""The agent in C as a target, in a library of its own in which each system call on the VM is looked at first."""

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from irqrouter.core.vectors import VectorStatus
from irqrouter.eventfd_loop import Source
from irqrouter.iommu.fault import Fault
from irqrouter.iommu.vtd import cookie
from irqrouter.kvm.vm import KvmVm
from irqrouter.memory import MemoryRegion
from irqrouter.proof.c_agent import SOURCES, CAgent, CVector, Library
from irqrouter.scope import Scope
from irqrouter.service.wire import Record, RemapperKind
from irqrouter.x86.msi import Message, Request
from tests.conformance.agents import DEADLINE_S, FEW, HOST_ADDRESS_WIDTH, NAME, SLOTS, AgentTarget
from tests.conformance.target import REQUESTER, Call, Hooks

#: What ``-fsanitize`` is to be; the runtime must be in ``LD_PRELOAD`` then.
SANITIZE: Final = os.environ.get("CONFORMANCE_SANITIZE", "")

_HOOK: Final = Path(__file__).with_name("hook.c")
_ENTERED: Final = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)


def built(sanitize: str) -> Path:
    """The library, compiled if need be."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-g", "-fPIC", "-shared", "-pthread"]
    flags += ["-fvisibility=hidden", "-Wl,--wrap=ioctl"]
    if sanitize:
        flags += [f"-fsanitize={sanitize}", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
    sources = [SOURCES / "irqrouter_agent.c", _HOOK]
    digest = hashlib.sha256(repr((compiler, flags)).encode())
    for path in (*sources, SOURCES / "irqrouter_agent.h"):
        digest.update(path.read_bytes())
    library = SOURCES.parent / "build" / "conformance" / f"agent-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as directory:
            made = Path(directory, "agent.so")
            subprocess.run([*compiler, *flags, "-o", made, *sources], check=True)
            made.replace(library)
    return library


class _HookedLibrary:
    """The library, and whose hooks it goes through now."""

    def __init__(self) -> None:
        self.library = Library(built(SANITIZE))
        self.hooks = Hooks()
        self._entered = _ENTERED(lambda call: self.hooks.enter(Call(call)))  # as long as C may call it
        ctypes.CDLL(str(self.library.path)).hook(self._entered)


@functools.cache
def _library() -> _HookedLibrary:
    return _HookedLibrary()


class CVerbs:
    """The C agent's verbs."""

    def __init__(self, target: AgentTarget) -> None:
        library = _library()
        library.hooks = target.hooks
        vm = target.bench.guest.vm
        assert isinstance(vm, KvmVm)

        def on_fault(vector: CVector, record: Record) -> None:
            target.record(vector.id, record)

        def translate(request: Request) -> Message | Fault:
            assert target.translate is not None
            return target.translate(request)

        self._agent = CAgent(
            vm,
            name=NAME,
            path=str(target.service.path),
            remapper=RemapperKind.VMM if target.translate else RemapperKind.VTD,
            on_fault=on_fault,
            translate=translate if target.translate else None,
            cookie=(lambda request: cookie(request.message)) if target.translate else None,
            slots=SLOTS,
            deadline_s=DEADLINE_S,
            few=FEW,
            host_address_width=HOST_ADDRESS_WIDTH,
            library=library.library,
        )

    def add(self, fd: int, message: Message, *, masked: bool) -> tuple[int, object]:
        vector = self._agent.add(fd, message, requester=REQUESTER, masked=masked)
        return vector.id, vector

    def add_all(self, fds: Sequence[int], message: Message) -> list[tuple[int, object]]:
        sources = [Source(eventfd=fd, message=message, requester=REQUESTER) for fd in fds]
        return [(vector.id, vector) for vector in self._agent.add_all(sources)]

    def invalidate(self, scope: Scope) -> int:
        return self._agent.invalidate(scope)

    def mask(self, handle: object) -> None:
        self._agent.mask(_vector(handle))

    def unmask(self, handle: object) -> None:
        self._agent.unmask(_vector(handle))

    def program(self, handle: object, message: Message) -> None:
        self._agent.program(_vector(handle), message)

    def remove(self, handles: Sequence[object]) -> None:
        self._agent.remove(*map(_vector, handles))

    def set_foreign_routes(self, routes: Mapping[int, Message]) -> None:
        self._agent.set_foreign_routes(routes)

    def set_registers(self, table: int, control: int) -> None:
        self._agent.set_registers(table, control)

    def set_memory(self, regions: Sequence[MemoryRegion]) -> None:
        self._agent.set_memory(regions)

    def vectors(self) -> list[VectorStatus]:
        return self._agent.vectors()

    def wait_connected(self) -> bool:
        return self._agent.wait_connected(20)

    def close(self) -> None:
        self._agent.close()
        assert self._agent.callback_errors == []


def _vector(handle: object) -> CVector:
    assert isinstance(handle, CVector)
    return handle


#: Makes the verbs for a target.
verbs: Callable[[AgentTarget], CVerbs] = CVerbs

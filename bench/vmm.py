"""VMM processes with VMs that a service serves: one process cannot have the descriptors of them all.

:class:`Vmm` is the parent's side. The child, ``python -m bench.vmm``, says how many of its vectors are assigned; then,
for each line it reads, it signals every eventfd once and says in how many VMs that arrived. It ends when its standard
input does.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from bench.vms import VECTORS, ServedVm
from irqrouter.core.machine import State
from irqrouter.errors import IrqrouterError
from irqrouter.proof.c_agent import Library

#: How long the child may take to remove its vectors before it is killed.
_END_S: Final = 60.0


class VmmError(IrqrouterError):
    """A VMM process ended, or did not do what it is there for."""


class Fleet(msgspec.Struct, frozen=True):
    """The VMs of one process: ``vms`` of them with ``vectors`` each. The service at ``path`` has ``wait_s``.

    ``library`` is the agent's: the one that the parent measures.
    """

    path: str
    library: str
    name: str
    vms: int
    vectors: int
    wait_s: float = 30.0


class Vmm:
    """A process with VMs, which are attached when this is made."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        command = [sys.executable, "-m", "bench.vmm", msgspec.json.encode(fleet).decode()]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            self._check(self._answer())
        except BaseException:
            self._end()
            raise

    def signal(self) -> int:
        """Signal every eventfd of every VM once: in how many VMs that arrived."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        return self._answer()

    def _check(self, assigned: int) -> None:
        if assigned != self._fleet.vms * self._fleet.vectors:
            raise VmmError(f"VMM {self._fleet.name}", f"has only {assigned} vectors assigned")

    def _answer(self) -> int:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise VmmError(f"VMM {self._fleet.name}", "ended; its standard error tells why")
        return int(line)

    def _end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()


def main(arguments: Sequence[str]) -> int:
    """Attach the VMs, and do what is asked for."""
    fleet = msgspec.json.decode(arguments[0], type=Fleet)
    library = Library(Path(fleet.library))
    with contextlib.ExitStack() as opened:
        vms = [
            opened.enter_context(
                ServedVm(fleet.vectors, fleet.path, name=f"{fleet.name}-{number}", wait_s=fleet.wait_s, library=library)
            )
            for number in range(fleet.vms)
        ]
        _say(sum(status.state is State.ASSIGNED for vm in vms for status in vm.agent.vectors()))
        while sys.stdin.buffer.readline():
            for vm in vms:
                for eventfd in vm.eventfds:
                    os.eventfd_write(eventfd, 1)
            _say(sum(vm.irr() == frozenset(VECTORS[:1]) for vm in vms))
    return 0


def _say(number: int) -> None:
    print(number, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

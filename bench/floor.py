"""``floor.c``, compiled when the benchmark starts and loaded into this process.

Floor and router run in one process, interleaved, so that whatever the machine does meanwhile happens to both.
"""

import ctypes
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from irqrouter.kvm.vm import KvmVm
from irqrouter.x86.msi import Message

_SOURCE: Final = Path(__file__).with_name("floor.c")


class FloorError(Exception):
    """``floor.c`` could not be compiled."""


class Floor:
    """The C functions. They run with the GIL released, time themselves and raise :class:`OSError`."""

    def __init__(self, build: Path) -> None:
        """Compile into the directory ``build``, and load."""
        self.library = ctypes.CDLL(str(_compiled(build)))
        for name, arguments in (
            ("signal_many", (ctypes.c_int, ctypes.c_uint32)),
            ("deassign", (ctypes.c_int, ctypes.c_int, ctypes.c_uint32)),
            (
                "catch_and_assign",
                (
                    ctypes.c_int,
                    ctypes.c_int,
                    ctypes.c_uint32,
                    ctypes.c_uint64,
                    ctypes.c_uint32,
                    ctypes.c_void_p,
                ),
            ),
            ("write_table_twice", (ctypes.c_int, ctypes.c_void_p)),
            ("attach", (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)),
            ("detach", (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32)),
            ("fire", (ctypes.c_int, ctypes.c_int64)),
            ("catcher_injected", (ctypes.c_void_p,)),
        ):
            function = getattr(self.library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int64
        self.library.catcher_start.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_uint64)
        self.library.catcher_start.restype = ctypes.c_void_p
        self.library.catcher_set_data.argtypes = (ctypes.c_void_p, ctypes.c_uint32)
        self.library.catcher_set_data.restype = None
        self.library.catcher_stop.argtypes = (ctypes.c_void_p,)
        self.library.catcher_stop.restype = None

    def signal_many(self, eventfd: int, count: int) -> int:
        """Nanoseconds for signalling ``eventfd`` ``count`` times."""
        return _checked(self.library.signal_many(eventfd, count))

    def deassign(self, vm: KvmVm, eventfd: int, gsi: int) -> int:
        """Nanoseconds for ``KVM_IRQFD`` with ``KVM_IRQFD_FLAG_DEASSIGN``."""
        return _checked(self.library.deassign(vm.fileno(), eventfd, gsi))

    def catch_and_assign(
        self, vm: KvmVm, eventfd: int, gsi: int, message: Message, table: ctypes.Array[ctypes.c_char]
    ) -> None:
        """Signal the deassigned ``eventfd``, deliver that by hand, write the table and assign it again."""
        _checked(self.library.catch_and_assign(vm.fileno(), eventfd, gsi, message.address, message.data, table))

    def write_table_twice(self, vm: KvmVm, table: ctypes.Array[ctypes.c_char]) -> int:
        """Nanoseconds for ``KVM_SET_GSI_ROUTING``, twice."""
        return _checked(self.library.write_table_twice(vm.fileno(), table))

    def attach(
        self, vm: KvmVm, eventfds: ctypes.Array[ctypes.c_int], gsi: int, table: ctypes.Array[ctypes.c_char]
    ) -> int:
        """Nanoseconds for writing the table, and assigning every eventfd to a GSI of its own, from ``gsi`` on."""
        return _checked(self.library.attach(vm.fileno(), eventfds, len(eventfds), gsi, table))

    def detach(self, vm: KvmVm, eventfds: ctypes.Array[ctypes.c_int], gsi: int) -> None:
        """Deassign them."""
        _checked(self.library.detach(vm.fileno(), eventfds, len(eventfds), gsi))

    def fire(self, eventfd: int, idle_ns: int) -> int:
        """Idle, signal ``eventfd``, idle again. The time (``perf_counter_ns``) just before the signal."""
        return _checked(self.library.fire(eventfd, idle_ns))


class Catcher:
    """A C thread that waits for ``eventfd``, reads it and signals an MSI to ``address``."""

    def __init__(self, floor: Floor, vm: KvmVm, eventfd: int, address: int) -> None:
        self._library = floor.library
        self._catcher: int | None = self._library.catcher_start(vm.fileno(), eventfd, address)
        if self._catcher is None:
            raise OSError("the catcher's thread could not be started")

    def set_data(self, data: int) -> None:
        """The data of the MSI for the next event."""
        self._library.catcher_set_data(self._catcher, data)

    @property
    def injected_ns(self) -> int:
        """When (``perf_counter_ns``) the last MSI had been signalled; 0 before the first."""
        return _checked(self._library.catcher_injected(self._catcher))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._library.catcher_stop(self._catcher)


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def _compiled(build: Path) -> Path:
    build.mkdir(parents=True, exist_ok=True)
    library = build / "floor.so"
    # Into a name of its own, then renamed: another run may have the old library mapped.
    new = build / f"floor.{os.getpid()}.so"
    compiler = os.environ.get("CC", "cc")
    command = [compiler, "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
    try:
        run = subprocess.run([*command, "-o", str(new), str(_SOURCE)], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise FloorError(f"no C compiler: {compiler} (set CC)") from error
    if run.returncode:
        raise FloorError(f"{_SOURCE} does not compile:\n{run.stderr}")
    return new.replace(library)

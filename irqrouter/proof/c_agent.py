"""The C agent, loaded from its source, with the verbs of a Router.

For the proof, the conformance tests and the benchmarks: what they say to a Router, and to the agent in Python, they can
say to the one in C. The library is compiled on first use, from ``agent/`` of the checkout.
"""

import ctypes
import dataclasses
import errno
import functools
import hashlib
import os
import shlex
import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeAlias

import msgspec

from irqrouter.core.machine import State
from irqrouter.core.routes import GsiExhaustedError
from irqrouter.core.vectors import VectorGoneError, VectorStatus
from irqrouter.errors import CallerError, IrqrouterError, KernelError, SpecError
from irqrouter.eventfd_loop import Source
from irqrouter.iommu.fault import Fault
from irqrouter.kvm.executor import DuplicateEventfdError
from irqrouter.kvm.vm import KvmVm
from irqrouter.memory import MemoryRegion
from irqrouter.scope import UNINDEXED, Cookie, Scope
from irqrouter.service.wire import SLOTS_MAX, Record, RemapperKind
from irqrouter.x86.msi import Message, Request, checked, checked_requester

#: Where the sources are, in a checkout.
SOURCES: Final = Path(__file__).resolve().parents[2] / "agent"
#: What the library is made of.
_FILES: Final = ("irqrouter_agent.c", "irqrouter_agent.h")
_CFLAGS: Final = ("-std=gnu11", "-Wall", "-Wextra", "-Werror", "-g", "-fPIC", "-fvisibility=hidden", "-pthread")

_MASKED: Final = 1
_LEVEL: Final = 2
_MESSAGE, _FAULT, _NOT_NOW = 0, 1, -1
_STATES: Final = {1: State.DEASSIGNED, 2: State.ASSIGNED, 3: State.MASKED}


class BuildError(IrqrouterError):
    """The library cannot be made: no sources (not a checkout), no compiler, or the compiler refuses."""


class _Vector(ctypes.Structure):
    number: int
    born: int
    _fields_ = (("number", ctypes.c_uint32), ("born", ctypes.c_uint64))


class _Translation(ctypes.Structure):
    address: int
    data: int
    low: int
    high: int
    _fields_ = (
        ("address", ctypes.c_uint64),
        ("data", ctypes.c_uint32),
        ("low", ctypes.c_uint64),
        ("high", ctypes.c_uint64),
    )


# Pointers come as numbers.
_ON_FAULT: Final = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64)
_TRANSLATE: Final = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_uint64,
    ctypes.c_uint32,
    ctypes.c_uint16,
    ctypes.c_void_p,
)
_LOG: Final = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p)


class _Options(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("socket_path", ctypes.c_char_p),
        ("name", ctypes.c_char_p),
        ("vm_fd", ctypes.c_int),
        ("pins", ctypes.c_uint32),
        ("routes_max", ctypes.c_uint32),
        ("slots", ctypes.c_uint32),
        ("remapper", ctypes.c_uint32),
        ("host_address_width", ctypes.c_uint32),
        ("deadline_ms", ctypes.c_uint32),
        ("few", ctypes.c_uint32),
        ("opaque", ctypes.c_void_p),
        ("on_fault", ctypes.c_void_p),
        ("translate", ctypes.c_void_p),
        ("log", ctypes.c_void_p),
    )


class _Region(ctypes.Structure):
    _fields_ = (
        ("gpa", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("host_address", ctypes.c_void_p),
        ("fd", ctypes.c_int),
        ("reserved", ctypes.c_uint32),
    )


class _Source(ctypes.Structure):
    _fields_ = (
        ("eventfd", ctypes.c_int),
        ("resample", ctypes.c_int),
        ("address", ctypes.c_uint64),
        ("data", ctypes.c_uint32),
        ("requester", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("cookie", ctypes.c_uint32),
    )


class _Route(ctypes.Structure):
    _fields_ = (("gsi", ctypes.c_uint32), ("data", ctypes.c_uint32), ("address", ctypes.c_uint64))


class _Status(ctypes.Structure):
    vector: _Vector
    generation: int
    address: int
    data: int
    requester: int
    cookie: int
    gsi: int
    state: int
    prepared: int
    refused: int
    routed: int
    route_address: int
    route_data: int
    invalidations: int
    caught: int
    faults: int
    stale: int
    discarded: int
    last_catch_ns: int
    last_catch_at_ns: int
    _fields_ = (
        ("vector", _Vector),
        ("generation", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        *((name, ctypes.c_uint32) for name in ("data", "requester", "cookie", "gsi")),
        *((name, ctypes.c_uint32) for name in ("state", "prepared", "refused", "routed")),
        ("route_address", ctypes.c_uint64),
        *((name, ctypes.c_uint32) for name in ("route_data", "invalidations", "caught", "faults", "stale")),
        *((name, ctypes.c_uint32) for name in ("discarded", "last_catch_ns", "reserved")),
        ("last_catch_at_ns", ctypes.c_uint64),
    )


class Timed(NamedTuple):
    """An invalidation, measured: how many vectors it touched, how long it took, how long of that for the service."""

    touched: int
    ns: int
    waited_ns: int


class Stats(msgspec.Struct, frozen=True):
    """``struct irqrouter_stats``, which tells what the fields are."""

    vectors: int
    connected: int
    breaker_open: int
    connections: int
    wide: int
    wide_served: int
    fallbacks: int
    timeouts: int
    late: int
    malformed: int
    batches: int
    table_writes: int
    assigns: int
    deassigns: int
    wakeups: int
    starved: int
    longest_wait_ns: int


_StatsArray: Final = ctypes.c_uint64 * len(Stats.__struct_fields__)

#: The exported functions, but for their common prefix, and what they take.
_FUNCTIONS: Final[dict[str, tuple[Any, ...]]] = {
    "create": (ctypes.POINTER(_Options), ctypes.POINTER(ctypes.c_void_p)),
    "destroy": (ctypes.c_void_p,),
    "wait_connected": (ctypes.c_void_p, ctypes.c_uint32),
    "connected": (ctypes.c_void_p,),
    "set_memory": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t),
    "set_registers": (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64),
    "add": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p),
    "program": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32),
    "mask": (ctypes.c_void_p, ctypes.c_void_p),
    "unmask": (ctypes.c_void_p, ctypes.c_void_p),
    "remove": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t),
    "invalidate": (ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32),
    "invalidate_timed": (
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_uint32,
        ctypes.POINTER(ctypes.c_uint64),
        ctypes.POINTER(ctypes.c_uint64),
    ),
    "set_foreign_routes": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t),
    "eoi": (ctypes.c_void_p, ctypes.c_uint32),
    "status": (ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(_Status)),
    "vectors": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t),
    "stats": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t),
}


class Library:
    """The library at ``path``, loaded. Its calls release the interpreter lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        loaded = ctypes.CDLL(str(path))
        self._functions = {name: loaded[f"irqrouter_agent_{name}"] for name in _FUNCTIONS}
        for name, arguments in _FUNCTIONS.items():
            self._functions[name].argtypes = arguments
            self._functions[name].restype = None if name == "destroy" else ctypes.c_int

    def call(self, name: str, *arguments: object) -> int:
        """Call ``irqrouter_agent_<name>``."""
        result: int | None = self._functions[name](*arguments)
        return result or 0


def build(directory: Path | None = None, *, sanitize: str = "") -> Path:
    """Compile the library into ``directory`` (by default ``build/c_agent`` of the checkout), if it is not there yet.

    ``sanitize`` is what ``-fsanitize`` takes; a process that loads such a library must have been started with the
    sanitizer's runtime in ``LD_PRELOAD``. ``CC`` is the compiler. Raises :class:`BuildError`.
    """
    sources = [SOURCES / name for name in _FILES]
    compiler = shlex.split(os.environ.get("CC") or "cc")
    flags = [*_CFLAGS, *(["-O1", f"-fsanitize={sanitize}", "-fno-omit-frame-pointer"] if sanitize else ["-O2"])]
    digest = hashlib.sha256(repr((compiler, flags)).encode())
    for source in sources:
        try:
            digest.update(source.read_bytes())
        except OSError as error:
            raise BuildError(str(source), f"the C agent is built in a checkout: {error.strerror}") from error
    directory = directory or SOURCES.parent / "build" / "c_agent"
    library = directory / f"libirqrouter_agent-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        _compile([*compiler, *flags, "-shared"], sources[0], library)
    return library


def _compile(command: list[str], source: Path, library: Path) -> None:
    made = library.with_name(f"{library.name}.{os.getpid()}.{threading.get_ident()}")  # others may be at it too
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        run = subprocess.run([*command, "-o", made, source], capture_output=True, text=True, check=False)
        if run.returncode:
            raise BuildError(str(source), f"{command[0]} says: {run.stderr or run.returncode}")
        made.replace(library)
    except OSError as error:
        raise BuildError(str(library), f"cannot be made: {error}") from error


@functools.cache
def load(sanitize: str = "") -> Library:
    """The library, compiled if need be. Raises :class:`BuildError`."""
    return Library(build(sanitize=sanitize))


@dataclasses.dataclass(frozen=True, slots=True)
class CVector:
    """A handle: the vector's number, and what tells it from others that had the number."""

    id: int
    born: int


#: Called with the handle and the record's low and high quadword; may only store.
OnFault: TypeAlias = Callable[[CVector, Record], None]


class CAgent:
    """The agent in C for ``vm``, attached, or soon, to the service at the socket ``path``; ``name`` is the VM's.

    The verbs are a Router's. In addition ``on_fault`` gets the fault's record as hardware would write it, on whichever
    thread it comes, with the agent's lock held. ``on_fault_address`` is that of a C function instead, which gets
    ``opaque`` as its first argument: the interpreter is then not entered. ``translate`` and ``cookie`` are for
    ``RemapperKind.VMM``. ``library`` is a loaded :class:`Library`, or what ``-fsanitize`` is to be.

    Raises what a Router does: :class:`~irqrouter.errors.CallerError` and its kin,
    :class:`~irqrouter.errors.KernelError` with the errno of the kernel or of the service; and :class:`BuildError`.
    """

    def __init__(
        self,
        vm: KvmVm,
        *,
        name: str,
        path: str,
        remapper: RemapperKind,
        on_fault: OnFault | None = None,
        on_fault_address: int = 0,
        opaque: int = 0,
        translate: Callable[[Request], Message | Fault] | None = None,
        cookie: Callable[[Request], Cookie] | None = None,
        on_log: Callable[[str], None] | None = None,
        slots: int = SLOTS_MAX,
        deadline_s: float = 0.05,
        few: int = 4,
        host_address_width: int = 52,
        library: Library | str = "",
    ) -> None:
        self._library = load(library) if isinstance(library, str) else library
        self._remapper = remapper
        self._cookie = cookie
        self._devices: dict[CVector, str] = {}
        self._slots = slots
        self._on_fault = on_fault
        self._translate = translate
        self._on_log = on_log
        #: What a callback raised, which cannot go through C. The event is then delivered or blocked all the same.
        self.callback_errors: list[BaseException] = []
        # Kept as long as the agent: C calls them.
        self._callbacks = (_ON_FAULT(self._fault), _TRANSLATE(self._translated), _LOG(self._log))
        fault, translated, logged = (ctypes.cast(each, ctypes.c_void_p).value for each in self._callbacks)
        options = _Options(
            size=ctypes.sizeof(_Options),
            socket_path=os.fsencode(path),
            name=name.encode(),
            vm_fd=vm.fileno(),
            pins=vm.pins,
            slots=slots,
            remapper=remapper,
            host_address_width=host_address_width if remapper is RemapperKind.VTD else 0,
            deadline_ms=max(1, round(deadline_s * 1000)),
            few=few,
            opaque=opaque,
            on_fault=on_fault_address or (fault if on_fault else None),
            translate=translated if translate else None,
            log=logged if on_log else None,
        )
        self._agent: ctypes.c_void_p | None = ctypes.c_void_p()
        try:
            self._checked("create", self._call("create", options, ctypes.byref(self._agent)), f"VM {name}")
        except BaseException:
            self._agent = None
            raise

    # --- verbs ---------------------------------------------------------------------------------------------------

    def add(
        self, eventfd: int, message: Message, *, requester: int, masked: bool = False, device: str | None = None
    ) -> CVector:
        """See :meth:`irqrouter.eventfd_loop.Router.add`."""
        source = Source(eventfd=eventfd, message=message, requester=requester, masked=masked, device=device)
        return self.add_all([source])[0]

    def add_all(self, sources: Iterable[Source]) -> list[CVector]:
        """See :meth:`irqrouter.eventfd_loop.Router.add_all`."""
        given = list(sources)
        return self._add(given, [self._source(each, _MASKED if each.masked else 0) for each in given])

    def add_level(self, eventfd: int, message: Message, *, requester: int, resample: int = -1) -> CVector:
        """Add a level line: see ``IRQROUTER_LEVEL`` in the header, and :meth:`eoi`."""
        source = Source(eventfd=eventfd, message=message, requester=requester)
        return self._add([source], [self._source(source, _LEVEL, resample)])[0]

    def invalidate(self, scope: Scope) -> int:
        """See :meth:`irqrouter.eventfd_loop.Router.invalidate`."""
        result = self._call("invalidate", self._agent, scope.first, scope.last)
        return self._checked("invalidate", result, scope.describe())

    def invalidate_timed(self, scope: Scope) -> Timed:
        """The same, measured in C."""
        ns, waited_ns = ctypes.c_uint64(), ctypes.c_uint64()
        result = self._call(
            "invalidate_timed", self._agent, scope.first, scope.last, ctypes.byref(ns), ctypes.byref(waited_ns)
        )
        return Timed(self._checked("invalidate", result, scope.describe()), ns.value, waited_ns.value)

    def mask(self, vector: CVector) -> None:
        """See :meth:`irqrouter.eventfd_loop.Router.mask`."""
        self._on("mask", vector)

    def unmask(self, vector: CVector) -> None:
        """See :meth:`irqrouter.eventfd_loop.Router.unmask`."""
        self._on("unmask", vector)

    def program(self, vector: CVector, message: Message) -> None:
        """See :meth:`irqrouter.eventfd_loop.Router.program`."""
        requester = self._status(vector).requester if self._cookie else 0
        cookie = self._cookie_of(Request(checked(message), requester))
        self._on("program", vector, message.address, message.data, cookie)

    def remove(self, *vectors: CVector) -> None:
        """See :meth:`irqrouter.eventfd_loop.Router.remove`."""
        for vector in vectors:
            self._devices.pop(vector, None)
        handles = _handles(vectors)
        result = self._call("remove", self._agent, handles, len(vectors))
        self._checked("remove", result, ", ".join(f"vector {each.id}" for each in vectors[:8]))

    def remove_device(self, device: str) -> int:
        """See :meth:`irqrouter.eventfd_loop.Router.remove_device`."""
        gone = [vector for vector, held_by in list(self._devices.items()) if held_by == device]
        self.remove(*gone)
        return len(gone)

    def set_foreign_routes(self, routes: Mapping[int, Message]) -> None:
        """See :meth:`irqrouter.eventfd_loop.Router.set_foreign_routes`."""
        for gsi, message in routes.items():
            if not 0 <= gsi < 1 << 32:
                raise CallerError(f"gsi {gsi}", "is none")
            checked(message)
        entries = [_Route(gsi, message.data, message.address) for gsi, message in routes.items()]
        array = (_Route * len(entries))(*entries)
        self._checked("set_foreign_routes", self._call("set_foreign_routes", self._agent, array, len(entries)), "table")

    def vectors(self) -> list[VectorStatus]:
        """See :meth:`irqrouter.eventfd_loop.Router.vectors`. Each is a snapshot of its own."""
        handles = (_Vector * self._slots)()
        count = self._checked("vectors", self._call("vectors", self._agent, handles, self._slots), "vectors")
        found: list[VectorStatus] = []
        for handle in handles[:count]:
            status = _Status()
            if self._call("status", self._agent, ctypes.byref(handle), ctypes.byref(status)) == 0:
                found.append(self._described(status))
        return found

    # --- what only agents have -----------------------------------------------------------------------------------

    def set_memory(self, regions: Sequence[MemoryRegion], *, addresses: Sequence[int] = ()) -> None:
        """Guest memory, whole. ``addresses`` are where the regions are mapped here, to be checked."""
        for region in regions:
            if not (0 <= region.gpa < 1 << 64 and 0 <= region.size < 1 << 64 and 0 <= region.offset < 1 << 64):
                raise CallerError(region.describe(), "must lie within 64 bits")
        entries = [
            _Region(region.gpa, region.size, region.offset, address, region.fd, 0)
            for region, address in zip(regions, addresses or [0] * len(regions), strict=True)
        ]
        array = (_Region * len(entries))(*entries)
        self._checked("set_memory", self._call("set_memory", self._agent, array, len(entries)), "guest memory")

    def set_registers(self, table: int, control: int) -> int:
        """The unit's registers; invalidates everything, and returns how many vectors that touched."""
        return self._checked("set_registers", self._call("set_registers", self._agent, table, control), "registers")

    def eoi(self, guest_vector: int) -> int:
        """The guest's EOI for ``guest_vector``: how many level lines it was for."""
        return self._checked("eoi", self._call("eoi", self._agent, guest_vector), f"guest vector {guest_vector:#x}")

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait until the service knows everything; whether it does."""
        return self._call("wait_connected", self._agent, max(0, round(timeout_s * 1000))) == 0

    @property
    def connected(self) -> bool:
        """Whether the service knows everything."""
        return bool(self._call("connected", self._agent))

    def prepared(self, vector: CVector) -> bool:
        """Whether the vector's next event is served without the service."""
        return bool(self._status(vector).prepared)

    def status(self, vector: CVector) -> VectorStatus:
        """A snapshot of one vector."""
        return self._described(self._status(vector))

    def caught_at_ns(self, vector: CVector) -> int:
        """When (``time.perf_counter_ns``) the agent last delivered an event of the vector; 0: never."""
        return self._status(vector).last_catch_at_ns

    def stats(self) -> Stats:
        """What the agent counts."""
        values = _StatsArray()
        self._call("stats", self._agent, values, ctypes.sizeof(values))
        return Stats(*values)

    def close(self) -> None:
        """Remove every vector and end the agent. Idempotent. No other call may be under way."""
        agent, self._agent = self._agent, None
        if agent is not None:
            self._library.call("destroy", agent)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- callbacks, from C ---------------------------------------------------------------------------------------

    def _fault(self, opaque: object, vector: int, low: int, high: int) -> None:
        del opaque
        assert self._on_fault is not None
        try:
            handle = _Vector.from_address(vector)
            self._on_fault(CVector(handle.number, handle.born), (low, high))
        except BaseException as error:  # noqa: BLE001 - it cannot go through C
            self.callback_errors.append(error)

    def _translated(self, opaque: object, vector: int, address: int, data: int, requester: int, out: int) -> int:
        del opaque, vector
        assert self._translate is not None
        try:
            outcome = self._translate(Request(Message(address, data), requester))
        except BaseException as error:  # noqa: BLE001 - as above
            self.callback_errors.append(error)
            return _NOT_NOW
        translation = _Translation.from_address(out)
        if isinstance(outcome, Message):
            translation.address, translation.data = outcome.address, outcome.data
            return _MESSAGE
        translation.low, translation.high = _record_of(outcome)
        return _FAULT

    def _log(self, opaque: object, text: bytes) -> None:
        del opaque
        assert self._on_log is not None
        try:
            self._on_log(text.decode(errors="replace"))
        except BaseException as error:  # noqa: BLE001 - as above
            self.callback_errors.append(error)

    # --- small parts ---------------------------------------------------------------------------------------------

    def _call(self, name: str, *arguments: object) -> int:
        if self._agent is None:
            raise CallerError("the agent", "is closed")
        return self._library.call(name, *arguments)

    def _checked(self, verb: str, result: int, what: str) -> int:
        if result >= 0:
            return result
        match -result:
            case errno.ENOENT:
                raise VectorGoneError(what, "was removed, or belongs to another agent")
            case errno.EEXIST:
                raise DuplicateEventfdError(what, "an eventfd is a vector already")
            case errno.ENOSPC:
                raise GsiExhaustedError(what, "no slot or GSI is left")
            case errno.EINVAL | errno.EBADF | errno.E2BIG | errno.ENAMETOOLONG:
                raise CallerError(what, f"irqrouter_agent_{verb} says: {os.strerror(-result)}")
            case _:
                raise KernelError(-result, f"irqrouter_agent_{verb}", what)

    def _on(self, verb: str, vector: CVector, *arguments: int) -> None:
        handle = ctypes.byref(_Vector(vector.id, vector.born))
        self._checked(verb, self._call(verb, self._agent, handle, *arguments), f"vector {vector.id}")

    def _source(self, source: Source, flags: int, resample: int = -1) -> _Source:
        request = Request(checked(source.message), checked_requester(source.requester))
        if not 0 <= source.eventfd < 1 << 31:
            raise CallerError(f"descriptor {source.eventfd}", "is no descriptor number")
        message, cookie = source.message, self._cookie_of(request)
        return _Source(source.eventfd, resample, message.address, message.data, source.requester, flags, cookie)

    def _add(self, given: list[Source], sources: list[_Source]) -> list[CVector]:
        handles = (_Vector * len(sources))()
        array = (_Source * len(sources))(*sources)
        what = ", ".join(f"descriptor {source.eventfd}" for source in given[:8])
        self._checked("add", self._call("add", self._agent, array, len(sources), handles), what)
        added = [CVector(handle.number, handle.born) for handle in handles]
        for vector, source in zip(added, given, strict=True):
            if source.device is not None:
                self._devices[vector] = source.device
        return added

    def _cookie_of(self, request: Request) -> Cookie:
        cookie = UNINDEXED if self._cookie is None else self._cookie(request)
        if not 0 <= cookie <= UNINDEXED:
            raise SpecError(f"cookie {cookie:#x}", f"must be at most {UNINDEXED:#x}")
        return cookie

    def _status(self, vector: CVector) -> _Status:
        status = _Status()
        handle = ctypes.byref(_Vector(vector.id, vector.born))
        result = self._call("status", self._agent, handle, ctypes.byref(status))
        self._checked("status", result, f"vector {vector.id}")
        return status

    def _described(self, status: _Status) -> VectorStatus:
        return VectorStatus(
            id=status.vector.number,
            gsi=status.gsi,
            state=_STATES[status.state],
            generation=status.generation,
            request=Request(Message(status.address, status.data), status.requester),
            cookie=status.cookie,
            device=self._devices.get(CVector(status.vector.number, status.vector.born)),
            route=Message(status.route_address, status.route_data) if status.routed else None,
            invalidations=status.invalidations,
            caught=status.caught,
            faults=status.faults,
            stale=status.stale,
            discarded=status.discarded,
            assign_errno=status.refused,
            last_miss_us=status.last_catch_ns / 1000 if status.last_catch_ns else None,
        )


def _handles(vectors: Sequence[CVector]) -> "ctypes.Array[_Vector]":
    return (_Vector * len(vectors))(*(_Vector(each.id, each.born) for each in vectors))


def _record_of(fault: Fault) -> Record:
    """The record the VMM will want to store; zeros where it is not to be recorded."""
    record = fault.record() if fault.recorded else None
    return record or (0, 0)

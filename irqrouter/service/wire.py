"""The wire protocol, version 1, as values and bytes; ``docs/protocol.md`` is its specification.

Pure: no descriptor, no socket. Encoding raises :class:`~irqrouter.errors.SpecError` for a value that does not fit.
Decoding raises :class:`WireError`, which is what the peer is told: an errno, a code, the entry, and the rule.
"""

import enum
import errno
import re
import struct
from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

import msgspec

from irqrouter.errors import CallerError, SpecError
from irqrouter.scope import UNINDEXED, Scope

MAGIC: Final = int.from_bytes(b"IRQR", "little")
PAGE_MAGIC: Final = int.from_bytes(b"IRQG", "little")
VERSION: Final = 1

FRAME_MAX: Final = 65_536
DESCRIPTORS_MAX: Final = 240
UNANSWERED_MAX: Final = 1_024
REPLY_FRAMES_MAX: Final = 8
SLOTS_MAX: Final = 4_096

PAGE_HEADER_SIZE: Final = 4_096
SLOT_SIZE: Final = 64

_HEADER: Final = struct.Struct("<HHIII")
_HELLO: Final = struct.Struct("<IHHQBBHIQ64s")
_HELLO_VERSIONS: Final = struct.Struct("<IHH")
_WELCOME: Final = struct.Struct("<HHIQIIQ")
_COUNT: Final = struct.Struct("<II")
_REGION: Final = struct.Struct("<QQQII")
_ADDED: Final = struct.Struct("<IIQ")
_SCOPE: Final = struct.Struct("<II")
_OPERATION: Final = struct.Struct("<BBHIQQII")
_ERROR: Final = struct.Struct("<II")
_PAGE_HEADER: Final = struct.Struct("<IIQQ")
_SLOT: Final = struct.Struct("<QQQIHBBIIIIIIII")

HEADER_SIZE: Final = _HEADER.size
OPERATIONS_MAX: Final = (FRAME_MAX - HEADER_SIZE - _COUNT.size) // _OPERATION.size
ERROR_TEXT_MAX: Final = 504

_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,63}")
_NAME_RULE: Final = "must be 1 to 63 of A-Z a-z 0-9 . _ -"


class Command(enum.IntEnum):
    """What a frame is about."""

    HELLO = 1
    MEMORY = 2
    ADD = 3
    INVALIDATE = 4
    PING = 5
    BATCH = 16
    TRANSLATE = 17


class Feature(enum.IntFlag):
    """What an agent may offer in ``HELLO``."""

    PREPARE = 1
    WIDE = 2


class RemapperKind(enum.IntEnum):
    """Whose translations they are."""

    NONE = 0
    VTD = 1
    AMDVI = 2
    #: The VMM's own: ``TRANSLATE``.
    VMM = 3


class Code(enum.IntEnum):
    """Which rule was broken. The number goes over the wire."""

    FRAME = 1
    VERSION = 2
    ORDER = 3
    COMMAND = 4
    PEER = 5
    NAME = 6
    QUOTA = 7
    DESCRIPTOR = 8
    VECTOR = 9
    MEMORY = 10
    PAYLOAD = 11
    INTERNAL = 12


#: The errno that goes with a code, unless the error says otherwise.
_ERRNO: Final = {
    Code.FRAME: errno.EBADMSG,
    Code.VERSION: errno.EPROTONOSUPPORT,
    Code.ORDER: errno.EPROTO,
    Code.COMMAND: errno.EOPNOTSUPP,
    Code.PEER: errno.EACCES,
    Code.NAME: errno.EADDRINUSE,
    Code.QUOTA: errno.EDQUOT,
    Code.DESCRIPTOR: errno.EINVAL,
    Code.VECTOR: errno.EINVAL,
    Code.MEMORY: errno.EINVAL,
    Code.PAYLOAD: errno.EINVAL,
    Code.INTERNAL: errno.EIO,
}

_NO_INDEX: Final = 0xFFFF_FFFF


class WireError(CallerError):
    """The peer broke a rule of the protocol. ``code``, ``errno`` and ``index`` are what it is told."""

    def __init__(
        self,
        code: Code,
        object: str,  # noqa: A002 - IrqrouterError's name
        rule: str,
        *,
        errno: int | None = None,
        index: int | None = None,
    ) -> None:
        super().__init__(object, rule)
        self.code = code
        self.errno = _ERRNO[code] if errno is None else errno
        self.index = index

    def __reduce__(self) -> tuple[object, ...]:
        return _wire_error, (self.code, self.object, self.rule, self.errno, self.index)


def _wire_error(code: Code, object: str, rule: str, errno: int, index: int | None) -> WireError:  # noqa: A002 - as above
    return WireError(code, object, rule, errno=errno, index=index)


# --- frames ------------------------------------------------------------------------------------------------------


class Frame(msgspec.Struct, frozen=True):
    """One packet. ``errno`` is not 0 exactly in an error reply; ``more``: the reply goes on in another frame."""

    id: int
    command: int
    payload: bytes = b""
    reply: bool = False
    more: bool = False
    errno: int = 0


_REPLY, _ERROR_FLAG, _MORE = 1, 2, 4


def encode(frame: Frame) -> bytes:
    """The packet."""
    size = HEADER_SIZE + len(frame.payload)
    if size > FRAME_MAX:
        raise SpecError(f"a frame of {size} bytes", f"must be at most {FRAME_MAX}")
    if ((frame.errno or frame.more) and not frame.reply) or (frame.errno and frame.more):
        raise SpecError(f"frame {frame.id}", "an errno, or more to follow, is a reply's, and not both at once")
    flags = _REPLY * frame.reply | _ERROR_FLAG * bool(frame.errno) | _MORE * frame.more
    return _pack(_HEADER, "frame", frame.id, frame.command, size, flags, frame.errno) + frame.payload


def decode(packet: bytes) -> Frame:
    """The frame in ``packet``; :class:`WireError` with ``FRAME`` where it is none."""
    if len(packet) < HEADER_SIZE:
        raise WireError(Code.FRAME, f"a frame of {len(packet)} bytes", f"must have a header of {HEADER_SIZE}")
    id, command, size, flags, error = _HEADER.unpack_from(packet)  # noqa: A001 - the field's name
    frame = f"frame {id} of command {command}"
    if size != len(packet) or size > FRAME_MAX:
        raise WireError(Code.FRAME, frame, f"says {size} bytes and has {len(packet)}")
    if flags & ~(_REPLY | _ERROR_FLAG | _MORE):
        raise WireError(Code.FRAME, frame, f"flags {flags:#x} are not defined")
    if flags & (_ERROR_FLAG | _MORE) and not flags & _REPLY:
        raise WireError(Code.FRAME, frame, "ERROR and MORE are for replies")
    if bool(flags & _ERROR_FLAG) != bool(error) or (flags & _ERROR_FLAG and flags & _MORE):
        raise WireError(Code.FRAME, frame, f"flags {flags:#x} and errno {error} contradict one another")
    return Frame(id, command, packet[HEADER_SIZE:], bool(flags & _REPLY), bool(flags & _MORE), error)


def error_frame(id: int, command: int, error: WireError) -> Frame:  # noqa: A002 - the field's name
    """The reply that tells ``error``."""
    index = _NO_INDEX if error.index is None else error.index
    text = str(error).encode()[:ERROR_TEXT_MAX].decode(errors="ignore").encode()
    return Frame(id, command, _ERROR.pack(error.code, index) + text, reply=True, errno=error.errno)


def error_of(frame: Frame) -> WireError:
    """What an error reply says. A code from the future becomes ``INTERNAL``."""
    if len(frame.payload) < _ERROR.size:
        raise WireError(Code.FRAME, f"error reply {frame.id}", "is too short")
    number, index = _ERROR.unpack_from(frame.payload)
    code = Code(number) if number in Code.__members__.values() else Code.INTERNAL
    text = frame.payload[_ERROR.size :].decode(errors="replace")
    name, _, rule = text.partition(": ")
    return WireError(code, name, rule, errno=frame.errno, index=None if index == _NO_INDEX else index)


# --- HELLO -------------------------------------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """``HELLO``'s payload."""

    name: str
    slots: int
    remapper: RemapperKind
    host_address_width: int = 0
    features: Feature = Feature(0)
    version_low: int = VERSION
    version_high: int = VERSION


def encode_hello(hello: Hello) -> bytes:
    """The payload."""
    if not _NAME.fullmatch(hello.name):
        raise SpecError(f"the name {hello.name!r}", _NAME_RULE)
    return _pack(
        _HELLO, "HELLO", MAGIC, hello.version_low, hello.version_high, hello.features, hello.remapper,
        hello.host_address_width, 0, hello.slots, 0, hello.name.encode(),
    )  # fmt: skip


def decode_hello(payload: bytes) -> Hello:
    """The payload's meaning; only its first eight bytes are looked at before the version is agreed on."""
    if len(payload) < _HELLO_VERSIONS.size:
        raise WireError(Code.PAYLOAD, "HELLO", f"has {len(payload)} bytes, too few")
    magic, low, high = _HELLO_VERSIONS.unpack_from(payload)
    if magic != MAGIC:
        raise WireError(Code.PAYLOAD, "HELLO", f"magic {magic:#x} must be {MAGIC:#x}")
    if not 1 <= low <= high:
        raise WireError(Code.PAYLOAD, "HELLO", f"versions {low} to {high} are no range")
    if not low <= VERSION <= high:
        raise WireError(Code.VERSION, "HELLO", f"the agent speaks {low} to {high}, the service {VERSION} to {VERSION}")
    if len(payload) < _HELLO.size:
        raise WireError(Code.PAYLOAD, "HELLO", f"has {len(payload)} bytes, must have {_HELLO.size}")
    _, _, _, features, kind, width, zero, slots, zeros, raw_name = _HELLO.unpack_from(payload)
    if zero or zeros:
        raise WireError(Code.PAYLOAD, "HELLO", "reserved fields must be 0")
    if kind not in RemapperKind.__members__.values():
        raise WireError(Code.PAYLOAD, "HELLO", f"remapper {kind} is not defined")
    if not (12 <= width <= 64 if kind == RemapperKind.VTD else width == 0):
        raise WireError(Code.PAYLOAD, "HELLO", f"host_address_width {width} must be 12 to 64 for VT-d, 0 otherwise")
    if not 1 <= slots <= SLOTS_MAX:
        raise WireError(Code.PAYLOAD, "HELLO", f"{slots} slots must be 1 to {SLOTS_MAX}")
    name = raw_name.rstrip(b"\0").decode("latin-1")
    if not _NAME.fullmatch(name):
        raise WireError(Code.NAME, "HELLO's name", _NAME_RULE, errno=errno.EINVAL)
    return Hello(
        name=name,
        slots=slots,
        remapper=RemapperKind(kind),
        host_address_width=width,
        features=Feature(features & int(Feature.PREPARE | Feature.WIDE)),  # others are from the future
        version_low=low,
        version_high=high,
    )


class Welcome(msgspec.Struct, frozen=True, kw_only=True):
    """``HELLO``'s reply."""

    vectors_max: int
    features: Feature
    regions_max: int
    frames_per_second: int
    version: int = VERSION


def encode_welcome(welcome: Welcome) -> bytes:
    """The reply's payload."""
    return _pack(
        _WELCOME, "HELLO's reply", welcome.version, 0, welcome.vectors_max, welcome.features, welcome.regions_max,
        welcome.frames_per_second, 0,
    )  # fmt: skip


def decode_welcome(payload: bytes) -> Welcome:
    """The reply's meaning."""
    _exactly("HELLO's reply", payload, _WELCOME.size)
    version, zero, vectors_max, features, regions_max, frames_per_second, zeros = _WELCOME.unpack(payload)
    if version != VERSION:
        raise WireError(Code.VERSION, "HELLO's reply", f"version {version} was not offered")
    if zero or zeros or features & ~int(Feature.PREPARE | Feature.WIDE):
        raise WireError(Code.PAYLOAD, "HELLO's reply", "has reserved fields or features that were not offered")
    return Welcome(
        vectors_max=vectors_max,
        features=Feature(features),
        regions_max=regions_max,
        frames_per_second=frames_per_second,
        version=version,
    )


# --- MEMORY, ADD, INVALIDATE -------------------------------------------------------------------------------------


class Region(msgspec.Struct, frozen=True):
    """An entry of ``MEMORY``; ``descriptor`` is an index into the frame's descriptors."""

    gpa: int
    size: int
    offset: int
    descriptor: int


def encode_memory(regions: Sequence[Region]) -> bytes:
    """The payload."""
    entries = (_pack(_REGION, "region", each.gpa, each.size, each.offset, each.descriptor, 0) for each in regions)
    return _COUNT.pack(len(regions), 0) + b"".join(entries)


def decode_memory(payload: bytes, descriptors: int) -> list[Region]:
    """The regions. Ranges are left to whoever maps them; the descriptors' indices are checked here."""
    regions: list[Region] = []
    for index, (gpa, size, offset, descriptor, zero) in enumerate(_entries("MEMORY", payload, _REGION)):
        if zero:
            raise WireError(Code.PAYLOAD, f"region {index}", "reserved fields must be 0", index=index)
        if descriptor >= descriptors:
            raise WireError(Code.MEMORY, f"region {index}", f"there is no descriptor {descriptor}", index=index)
        regions.append(Region(gpa, size, offset, descriptor))
    if not regions:
        raise WireError(Code.MEMORY, "MEMORY", "must have a region")
    if unnamed := set(range(descriptors)) - {region.descriptor for region in regions}:
        raise WireError(Code.MEMORY, f"descriptor {min(unnamed)}", "is no region's")
    return regions


class Added(msgspec.Struct, frozen=True):
    """An entry of ``ADD``."""

    vector: int
    born: int
    new: bool


def encode_add(added: Sequence[Added]) -> bytes:
    """The payload."""
    entries = (_pack(_ADDED, "vector", each.vector, int(each.new), each.born) for each in added)
    return _COUNT.pack(len(added), 0) + b"".join(entries)


def decode_add(payload: bytes, descriptors: int) -> list[Added]:
    """The vectors, no number twice."""
    added: list[Added] = []
    seen: set[int] = set()
    for index, (vector, flags, born) in enumerate(_entries("ADD", payload, _ADDED)):
        if flags > 1:
            raise WireError(Code.PAYLOAD, f"vector {vector}", f"flags {flags:#x} are not defined", index=index)
        if not born:
            raise WireError(Code.VECTOR, f"vector {vector}", "born must not be 0", index=index)
        if vector in seen:
            raise WireError(Code.VECTOR, f"vector {vector}", "is named twice", index=index)
        seen.add(vector)
        added.append(Added(vector, born, bool(flags)))
    if not added:
        raise WireError(Code.VECTOR, "ADD", "must have a vector")
    if len(added) != descriptors:
        raise WireError(Code.DESCRIPTOR, "ADD", f"has {len(added)} vectors and {descriptors} descriptors")
    return added


def encode_scope(scope: Scope) -> bytes:
    """``INVALIDATE``'s payload."""
    return _pack(_SCOPE, "INVALIDATE", scope.first, scope.last)


def decode_scope(payload: bytes) -> Scope:
    """``INVALIDATE``'s meaning."""
    _exactly("INVALIDATE", payload, _SCOPE.size)
    first, last = _SCOPE.unpack(payload)
    if not first <= last <= UNINDEXED:
        raise WireError(
            Code.PAYLOAD, "INVALIDATE", f"cookies {first:#x} to {last:#x} are no range up to {UNINDEXED:#x}"
        )
    return Scope(first, last)


# --- operations --------------------------------------------------------------------------------------------------


class Kind(enum.IntEnum):
    """What an operation does."""

    SET_ROUTE = 1
    CATCH = 2
    CATCH_FAULT = 3
    ASSIGN = 4
    PREPARE = 5
    MISS = 16
    UPDATE = 17
    FAULT = 18


#: A fault as hardware writes it: low and high quadword.
Record: TypeAlias = tuple[int, int]

#: Which kinds stand where.
IN_REPLY: Final = frozenset({Kind.SET_ROUTE, Kind.ASSIGN})
IN_BATCH: Final = frozenset({Kind.SET_ROUTE, Kind.CATCH, Kind.CATCH_FAULT, Kind.ASSIGN, Kind.PREPARE})
IN_TRANSLATE: Final = frozenset({Kind.MISS})
IN_TRANSLATED: Final = frozenset({Kind.MISS, Kind.UPDATE, Kind.FAULT})

_WITH_RECORD: Final = frozenset({Kind.CATCH_FAULT, Kind.FAULT})
_WITH_MESSAGE: Final = frozenset({Kind.SET_ROUTE, Kind.CATCH, Kind.PREPARE, Kind.UPDATE})
_FLAGGED: Final = frozenset({Kind.CATCH_FAULT, Kind.ASSIGN})


class Operation(msgspec.Struct, frozen=True):
    """One operation. ``flag`` is ``RECORD`` (``CATCH_FAULT``) or ``DELIVERING`` (``ASSIGN``).

    ``address`` and ``data`` are a message's; in ``CATCH_FAULT`` and ``FAULT`` there is a ``record`` instead.
    """

    kind: Kind
    vector: int
    generation: int
    address: int = 0
    data: int = 0
    record: Record = (0, 0)
    flag: bool = False


def encode_operations(operations: Sequence[Operation]) -> bytes:
    """The payload of at most :data:`OPERATIONS_MAX` operations."""
    return _COUNT.pack(len(operations), 0) + b"".join(map(_encode_operation, operations))


def _encode_operation(op: Operation) -> bytes:
    if op.kind in _WITH_RECORD:
        low, high = op.record
        tail = (low, high & 0xFFFF_FFFF, high >> 32)
        lost = op.address or op.data
    else:
        tail = (op.address, op.data, 0)
        lost = any(op.record) or ((op.address or op.data) and op.kind not in _WITH_MESSAGE)
    if lost or (op.flag and op.kind not in _FLAGGED):
        raise SpecError(f"{op.kind.name} of vector {op.vector}", "has a field that this kind does not have")
    return _pack(
        _OPERATION, f"{op.kind.name} of vector {op.vector}", op.kind, op.flag, 0, op.vector, op.generation, *tail
    )


def decode_operations(payload: bytes, kinds: frozenset[Kind]) -> list[Operation]:
    """The operations, each of one of ``kinds``."""
    operations: list[Operation] = []
    for index, (number, flags, zero, vector, generation, first, low, high) in enumerate(
        _entries("operations", payload, _OPERATION)
    ):
        if number not in kinds:
            raise WireError(Code.PAYLOAD, f"operation {index}", f"kind {number} does not belong here", index=index)
        kind = Kind(number)
        if zero or flags > (kind in _FLAGGED):
            raise WireError(
                Code.PAYLOAD, f"operation {index}", "has flags or reserved fields that must be 0", index=index
            )
        if kind in _WITH_RECORD:
            operations.append(Operation(kind, vector, generation, record=(first, high << 32 | low), flag=bool(flags)))
            continue
        if high or ((first or low) and kind not in _WITH_MESSAGE):
            raise WireError(
                Code.PAYLOAD, f"operation {index}", "has a message or reserved fields that must be 0", index=index
            )
        operations.append(Operation(kind, vector, generation, first, low, flag=bool(flags)))
    return operations


def encode_errnos(errnos: Sequence[int]) -> bytes:
    """The payload of ``BATCH``'s reply."""
    return _COUNT.pack(len(errnos), 0) + _pack(struct.Struct(f"<{len(errnos)}I"), "errnos", *errnos)


def decode_errnos(payload: bytes, count: int) -> list[int]:
    """The errnos of a batch of ``count`` operations."""
    _exactly("BATCH's reply", payload, _COUNT.size + 4 * count)
    if _COUNT.unpack_from(payload) != (count, 0):
        raise WireError(Code.PAYLOAD, "BATCH's reply", f"must have {count} errnos")
    return list(struct.unpack_from(f"<{count}I", payload, _COUNT.size))


# --- the state page ----------------------------------------------------------------------------------------------


class SlotState(enum.IntEnum):
    """A vector's state, bits 3:0 of the slot's ``state``."""

    FREE = 0
    DEASSIGNED = 1
    ASSIGNED = 2
    MASKED = 3


#: The state in the slot's ``state``, and the flags.
STATE_MASK: Final = 0x0F
PREPARED: Final = 0x10
ROUTED: Final = 0x20


class Slot(msgspec.Struct, frozen=True):
    """A slot of the page, 64 bytes, in the order of its fields. ``state`` has the flags in it: ask :meth:`is_in`."""

    generation: int = 0
    born: int = 0
    address: int = 0
    data: int = 0
    requester: int = 0
    state: int = 0
    refused: int = 0
    cookie: int = 0
    gsi: int = 0
    invalidations: int = 0
    caught: int = 0
    faults: int = 0
    stale: int = 0
    discarded: int = 0
    last_catch_ns: int = 0

    def is_in(self, state: SlotState) -> bool:
        """Whether the vector is in ``state``, whatever its flags."""
        return self.state & STATE_MASK == state

    def waits(self) -> bool:
        """Whether its events wait for the service: it is deassigned, and no decision stands."""
        return self.is_in(SlotState.DEASSIGNED) and not self.state & PREPARED


class PageHeader(msgspec.Struct, frozen=True):
    """The page's header, without its magic."""

    slots_used: int = 0
    table: int = 0
    control: int = 0


def page_size(slots: int) -> int:
    """The page's size in bytes for ``slots`` slots."""
    return PAGE_HEADER_SIZE + (SLOT_SIZE * slots + 4095) // 4096 * 4096


def slot_offset(vector: int) -> int:
    """Where the slot of ``vector`` begins. Its generation is its first quadword."""
    return PAGE_HEADER_SIZE + SLOT_SIZE * vector


def encode_slot(slot: Slot) -> bytes:
    """The slot's 64 bytes."""
    return _pack(_SLOT, "slot", *msgspec.structs.astuple(slot))


def decode_slot(raw: bytes | memoryview) -> Slot:
    """The slot in 64 bytes, whatever they are."""
    return Slot(*_SLOT.unpack(raw))


def encode_page_header(header: PageHeader) -> bytes:
    """The first 24 bytes of the page."""
    return _pack(_PAGE_HEADER, "page header", PAGE_MAGIC, *msgspec.structs.astuple(header))


def decode_page_header(raw: bytes | memoryview) -> PageHeader | None:
    """The header; None where the agent has not written it."""
    magic, slots_used, table, control = _PAGE_HEADER.unpack_from(raw)
    return PageHeader(slots_used, table, control) if magic == PAGE_MAGIC else None


# --- small parts -------------------------------------------------------------------------------------------------


def _pack(layout: struct.Struct, what: str, *fields: int | bytes) -> bytes:
    try:
        return layout.pack(*fields)
    except struct.error as error:
        raise SpecError(what, f"a field does not fit: {error}") from None


def _exactly(what: str, payload: bytes, size: int) -> None:
    if len(payload) != size:
        raise WireError(Code.PAYLOAD, what, f"has {len(payload)} bytes, must have {size}")


def _entries(what: str, payload: bytes, layout: struct.Struct) -> Iterable[tuple[int, ...]]:
    """The entries behind a count, one or more in a command and any number in a reply."""
    if len(payload) < _COUNT.size:
        raise WireError(Code.PAYLOAD, what, f"has {len(payload)} bytes, too few")
    count, zero = _COUNT.unpack_from(payload)
    if zero:
        raise WireError(Code.PAYLOAD, what, "reserved fields must be 0")
    _exactly(f"{what}, {count} entries", payload, _COUNT.size + count * layout.size)
    return layout.iter_unpack(payload[_COUNT.size :])

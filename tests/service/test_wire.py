"""The codec against golden frames, which were written from the specification and not by it, and against rubbish."""

import errno
import pickle
import struct
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import hypothesis
import msgspec
import pytest
from hypothesis import strategies as st

from irqrouter.errors import CallerError, SpecError
from irqrouter.scope import EVERYTHING, Scope
from irqrouter.service.wire import (
    DESCRIPTORS_MAX,
    ERROR_TEXT_MAX,
    FRAME_MAX,
    HEADER_SIZE,
    IN_BATCH,
    IN_REPLY,
    IN_TRANSLATE,
    IN_TRANSLATED,
    OPERATIONS_MAX,
    PREPARED,
    ROUTED,
    SLOTS_MAX,
    UNANSWERED_MAX,
    Added,
    Code,
    Command,
    Feature,
    Frame,
    Hello,
    Kind,
    Operation,
    PageHeader,
    Region,
    RemapperKind,
    Slot,
    SlotState,
    Welcome,
    WireError,
    decode,
    decode_add,
    decode_errnos,
    decode_hello,
    decode_memory,
    decode_operations,
    decode_page_header,
    decode_scope,
    decode_slot,
    decode_welcome,
    encode,
    encode_add,
    encode_errnos,
    encode_hello,
    encode_memory,
    encode_operations,
    encode_page_header,
    encode_scope,
    encode_slot,
    encode_welcome,
    error_frame,
    error_of,
    page_size,
    slot_offset,
)
from tests.service.frames import FRAMES, parsed

HELLO = Hello(
    name="vm-1",
    slots=256,
    remapper=RemapperKind.VTD,
    host_address_width=52,
    features=Feature.PREPARE | Feature.WIDE,
)
WELCOME = Welcome(
    vectors_max=256, features=Feature.PREPARE | Feature.WIDE, regions_max=64, frames_per_second=5000, version=1
)
FUTURE = Hello(
    name="A" * 63,
    slots=4096,
    remapper=RemapperKind.VMM,
    features=Feature.PREPARE | Feature.WIDE,  # what this version knows of those offered
    version_low=1,
    version_high=9,
)
REGIONS = [Region(0, 0xA0000, 0, 0), Region(1 << 32, 2 << 30, 1 << 20, 1)]
ADDED = [Added(0, 1, new=True), Added(7, 0x0102030405060708, new=False)]
SET_ROUTE = Operation(Kind.SET_ROUTE, 0, 1, 0xFEE01000, 0x4041)
ASSIGN = Operation(Kind.ASSIGN, 0, 1)
BATCH = [
    Operation(Kind.SET_ROUTE, 1, 10, 0xFEE01000, 0x4041),
    Operation(Kind.CATCH, 2, 11, 0xFEE00000, 0x4042),
    Operation(Kind.CATCH_FAULT, 3, 12, record=(0x0005000000000000, 0x8000002200000018)),
    Operation(Kind.CATCH_FAULT, 4, 13, record=(0x0006000000000000, 0x8000002300000019), flag=True),
    Operation(Kind.ASSIGN, 5, 14),
    Operation(Kind.ASSIGN, 6, 15, flag=True),
    Operation(Kind.PREPARE, 7, (1 << 64) - 1, 0xFEE02000, 0x4043),
]
ERRNOS = [0, errno.EAGAIN, errno.ESTALE, errno.EALREADY, errno.EINPROGRESS, errno.ENXIO, errno.ECANCELED]
MISSES = [Operation(Kind.MISS, vector, generation) for vector, generation in ((1, 10), (2, 11), (3, 12))]
TRANSLATED = [
    Operation(Kind.UPDATE, 1, 10, 0xFEE01000, 0x4041),
    Operation(Kind.FAULT, 2, 11, record=(0x1122334455667788, 0x99AABBCCDDEEFF00)),
    Operation(Kind.MISS, 3, 12),
]
SLOT = Slot(
    generation=0x0102030405060708,
    born=1,
    address=0xFEE000D0,
    data=2,
    requester=0x18,
    state=SlotState.DEASSIGNED | PREPARED | ROUTED,
    refused=errno.EINVAL,
    cookie=6,
    gsi=24,
    invalidations=3,
    caught=4,
    faults=5,
    stale=6,
    discarded=7,
    last_catch_ns=8,
)

#: What each golden frame is: id, command and whether more follows; the payload's value, its encoder and its decoder.
GOLDEN: dict[str, tuple[int, int, bool, Any, Callable[[Any], bytes], Callable[[bytes], Any]]] = {
    "hello": (1, Command.HELLO, False, HELLO, encode_hello, decode_hello),
    "hello-amdvi": (
        0,
        Command.HELLO,
        False,
        Hello(name=".", slots=1, remapper=RemapperKind.AMDVI),
        encode_hello,
        decode_hello,
    ),
    "hello-reply": (1, Command.HELLO, False, WELCOME, encode_welcome, decode_welcome),
    "memory": (2, Command.MEMORY, False, REGIONS, encode_memory, lambda raw: decode_memory(raw, 2)),
    "add": (3, Command.ADD, False, ADDED, encode_add, lambda raw: decode_add(raw, 2)),
    "add-reply": (
        3,
        Command.ADD,
        False,
        [SET_ROUTE, ASSIGN],
        encode_operations,
        lambda raw: decode_operations(raw, IN_REPLY),
    ),
    "add-reply-first": (
        3,
        Command.ADD,
        True,
        [SET_ROUTE],
        encode_operations,
        lambda raw: decode_operations(raw, IN_REPLY),
    ),
    "add-reply-last": (
        3,
        Command.ADD,
        False,
        [ASSIGN],
        encode_operations,
        lambda raw: decode_operations(raw, IN_REPLY),
    ),
    "add-reply-empty": (3, Command.ADD, False, [], encode_operations, lambda raw: decode_operations(raw, IN_REPLY)),
    "invalidate-one": (4, Command.INVALIDATE, False, Scope(5, 5), encode_scope, decode_scope),
    "invalidate-all": (5, Command.INVALIDATE, False, EVERYTHING, encode_scope, decode_scope),
    "invalidate-reply": (
        4,
        Command.INVALIDATE,
        False,
        [Operation(Kind.SET_ROUTE, 7, 256, 0x00000100_FEE2C000, 0x4050)],
        encode_operations,
        lambda raw: decode_operations(raw, IN_REPLY),
    ),
    "batch": (0x8000, Command.BATCH, False, BATCH, encode_operations, lambda raw: decode_operations(raw, IN_BATCH)),
    "batch-reply": (0x8000, Command.BATCH, False, ERRNOS, encode_errnos, lambda raw: decode_errnos(raw, 7)),
    "translate": (
        0x8001,
        Command.TRANSLATE,
        False,
        MISSES,
        encode_operations,
        lambda raw: decode_operations(raw, IN_TRANSLATE),
    ),
    "translate-reply": (
        0x8001,
        Command.TRANSLATE,
        False,
        TRANSLATED,
        encode_operations,
        lambda raw: decode_operations(raw, IN_TRANSLATED),
    ),
}
EMPTY: Final = {"memory-reply": (2, Command.MEMORY), "ping": (0xFFFF, Command.PING), "ping-reply": (0xFFFF, 5)}
ERRORS: Final = {
    "hello-reply-error": (Code.VERSION, errno.EPROTONOSUPPORT, None, "HELLO", "no common version"),
    "memory-reply-error": (Code.MEMORY, errno.EINVAL, 1, "region 1", "overlaps region 0"),
    "add-reply-error": (Code.DESCRIPTOR, errno.EBUSY, 1, "vector 7", "its eventfd is a vector already"),
    "unknown-command-error": (Code.COMMAND, errno.EOPNOTSUPP, None, "command 9", "is not defined"),
}


def refused(decoder: Callable[[], object]) -> tuple[Code, int, int | None]:
    """What the peer is told about what ``decoder`` must refuse."""
    with pytest.raises(WireError) as caught:
        decoder()
    return caught.value.code, caught.value.errno, caught.value.index


PAYLOAD: Final = (Code.PAYLOAD, errno.EINVAL, None)
BAD_FRAME: Final = (Code.FRAME, errno.EBADMSG, None)


def with_field(payload: bytes, offset: int, form: str, value: int) -> bytes:
    """``payload`` with one field replaced."""
    changed = bytearray(payload)
    struct.pack_into(f"<{form}", changed, offset, value)
    return bytes(changed)


# --- golden frames ---------------------------------------------------------------------------------------------------


def test_every_golden_frame_is_tested_here() -> None:
    told = [*GOLDEN, *EMPTY, *ERRORS, "hello-from-the-future", "page-header", "page-slot"]
    assert sorted(told) == sorted(name for name in FRAMES if not name.startswith("bad-"))


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_frame_decodes(name: str) -> None:
    id, command, more, value, _, decode_payload = GOLDEN[name]  # noqa: A001 - the field's name
    frame = decode(FRAMES[name])
    reply = name.partition("-")[2].startswith("reply")
    assert frame == Frame(id, command, FRAMES[name][HEADER_SIZE:], reply=reply, more=more)
    assert decode_payload(frame.payload) == value


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_frame_encodes(name: str) -> None:
    id, command, more, value, encode_payload, _ = GOLDEN[name]  # noqa: A001 - as above
    reply = name.partition("-")[2].startswith("reply")
    assert encode(Frame(id, command, encode_payload(value), reply=reply, more=more)).hex() == FRAMES[name].hex()


@pytest.mark.parametrize("name", EMPTY)
def test_golden_frame_without_payload(name: str) -> None:
    frame = Frame(*EMPTY[name], reply=name.endswith("reply"))
    assert decode(FRAMES[name]) == frame
    assert encode(frame) == FRAMES[name]


@pytest.mark.parametrize("name", ERRORS)
def test_golden_error_reply(name: str) -> None:
    code, code_errno, index, object, rule = ERRORS[name]  # noqa: A001 - IrqrouterError's name
    frame = decode(FRAMES[name])
    assert frame.reply
    assert frame.errno == code_errno
    error = error_of(frame)
    assert (error.code, error.errno, error.index) == (code, code_errno, index)
    assert (error.object, error.rule) == (object, rule)
    assert encode(error_frame(frame.id, frame.command, error)) == FRAMES[name]


def test_hello_of_a_later_version_loses_what_this_one_does_not_know() -> None:
    frame = decode(FRAMES["hello-from-the-future"])
    assert (frame.id, frame.command) == (0xFFFE, Command.HELLO)
    assert decode_hello(frame.payload) == FUTURE


def test_golden_page_header() -> None:
    header = PageHeader(slots_used=2, table=0x1008, control=3)
    assert decode_page_header(FRAMES["page-header"] + bytes(4072)) == header
    assert encode_page_header(header) == FRAMES["page-header"]


def test_golden_slot() -> None:
    assert decode_slot(memoryview(FRAMES["page-slot"])) == SLOT
    assert encode_slot(SLOT) == FRAMES["page-slot"]


def test_page_without_magic_is_not_filled() -> None:
    assert decode_page_header(bytes(4096)) is None
    assert decode_page_header(with_field(FRAMES["page-header"], 0, "I", 0x52515249)) is None


@pytest.mark.parametrize(("slots", "size"), [(1, 8192), (64, 8192), (65, 12288), (4096, 4096 + 64 * 4096)])
def test_size_of_the_page(slots: int, size: int) -> None:
    assert page_size(slots) == size
    assert slot_offset(0) == 4096
    assert slot_offset(slots - 1) + 64 <= size


def test_limits_are_the_specifications() -> None:
    assert (FRAME_MAX, DESCRIPTORS_MAX, OPERATIONS_MAX) == (65_536, 240, 2_047)
    assert (SLOTS_MAX, UNANSWERED_MAX, ERROR_TEXT_MAX, HEADER_SIZE) == (4_096, 1_024, 504, 16)


@pytest.mark.parametrize("text", ["ab: abc", "ab: 0*3", 'ab: "x', "0a", "ab: 0a ab: 0b"])
def test_golden_file_that_does_not_keep_to_the_format_is_refused(text: str) -> None:
    with pytest.raises(AssertionError):
        parsed("first:\n" * (text != "0a") + text + "\n0a0" * (text == "0a"))


# --- frames ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [name for name in FRAMES if name.startswith("bad-") and not name.startswith("bad-batch-")]
)
def test_bad_frame(name: str) -> None:
    assert refused(lambda: decode(FRAMES[name])) == BAD_FRAME


@pytest.mark.parametrize("bit", range(3, 32))
def test_flag_bits_that_must_be_0(bit: int) -> None:
    assert refused(lambda: decode(with_field(FRAMES["ping-reply"], 8, "I", 1 | 1 << bit))) == BAD_FRAME


@pytest.mark.parametrize("kept", range(HEADER_SIZE))
def test_frame_shorter_than_a_header(kept: int) -> None:
    assert refused(lambda: decode(FRAMES["ping"][:kept])) == BAD_FRAME


@pytest.mark.parametrize("kept", range(HEADER_SIZE, 40))
def test_frame_that_was_truncated(kept: int) -> None:
    assert refused(lambda: decode(FRAMES["add-reply"][:kept])) == BAD_FRAME


def test_largest_frame_and_one_byte_more() -> None:
    largest = Frame(1, Command.BATCH, bytes(FRAME_MAX - HEADER_SIZE))
    packet = encode(largest)
    assert len(packet) == FRAME_MAX
    assert decode(packet) == largest
    with pytest.raises(SpecError):
        encode(Frame(1, Command.BATCH, bytes(FRAME_MAX - HEADER_SIZE + 1)))
    assert refused(lambda: decode(with_field(packet + b"\0", 4, "I", FRAME_MAX + 1))) == BAD_FRAME


def test_most_operations_and_one_more() -> None:
    most = [ASSIGN] * OPERATIONS_MAX
    packet = encode(Frame(1, Command.BATCH, encode_operations(most)))
    assert decode_operations(decode(packet).payload, IN_BATCH) == most
    with pytest.raises(SpecError):
        encode(Frame(1, Command.BATCH, encode_operations([*most, ASSIGN])))


@pytest.mark.parametrize("command", [0, 6, 15, 18, 0xFFFF])
def test_unknown_command_is_a_frame_all_the_same(command: int) -> None:
    frame = Frame(1, command)
    assert decode(encode(frame)) == frame


@pytest.mark.parametrize(
    "frame",
    [
        Frame(-1, 1),
        Frame(1 << 16, 1),
        Frame(1, -1),
        Frame(1, 1 << 16),
        Frame(1, 1, reply=True, errno=-5),
        Frame(1, 1, reply=True, errno=1 << 32),
        Frame(1, 1, errno=5),
        Frame(1, 1, more=True),
        Frame(1, 1, reply=True, more=True, errno=5),
    ],
)
def test_frame_that_does_not_fit_is_not_encoded(frame: Frame) -> None:
    with pytest.raises(SpecError):
        encode(frame)


# --- error replies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "code_errno"),
    [
        (Code.FRAME, errno.EBADMSG),
        (Code.VERSION, errno.EPROTONOSUPPORT),
        (Code.ORDER, errno.EPROTO),
        (Code.COMMAND, errno.EOPNOTSUPP),
        (Code.PEER, errno.EACCES),
        (Code.NAME, errno.EADDRINUSE),
        (Code.QUOTA, errno.EDQUOT),
        (Code.DESCRIPTOR, errno.EINVAL),
        (Code.VECTOR, errno.EINVAL),
        (Code.MEMORY, errno.EINVAL),
        (Code.PAYLOAD, errno.EINVAL),
        (Code.INTERNAL, errno.EIO),
    ],
)
def test_errno_of_a_code(code: Code, code_errno: int) -> None:
    error = WireError(code, "object", "rule")
    assert error.errno == code_errno
    again = error_of(decode(encode(error_frame(3, Command.ADD, error))))
    assert (again.code, again.errno, again.index, str(again)) == (code, code_errno, None, "object: rule")


def test_codes_are_those_of_the_table() -> None:
    assert sorted(Code) == list(range(1, 13))


@pytest.mark.parametrize("index", [None, 0, 1, 0xFFFF_FFFE])
def test_index_of_an_error(index: int | None) -> None:
    error = WireError(Code.DESCRIPTOR, "descriptor", "taken", errno=errno.EBUSY, index=index)
    frame = error_frame(3, Command.ADD, error)
    assert struct.unpack_from("<II", frame.payload) == (8, 0xFFFF_FFFF if index is None else index)
    again = error_of(frame)
    assert (again.errno, again.index) == (errno.EBUSY, index)


@pytest.mark.parametrize("text", ["a" * 600, "ü" * 400, "a" + "ü" * 400, "\U0001f980" * 200])
def test_text_of_an_error_is_cut_between_characters(text: str) -> None:
    frame = error_frame(3, Command.ADD, WireError(Code.INTERNAL, "it", text))
    cut = frame.payload[8:].decode()
    assert ERROR_TEXT_MAX - 4 < len(frame.payload) - 8 <= ERROR_TEXT_MAX
    assert f"it: {text}".startswith(cut)


def test_code_of_the_future_becomes_internal() -> None:
    frame = Frame(3, Command.ADD, struct.pack("<II", 99, 4) + b"it: broke", reply=True, errno=errno.ERANGE)
    error = error_of(frame)
    assert (error.code, error.errno, error.index) == (Code.INTERNAL, errno.ERANGE, 4)


def test_text_that_is_not_utf_8_is_shown_as_far_as_it_goes() -> None:
    error = error_of(Frame(3, 3, struct.pack("<II", 12, 0) + b"it: \xff", reply=True, errno=5))
    assert error.rule == "�"


@pytest.mark.parametrize("size", range(8))
def test_error_reply_that_is_too_short(size: int) -> None:
    assert refused(lambda: error_of(Frame(3, 3, bytes(size), reply=True, errno=5))) == BAD_FRAME


def test_wire_error_is_the_callers_and_survives_a_pickle() -> None:
    error = WireError(Code.DESCRIPTOR, "descriptor", "taken", errno=errno.EBUSY, index=3)
    assert isinstance(error, CallerError)
    again = pickle.loads(pickle.dumps(error))
    assert (again.code, again.errno, again.index, str(again)) == (Code.DESCRIPTOR, errno.EBUSY, 3, str(error))


# --- HELLO -----------------------------------------------------------------------------------------------------------

RAW_HELLO: Final = FRAMES["hello"][HEADER_SIZE:]


@pytest.mark.parametrize("kept", [*range(8), 8, 31, 32, 95])
def test_hello_that_is_too_short(kept: int) -> None:
    assert refused(lambda: decode_hello(RAW_HELLO[:kept])) == PAYLOAD


def test_hello_may_be_longer() -> None:
    assert decode_hello(RAW_HELLO + b"later") == HELLO


@pytest.mark.parametrize(
    ("offset", "form", "value"),
    [
        (0, "I", 0x47515249),  # the page's magic
        (0, "I", 0x49525152),  # the wrong way round
        (4, "H", 0),  # versions 0 to 1
        (16, "B", 4),  # no such remapper
        (16, "B", 255),
        (16, "B", 0),  # with a host address width
        (17, "B", 11),
        (17, "B", 65),
        (18, "H", 1),
        (20, "I", 0),
        (20, "I", 4097),
        (24, "Q", 1 << 63),
    ],
)
def test_hello_with_a_wrong_field(offset: int, form: str, value: int) -> None:
    assert refused(lambda: decode_hello(with_field(RAW_HELLO, offset, form, value))) == PAYLOAD


@pytest.mark.parametrize(
    ("offset", "form", "value", "field"),
    [(17, "B", 12, "host_address_width"), (17, "B", 64, "host_address_width"), (20, "I", 1, "slots")],
)
def test_hello_with_a_field_at_its_limit(offset: int, form: str, value: int, field: str) -> None:
    hello = decode_hello(with_field(RAW_HELLO, offset, form, value))
    assert hello == msgspec.structs.replace(HELLO, **{field: value})
    assert encode_hello(hello) == with_field(RAW_HELLO, offset, form, value)


@pytest.mark.parametrize(("low", "high"), [(2, 2), (2, 0xFFFF), (0xFFFF, 0xFFFF)])
def test_hello_without_a_common_version(low: int, high: int) -> None:
    raw = struct.pack("<IHH", 0x52515249, low, high)  # nothing behind it is looked at
    with pytest.raises(WireError, match=rf"{low} to {high}, the service 1 to 1") as caught:
        decode_hello(raw)
    assert (caught.value.code, caught.value.errno) == (Code.VERSION, errno.EPROTONOSUPPORT)


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 1), (2, 1), (0xFFFF, 0)])
def test_hello_with_versions_that_are_no_range(low: int, high: int) -> None:
    assert refused(lambda: decode_hello(struct.pack("<IHH", 0x52515249, low, high))) == PAYLOAD


@pytest.mark.parametrize(
    "name",
    [
        b"",
        b"a" * 64,  # no zero
        b"a b",
        b"a/b",
        b"..\n",
        b"vm\0x",  # something behind the zeros
        b"\0vm",
        "ü".encode(),
        b"a\xff",
    ],
)
def test_hello_with_a_bad_name(name: bytes) -> None:
    raw = RAW_HELLO[:32] + name.ljust(64, b"\0")
    assert refused(lambda: decode_hello(raw)) == (Code.NAME, errno.EINVAL, None)


@pytest.mark.parametrize("name", ["a", "a" * 63, "A-Z.a_z", "-", "..", "0"])
def test_hello_with_a_good_name(name: str) -> None:
    hello = msgspec.structs.replace(HELLO, name=name)
    assert decode_hello(encode_hello(hello)) == hello


@pytest.mark.parametrize("name", ["", "a" * 64, "a" * 70, "a b", "a\0b", "ü"])
def test_hello_with_a_name_that_does_not_fit_is_not_encoded(name: str) -> None:
    with pytest.raises(SpecError):
        encode_hello(msgspec.structs.replace(HELLO, name=name))


@pytest.mark.parametrize("field", ["slots", "host_address_width", "version_low", "version_high"])
@pytest.mark.parametrize("value", [-1, 1 << 32])
def test_hello_with_a_field_that_does_not_fit_is_not_encoded(field: str, value: int) -> None:
    with pytest.raises(SpecError):
        encode_hello(msgspec.structs.replace(HELLO, **{field: value}))


@pytest.mark.parametrize("bit", range(64))
def test_unknown_features_are_dropped(bit: int) -> None:
    features = decode_hello(with_field(RAW_HELLO, 8, "Q", 1 << bit)).features
    assert features == (Feature(1 << bit) if bit < 2 else Feature(0))


RAW_WELCOME: Final = FRAMES["hello-reply"][HEADER_SIZE:]


@pytest.mark.parametrize("size", [0, 1, 31, 33, 64])
def test_welcome_of_the_wrong_size(size: int) -> None:
    assert refused(lambda: decode_welcome((RAW_WELCOME * 2)[:size])) == PAYLOAD


@pytest.mark.parametrize(("offset", "form", "value"), [(2, "H", 1), (24, "Q", 1), (8, "Q", 4), (8, "Q", 1 << 63)])
def test_welcome_with_a_wrong_field(offset: int, form: str, value: int) -> None:
    assert refused(lambda: decode_welcome(with_field(RAW_WELCOME, offset, form, value))) == PAYLOAD


@pytest.mark.parametrize("version", [0, 2, 0xFFFF])
def test_welcome_with_a_version_that_was_not_offered(version: int) -> None:
    told = refused(lambda: decode_welcome(with_field(RAW_WELCOME, 0, "H", version)))
    assert told == (Code.VERSION, errno.EPROTONOSUPPORT, None)


# --- MEMORY ----------------------------------------------------------------------------------------------------------

RAW_MEMORY: Final = FRAMES["memory"][HEADER_SIZE:]


def bad_memory(index: int | None) -> tuple[Code, int, int | None]:
    return Code.MEMORY, errno.EINVAL, index


@pytest.mark.parametrize("size", [0, 7, 8, 9, 39, 41, 71])
def test_memory_of_the_wrong_size(size: int) -> None:
    assert refused(lambda: decode_memory(RAW_MEMORY[:size], 2)) == PAYLOAD


def test_memory_without_a_region() -> None:
    assert refused(lambda: decode_memory(bytes(8), 1)) == bad_memory(None)


def test_memory_with_a_reserved_field() -> None:
    assert refused(lambda: decode_memory(with_field(RAW_MEMORY, 4, "I", 1), 2)) == PAYLOAD
    assert refused(lambda: decode_memory(with_field(RAW_MEMORY, 8 + 28, "I", 1), 2)) == (Code.PAYLOAD, errno.EINVAL, 0)
    assert refused(lambda: decode_memory(with_field(RAW_MEMORY, 40 + 28, "I", 1), 2)) == (
        Code.PAYLOAD,
        errno.EINVAL,
        1,
    )


def test_memory_with_a_descriptor_that_is_not_there() -> None:
    assert refused(lambda: decode_memory(RAW_MEMORY, 1)) == bad_memory(1)
    assert refused(lambda: decode_memory(RAW_MEMORY, 0)) == bad_memory(0)
    assert refused(lambda: decode_memory(with_field(RAW_MEMORY, 40 + 24, "I", 0xFFFFFFFF), 2)) == bad_memory(1)


def test_memory_with_a_descriptor_that_is_no_regions() -> None:
    assert refused(lambda: decode_memory(RAW_MEMORY, 3)) == bad_memory(None)


def test_memory_may_name_a_descriptor_twice() -> None:
    assert decode_memory(with_field(RAW_MEMORY, 40 + 24, "I", 0), 1) == [
        REGIONS[0],
        msgspec.structs.replace(REGIONS[1], descriptor=0),
    ]


@pytest.mark.parametrize("count", [0, 1, 3, 0x0800_0002, 0xFFFF_FFFF])
def test_memory_with_a_wrong_count(count: int) -> None:
    assert refused(lambda: decode_memory(with_field(RAW_MEMORY, 0, "I", count), 2)) == PAYLOAD


@pytest.mark.parametrize("field", ["gpa", "size", "offset", "descriptor"])
@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_region_that_does_not_fit_is_not_encoded(field: str, value: int) -> None:
    with pytest.raises(SpecError):
        encode_memory([msgspec.structs.replace(REGIONS[0], **{field: value})])


# --- ADD -------------------------------------------------------------------------------------------------------------

RAW_ADD: Final = FRAMES["add"][HEADER_SIZE:]


@pytest.mark.parametrize("size", [0, 7, 8, 23, 25, 39])
def test_add_of_the_wrong_size(size: int) -> None:
    assert refused(lambda: decode_add(RAW_ADD[:size], 2)) == PAYLOAD


@pytest.mark.parametrize("descriptors", [0, 1, 3, 240])
def test_add_with_another_number_of_descriptors(descriptors: int) -> None:
    assert refused(lambda: decode_add(RAW_ADD, descriptors)) == (Code.DESCRIPTOR, errno.EINVAL, None)


def test_add_without_a_vector() -> None:
    assert refused(lambda: decode_add(bytes(8), 0)) == (Code.VECTOR, errno.EINVAL, None)


def test_add_with_reserved_bits() -> None:
    assert refused(lambda: decode_add(with_field(RAW_ADD, 4, "I", 1), 2)) == PAYLOAD
    for bit in range(1, 32):
        told = refused(partial(decode_add, with_field(RAW_ADD, 24 + 4, "I", 1 << bit), 2))
        assert told == (Code.PAYLOAD, errno.EINVAL, 1)


def test_add_of_a_vector_that_was_never_born() -> None:
    assert refused(lambda: decode_add(with_field(RAW_ADD, 24 + 8, "Q", 0), 2)) == (Code.VECTOR, errno.EINVAL, 1)


def test_add_of_a_vector_twice() -> None:
    assert refused(lambda: decode_add(with_field(RAW_ADD, 24, "I", 0), 2)) == (Code.VECTOR, errno.EINVAL, 1)


@pytest.mark.parametrize("count", [0, 1, 3, 0x1000_0002, 0xFFFF_FFFF])
def test_add_with_a_wrong_count(count: int) -> None:
    assert refused(lambda: decode_add(with_field(RAW_ADD, 0, "I", count), 2)) == PAYLOAD


def test_most_vectors_in_one_add() -> None:
    most = [Added(number, number + 1, new=number % 2 == 0) for number in range(DESCRIPTORS_MAX)]
    assert decode_add(encode_add(most), DESCRIPTORS_MAX) == most


@pytest.mark.parametrize("added", [Added(-1, 1, new=True), Added(1 << 32, 1, new=True), Added(0, 1 << 64, new=True)])
def test_vector_that_does_not_fit_is_not_encoded(added: Added) -> None:
    with pytest.raises(SpecError):
        encode_add([added])


# --- INVALIDATE ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 7, 9, 16])
def test_scope_of_the_wrong_size(size: int) -> None:
    assert refused(lambda: decode_scope(bytes(size))) == PAYLOAD


@pytest.mark.parametrize(("first", "last"), [(1, 0), (0, 0x10001), (0x10001, 0x10001), (0xFFFFFFFF, 0)])
def test_scope_that_is_no_range(first: int, last: int) -> None:
    assert refused(lambda: decode_scope(struct.pack("<II", first, last))) == PAYLOAD


@pytest.mark.parametrize(("first", "last"), [(0, 0), (0x10000, 0x10000), (0xFFFF, 0x10000)])
def test_scope_at_its_limits(first: int, last: int) -> None:
    assert decode_scope(encode_scope(Scope(first, last))) == Scope(first, last)


@pytest.mark.parametrize("scope", [Scope(-1, 0), Scope(0, 1 << 32)])
def test_scope_that_does_not_fit_is_not_encoded(scope: Scope) -> None:
    with pytest.raises(SpecError):
        encode_scope(scope)


# --- operations ------------------------------------------------------------------------------------------------------

BAD_BATCHES: Final = {
    "bad-batch-without-count": None,
    "bad-batch-count": None,
    "bad-batch-count-huge": None,
    "bad-batch-reserved": None,
    "bad-batch-kind-0": 0,
    "bad-batch-kind-6": 1,
    "bad-batch-miss": 0,
    "bad-batch-route-flag": 0,
    "bad-batch-assign-flag": 0,
    "bad-batch-operation-reserved": 0,
    "bad-batch-route-reserved": 0,
    "bad-batch-assign-address": 0,
    "bad-batch-assign-data": 0,
}


def test_every_bad_batch_is_tested_here() -> None:
    told = [*BAD_BATCHES, "bad-batch-is-reply", "bad-batch-is-ping"]  # these two are bad by where they come from
    assert sorted(told) == sorted(name for name in FRAMES if name.startswith("bad-batch-"))


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_bad_batch(name: str) -> None:
    frame = decode(FRAMES[name])
    told = refused(lambda: decode_operations(frame.payload, IN_BATCH))
    assert told == (Code.PAYLOAD, errno.EINVAL, BAD_BATCHES[name])


@pytest.mark.parametrize("kinds", [IN_REPLY, IN_BATCH, IN_TRANSLATE, IN_TRANSLATED])
def test_kinds_belong_where_the_table_says(kinds: frozenset[Kind]) -> None:
    for number in range(256):
        raw = struct.pack("<II", 1, 0) + bytes([number]) + bytes(31)
        if number in kinds:
            assert decode_operations(raw, kinds) == [Operation(Kind(number), 0, 0)]
        else:
            assert refused(partial(decode_operations, raw, kinds)) == (Code.PAYLOAD, errno.EINVAL, 0)


def test_which_kinds_belong_where() -> None:
    assert {int(kind) for kind in IN_REPLY} == {1, 4}
    assert {int(kind) for kind in IN_BATCH} == {1, 2, 3, 4, 5}
    assert {int(kind) for kind in IN_TRANSLATE} == {16}
    assert {int(kind) for kind in IN_TRANSLATED} == {16, 17, 18}


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("bit", range(8))
def test_flags_of_an_operation(kind: Kind, bit: int) -> None:
    raw = struct.pack("<II", 1, 0) + bytes([kind, 1 << bit]) + bytes(30)
    if bit == 0 and kind in (Kind.CATCH_FAULT, Kind.ASSIGN):
        assert decode_operations(raw, frozenset(Kind)) == [Operation(kind, 0, 0, flag=True)]
    else:
        assert refused(lambda: decode_operations(raw, frozenset(Kind))) == (Code.PAYLOAD, errno.EINVAL, 0)


@pytest.mark.parametrize("kind", Kind)
def test_last_16_bytes_of_an_operation(kind: Kind) -> None:
    def told(address: int, data: int, reserved: int) -> Operation | tuple[Code, int, int | None]:
        raw = struct.pack("<IIBBHIQQII", 1, 0, kind, 0, 0, 3, 4, address, data, reserved)
        try:
            return decode_operations(raw, frozenset(Kind))[0]
        except WireError as error:
            return error.code, error.errno, error.index

    bad = Code.PAYLOAD, errno.EINVAL, 0
    if kind in (Kind.CATCH_FAULT, Kind.FAULT):
        assert told(1, 2, 3) == Operation(kind, 3, 4, record=(1, 3 << 32 | 2))
    elif kind in (Kind.ASSIGN, Kind.MISS):
        assert told(0, 0, 0) == Operation(kind, 3, 4)
        assert [told(1, 0, 0), told(0, 1, 0), told(0, 0, 1)] == [bad, bad, bad]
    else:
        assert told(1, 2, 0) == Operation(kind, 3, 4, 1, 2)
        assert told(1, 2, 1) == bad


@pytest.mark.parametrize("size", [0, 7, 9, 39, 41])
def test_operations_of_the_wrong_size(size: int) -> None:
    assert refused(lambda: decode_operations(FRAMES["add-reply"][HEADER_SIZE:][:size], IN_REPLY)) == PAYLOAD


@pytest.mark.parametrize(
    "operation",
    [
        Operation(Kind.CATCH, -1, 1),
        Operation(Kind.CATCH, 1 << 32, 1),
        Operation(Kind.CATCH, 1, -1),
        Operation(Kind.CATCH, 1, 1 << 64),
        Operation(Kind.CATCH, 1, 1, -1),
        Operation(Kind.CATCH, 1, 1, 1 << 64),
        Operation(Kind.CATCH, 1, 1, 0, -1),
        Operation(Kind.CATCH, 1, 1, 0, 1 << 32),
        Operation(Kind.CATCH_FAULT, 1, 1, record=(-1, 0)),
        Operation(Kind.CATCH_FAULT, 1, 1, record=(1 << 64, 0)),
        Operation(Kind.CATCH_FAULT, 1, 1, record=(0, -1)),
        Operation(Kind.CATCH_FAULT, 1, 1, record=(0, 1 << 64)),
        # What would be lost, or refused by the peer.
        Operation(Kind.SET_ROUTE, 1, 1, flag=True),
        Operation(Kind.ASSIGN, 1, 1, 0xFEE00000),
        Operation(Kind.MISS, 1, 1, 0, 1),
        Operation(Kind.CATCH, 1, 1, record=(1, 0)),
        Operation(Kind.FAULT, 1, 1, 0xFEE00000),
    ],
    ids=str,
)
def test_operation_that_does_not_fit_is_not_encoded(operation: Operation) -> None:
    with pytest.raises(SpecError):
        encode_operations([operation])


# --- errnos ----------------------------------------------------------------------------------------------------------


def test_errnos_of_another_batch() -> None:
    raw = FRAMES["batch-reply"][HEADER_SIZE:]
    for count in (0, 6, 8):
        assert refused(partial(decode_errnos, raw, count)) == PAYLOAD
    assert refused(lambda: decode_errnos(with_field(raw, 0, "I", 6), 7)) == PAYLOAD
    assert refused(lambda: decode_errnos(with_field(raw, 4, "I", 1), 7)) == PAYLOAD


@pytest.mark.parametrize("size", [0, 4, 7])
def test_errnos_without_a_count(size: int) -> None:
    assert refused(lambda: decode_errnos(bytes(size), 0)) == PAYLOAD


@pytest.mark.parametrize("number", [-1, 1 << 32])
def test_errno_that_does_not_fit_is_not_encoded(number: int) -> None:
    with pytest.raises(SpecError):
        encode_errnos([number])


# --- the page --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", [field.name for field in msgspec.structs.fields(Slot)])
@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_slot_that_does_not_fit_is_not_encoded(field: str, value: int) -> None:
    with pytest.raises(SpecError):
        encode_slot(msgspec.structs.replace(SLOT, **{field: value}))


@pytest.mark.parametrize(
    ("offset", "form", "field"),
    [
        (0, "Q", "generation"),
        (8, "Q", "born"),
        (16, "Q", "address"),
        (24, "I", "data"),
        (28, "H", "requester"),
        (30, "B", "state"),
        (31, "B", "refused"),
        (32, "I", "cookie"),
        (36, "I", "gsi"),
        (40, "I", "invalidations"),
        (44, "I", "caught"),
        (48, "I", "faults"),
        (52, "I", "stale"),
        (56, "I", "discarded"),
        (60, "I", "last_catch_ns"),
    ],
)
def test_field_of_a_slot_stands_where_the_table_says(offset: int, form: str, field: str) -> None:
    largest = (1 << 8 * struct.calcsize(form)) - 1
    assert decode_slot(with_field(bytes(64), offset, form, largest)) == msgspec.structs.replace(
        Slot(), **{field: largest}
    )


# --- rubbish, and everything that fits -------------------------------------------------------------------------------

RUBBISH = st.binary(max_size=300) | st.sampled_from(sorted(FRAMES.values())).flatmap(
    lambda packet: st.lists(st.tuples(st.integers(0, max(len(packet) - 1, 0)), st.integers(0, 255)), max_size=4).map(
        lambda changes: _changed(packet, changes)
    )
)


def _changed(packet: bytes, changes: list[tuple[int, int]]) -> bytes:
    changed = bytearray(packet)
    for at, value in changes:
        changed[at : at + 1] = [value]
    return bytes(changed)


def told_by(decoder: Callable[[], object]) -> WireError | None:
    """What ``decoder`` refuses its input with; None where it does not. Anything else that it raises is a bug."""
    try:
        decoder()
    except WireError as error:
        return error
    return None


@hypothesis.given(RUBBISH, st.integers(0, 3))
def test_decoding_raises_nothing_but_wire_errors(packet: bytes, descriptors: int) -> None:
    decoders: list[Callable[[bytes], object]] = [
        decode_hello,
        decode_welcome,
        lambda payload: decode_memory(payload, descriptors),
        lambda payload: decode_add(payload, descriptors),
        decode_scope,
        lambda payload: decode_errnos(payload, descriptors),
        lambda payload: decode_operations(payload, IN_REPLY),
        lambda payload: decode_operations(payload, IN_BATCH),
        lambda payload: decode_operations(payload, IN_TRANSLATE),
        lambda payload: decode_operations(payload, IN_TRANSLATED),
        lambda payload: error_of(Frame(1, 1, payload, reply=True, errno=errno.EINVAL)),
    ]
    for payload in packet, packet[HEADER_SIZE:]:
        for decoder in decoders:
            error = told_by(partial(decoder, payload))
            if error is not None:  # it can be told
                assert decode(encode(error_frame(1, 1, error))).errno == error.errno


@hypothesis.given(RUBBISH)
def test_what_is_a_frame_is_encoded_as_it_was(packet: bytes) -> None:
    error = told_by(lambda: decode(packet))
    if error is None:
        assert encode(decode(packet)) == packet
    else:
        assert error.code is Code.FRAME


@hypothesis.given(st.binary(min_size=64, max_size=64))
def test_every_64_bytes_are_a_slot(raw: bytes) -> None:
    assert encode_slot(decode_slot(raw)) == raw


@hypothesis.given(st.binary(min_size=24, max_size=24))
def test_every_24_bytes_are_a_page_header_or_none(raw: bytes) -> None:
    header = decode_page_header(raw)
    assert header is None or encode_page_header(header) == raw
    header = decode_page_header(b"IRQG" + raw[4:])
    assert header is not None
    assert encode_page_header(header) == b"IRQG" + raw[4:]


U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))


def messages(kind: Kind) -> st.SearchStrategy[Operation]:
    return st.builds(Operation, st.just(kind), U32, U64, U64, U32)


def records(kind: Kind, flags: st.SearchStrategy[bool]) -> st.SearchStrategy[Operation]:
    return st.builds(
        lambda vector, generation, record, flag: Operation(kind, vector, generation, record=record, flag=flag),
        U32,
        U64,
        st.tuples(U64, U64),
        flags,
    )


OPERATIONS = {
    Kind.SET_ROUTE: messages(Kind.SET_ROUTE),
    Kind.CATCH: messages(Kind.CATCH),
    Kind.PREPARE: messages(Kind.PREPARE),
    Kind.UPDATE: messages(Kind.UPDATE),
    Kind.CATCH_FAULT: records(Kind.CATCH_FAULT, st.booleans()),
    Kind.FAULT: records(Kind.FAULT, st.just(value=False)),
    Kind.ASSIGN: st.builds(lambda v, g, f: Operation(Kind.ASSIGN, v, g, flag=f), U32, U64, st.booleans()),
    Kind.MISS: st.builds(lambda v, g: Operation(Kind.MISS, v, g), U32, U64),
}


@pytest.mark.parametrize("kinds", [IN_REPLY, IN_BATCH, IN_TRANSLATE, IN_TRANSLATED])
@hypothesis.given(data=st.data())
def test_operations_round_trip(kinds: frozenset[Kind], data: st.DataObject) -> None:
    operations = data.draw(st.lists(st.one_of([OPERATIONS[kind] for kind in sorted(kinds)]), max_size=8))
    payload = encode_operations(operations)
    assert len(payload) == 8 + 32 * len(operations)
    assert decode_operations(payload, kinds) == operations


@hypothesis.given(
    st.builds(
        Frame,
        id=U16,
        command=U16,
        payload=st.binary(max_size=64),
        reply=st.just(value=True),
        more=st.booleans(),
        errno=st.just(0),
    )
    | st.builds(Frame, id=U16, command=U16, payload=st.binary(max_size=64))
    | st.builds(Frame, id=U16, command=U16, payload=st.binary(max_size=64), reply=st.just(value=True), errno=U32)
)
def test_frames_round_trip(frame: Frame) -> None:
    assert decode(encode(frame)) == frame


@hypothesis.given(
    st.builds(
        Hello,
        name=st.from_regex(r"[A-Za-z0-9._-]{1,63}", fullmatch=True),
        slots=st.integers(1, 4096),
        remapper=st.sampled_from(RemapperKind),
        host_address_width=st.integers(12, 64),
        features=st.sampled_from([Feature(bits) for bits in range(4)]),
        version_high=st.integers(1, 0xFFFF),
    )
)
def test_hellos_round_trip(hello: Hello) -> None:
    if hello.remapper is not RemapperKind.VTD:
        hello = msgspec.structs.replace(hello, host_address_width=0)
    assert decode_hello(encode_hello(hello)) == hello


@hypothesis.given(
    st.builds(
        Welcome,
        vectors_max=U32,
        features=st.sampled_from([Feature(bits) for bits in range(4)]),
        regions_max=U32,
        frames_per_second=U32,
    )
)
def test_welcomes_round_trip(welcome: Welcome) -> None:
    assert decode_welcome(encode_welcome(welcome)) == welcome


@hypothesis.given(st.lists(st.builds(Region, U64, U64, U64, st.integers(0, 3)), min_size=1, max_size=8))
def test_memories_round_trip(regions: list[Region]) -> None:
    named = {region.descriptor for region in regions}
    if named == set(range(len(named))):
        assert decode_memory(encode_memory(regions), len(named)) == regions
    else:
        assert refused(lambda: decode_memory(encode_memory(regions), max(named) + 1)) == bad_memory(None)


@hypothesis.given(st.lists(st.builds(Added, U32, U64.filter(bool), st.booleans()), min_size=1, max_size=8))
def test_adds_round_trip(added: list[Added]) -> None:
    hypothesis.assume(len({each.vector for each in added}) == len(added))
    assert decode_add(encode_add(added), len(added)) == added


@hypothesis.given(st.lists(U32, max_size=8))
def test_errnos_round_trip(errnos: list[int]) -> None:
    assert decode_errnos(encode_errnos(errnos), len(errnos)) == errnos

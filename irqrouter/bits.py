"""Hardware words, declared as the manuals print them: fields by bit range, high bit first.

::

    class Irta(Word, frozen=True, kw_only=True):
        '''Interrupt Remapping Table Address register.'''

        width: ClassVar[int] = 64
        base: Annotated[int, bits(63, 12, "bits 63:12 of the table's address")] = 0
        eime: Annotated[int, bits(11, 11, "extended interrupt mode", values=("xAPIC", "x2APIC"))] = 0
        s: Annotated[int, bits(3, 0, "the table has 2^(s+1) entries")] = 0

A field's value is the number those bits spell. Bits which no field names are reserved.
"""

from typing import ClassVar, Self

import msgspec

from irqrouter.errors import InternalError, SpecError


class Bits(msgspec.Struct, frozen=True):
    """Where a field is and what it means; made by :func:`bits`."""

    high: int
    low: int
    meaning: str
    values: tuple[str, ...]

    @property
    def range(self) -> str:
        """``23:16``, or ``15`` for a single bit."""
        return str(self.low) if self.high == self.low else f"{self.high}:{self.low}"


def bits(high: int, low: int, meaning: str = "", values: tuple[str, ...] = ()) -> Bits:
    """Declare that a field occupies bits ``high`` to ``low``, both included.

    ``meaning`` says in a few words what the field is; ``values`` names its values from 0 up. Values without a
    name (past the end, or ``""``) are shown as reserved.
    """
    return Bits(high, low, meaning, values)


class FieldValue(msgspec.Struct, frozen=True):
    """One line of :meth:`Word.explain`."""

    bits: str
    name: str
    value: int
    meaning: str


class Word(msgspec.Struct, frozen=True, kw_only=True):
    """Base of every hardware word.

    An instance always fits: a value too wide for its field raises :class:`~irqrouter.errors.SpecError`.
    """

    #: Bits in the word.
    width: ClassVar[int]
    #: The fields by name, high bit first.
    layout: ClassVar[dict[str, Bits]] = {}
    #: Mask of the bits which no field names.
    reserved: ClassVar[int] = 0

    def __init_subclass__(cls) -> None:
        layout: dict[str, Bits] = {}
        unclaimed, top = (1 << cls.width) - 1, cls.width
        for name, annotation in cls.__annotations__.items():
            metadata: tuple[Bits, ...] = getattr(annotation, "__metadata__", ())
            if not metadata:  # width
                continue
            field = metadata[0]
            if not top > field.high >= field.low >= 0:
                raise InternalError(f"{cls.__name__}.{name}", f"bits {field.range} are not below bit {top}")
            layout[name], top = field, field.low
            unclaimed &= ~_mask(field)
        cls.layout, cls.reserved = layout, unclaimed

    def __post_init__(self) -> None:
        for name, field in self.layout.items():
            value: int = getattr(self, name)
            if value < 0 or value >> (field.high - field.low + 1):
                raise SpecError(f"{type(self).__name__}.{name} {value:#x}", f"must fit bits {field.range}")

    @classmethod
    def decode(cls, raw: int, *, strict: bool = False) -> Self:
        """Read the word's fields. ``strict``: a reserved bit that is set raises :class:`SpecError`."""
        if raw < 0 or raw >> cls.width:
            raise SpecError(f"{cls.__name__} {raw:#x}", f"must fit {cls.width} bits")
        if strict and raw & cls.reserved:
            raise SpecError(f"{cls.__name__} {raw:#x}", f"reserved bits {raw & cls.reserved:#x} must be 0")
        return cls(**{name: (raw & _mask(field)) >> field.low for name, field in cls.layout.items()})

    def encode(self) -> int:
        """The word as a number; reserved bits are 0."""
        raw = 0
        for name, field in self.layout.items():
            raw |= getattr(self, name) << field.low
        return raw

    @classmethod
    def explain(cls, raw: int) -> list[FieldValue]:
        """Every field of ``raw``, high bit first, and then the reserved bits that are set."""
        word = cls.decode(raw)
        lines = [
            FieldValue(field.range, name, value, _meaning(field, value))
            for name, field in cls.layout.items()
            for value in (getattr(word, name),)
        ]
        lines.extend(
            FieldValue(str(bit), "reserved", 1, "must be 0")
            for bit in reversed(range(cls.width))
            if raw & cls.reserved & 1 << bit
        )
        return lines


def _mask(field: Bits) -> int:
    return (1 << (field.high + 1)) - (1 << field.low)


def _meaning(field: Bits, value: int) -> str:
    if not field.values:
        return field.meaning
    name = field.values[value] if value < len(field.values) else ""
    return f"{field.meaning}: {name or 'reserved'}"

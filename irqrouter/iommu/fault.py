"""What a remapping unit does with an interrupt it blocks."""

import msgspec

from irqrouter.x86.msi import Message, Request, bdf


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """An interrupt that is not delivered.

    ``recorded`` is False where the guest asked for no record (VT-d's FPD, AMD-Vi's IG and SupIOPF) and where
    hardware keeps none.
    """

    requester: int
    recorded: bool

    @property
    def why(self) -> str:
        """The rule that blocked the interrupt."""
        return "blocked by the remapping unit"

    def record(self) -> tuple[int, int] | None:
        """The record as hardware writes it, low and high quadword; None where hardware has none for it."""
        return None

    def describe(self) -> str:
        """``00:03.0: 22h: the IRTE is not present, index 0x5``, with ``(not recorded)`` behind it where it is not."""
        return f"{bdf(self.requester)}: {self.why}{'' if self.recorded else ' (not recorded)'}"


class NotAnInterrupt(Fault, frozen=True, kw_only=True):
    """A write outside FEEx_xxxxh: it raises no interrupt, and no interrupt-remapping fault is recorded."""

    message: Message

    @property
    def why(self) -> str:
        """The rule that blocked the interrupt."""
        return f"{self.message.describe()} is not addressed to FEEx_xxxxh: no interrupt"


class RecordedFault(Fault, frozen=True, kw_only=True):
    """A fault of which only the record is known: somebody else has translated."""

    low: int
    high: int

    @property
    def why(self) -> str:
        """The record's two quadwords."""
        return f"blocked elsewhere, record {self.high:016x}:{self.low:016x}"

    def record(self) -> tuple[int, int]:
        """The record, as it was given."""
        return self.low, self.high


def unremapped(request: Request) -> Message | NotAnInterrupt:
    """What becomes of ``request`` where nothing remaps it: its own message, if that is an interrupt.

    Bits 63:40 are the destination's, as KVM takes them; bits 39:20 must be FEEh, or KVM refuses the message (39:32) or
    makes an interrupt of what is a write to memory.
    """
    message = request.message
    if message.address >> 20 & 0xFFFFF == 0xFEE:
        return message
    return NotAnInterrupt(requester=request.requester, recorded=False, message=message)

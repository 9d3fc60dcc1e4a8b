"""The error tree. First split: whose fault is it. Leaves live next to the code that raises them.

::

    IrqrouterError
    ├── CallerError          the VMM (or a client) passed something wrong; nothing was changed
    ├── SpecError            a value does not fit the field, register or message a manual defines
    ├── GuestMemoryError     guest memory cannot be read there (hole, past the end, shrunken file)
    ├── KernelError          a system call failed; also an OSError, with its errno
    └── InternalError        irqrouter broke one of its own rules; please report it

Every error names an ``object`` ("vector 3", "gsi 27", "IRTE 5") and the ``rule`` that was broken.
"""

import errno as _errno
import os


class IrqrouterError(Exception):
    """Root of every error irqrouter raises on purpose."""

    def __init__(self, object: str, rule: str) -> None:  # noqa: A002 - the public attribute's name
        super().__init__(object, rule)
        self.object = object
        self.rule = rule

    def __str__(self) -> str:
        return f"{self.object}: {self.rule}"


class CallerError(IrqrouterError, ValueError):
    """The caller passed something wrong. Nothing was changed."""


class SpecError(IrqrouterError, ValueError):
    """A value does not fit what the manual defines (a field too wide, a reserved bit set)."""


class GuestMemoryError(IrqrouterError):
    """Guest memory cannot be read at the address asked for."""


class InternalError(IrqrouterError, RuntimeError):
    """One of irqrouter's own rules was broken by irqrouter."""


class KernelError(IrqrouterError, OSError):
    """A system call failed.

    ``errno`` is the kernel's, ``call`` names the ioctl or system call, ``object`` what it was made for.
    """

    errno: int

    def __init__(self, errno: int, call: str, object: str) -> None:  # noqa: A002 - as above
        name = _errno.errorcode.get(errno, str(errno))
        super().__init__(object, f"{call} failed: {name} ({os.strerror(errno)})")
        self.errno = errno  # pyright: ignore[reportIncompatibleVariableOverride] - ours always has one
        self.call = call

"""Where the service's log goes, and in which form.

The level is looked at by a processor, not by the class of the loggers: a logger that was bound to a VM long ago, and
keeps the class it was made with, follows a change of level like any other.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Mapping, MutableMapping
from typing import Final, TextIO

import structlog

from irqrouter.service.config import LogFormat, LogLevel

#: structlog's levels as syslog's priorities, which the journal reads from a prefix ``<N>`` of every line.
_PRIORITIES: Final = {"debug": 7, "info": 6, "warning": 4, "error": 3, "exception": 3, "critical": 2}

_LEVELS: Final[Mapping[str, int]] = logging.getLevelNamesMapping()


class Logs:
    """The log of the whole process: structlog's, and through it what libraries say to :mod:`logging`."""

    def __init__(
        self, level: LogLevel, form: LogFormat, *, stream: TextIO | None = None, environ: Mapping[str, str] = os.environ
    ) -> None:
        self._stream = stream or sys.stderr
        self._level = _LEVELS[level.upper()]
        self._before = structlog.get_config()
        structlog.configure(
            processors=[
                structlog.stdlib.add_log_level,
                self._filter,
                structlog.contextvars.merge_contextvars,
                *_renderers(_form(form, self._stream, environ), self._stream),
            ],
            wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET),
            logger_factory=lambda *_: _Lines(self._stream),
            cache_logger_on_first_use=False,
        )
        self._handler = _Forward()
        root = logging.getLogger()
        self._root_level = root.level
        root.addHandler(self._handler)
        root.setLevel(logging.NOTSET)

    @property
    def level(self) -> str:
        """What is logged, at least."""
        return logging.getLevelName(self._level).lower()

    @level.setter
    def level(self, level: LogLevel) -> None:
        self._level = _LEVELS[level.upper()]

    def close(self) -> None:
        """Leave logging as it was found."""
        root = logging.getLogger()
        root.removeHandler(self._handler)
        root.setLevel(self._root_level)
        structlog.configure(**self._before)

    def _filter(self, _: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        if _LEVELS[event["level"].upper()] < self._level:
            raise structlog.DropEvent
        return event


class _Lines:
    """Writes lines. What cannot be written is lost: a log that is gone must not stop what it would tell about."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def msg(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
            self._stream.write(line + "\n")
            self._stream.flush()

    debug = info = warning = error = critical = msg


class _Forward(logging.Handler):
    """Hands the records of :mod:`logging` over to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        level = min(record.levelno // 10 * 10, logging.CRITICAL) or logging.DEBUG
        fields: dict[str, object] = {"exc_info": record.exc_info} if record.exc_info else {}
        logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
        logger.log(level, record.getMessage(), logger=record.name, **fields)


def is_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether ``stream`` is what ``JOURNAL_STREAM`` says is connected to the journal."""
    device, _, inode = environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        status = os.fstat(stream.fileno())
    except OSError:  # a stream that is no file; io.UnsupportedOperation is one of these
        return False
    return (device, inode) == (str(status.st_dev), str(status.st_ino))


def _form(form: LogFormat, stream: TextIO, environ: Mapping[str, str]) -> LogFormat:
    if form != "auto":
        return form
    return "journal" if is_journal(stream, environ) else "console"


def _renderers(form: LogFormat, stream: TextIO) -> list[structlog.typing.Processor]:
    if form == "json":
        return [
            structlog.processors.TimeStamper("iso", utc=True),
            structlog.processors.dict_tracebacks,
            structlog.processors.JSONRenderer(default=str),
        ]
    if form == "journal":
        return [structlog.processors.format_exc_info, _journal]
    colors = stream.isatty()
    return [
        structlog.processors.TimeStamper("%H:%M:%S.%f", utc=False),
        structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback),
    ]


_key_values = structlog.processors.LogfmtRenderer(bool_as_flag=False)


def _journal(logger: object, name: str, event: MutableMapping[str, object]) -> str:
    """``<6>attached vm=a pid=7``. The journal adds time and unit; each of its lines needs the priority."""
    priority = _PRIORITIES[str(event.pop("level"))]
    said = str(event.pop("event")).replace("\n", "\\n")
    exception = event.pop("exception", None)
    fields = _key_values(logger, name, {key: _plain(value) for key, value in event.items()})
    lines = [f"{said} {fields}".rstrip(), *(str(exception).splitlines() if exception else [])]
    return "\n".join(f"<{priority}>{line}" for line in lines)


def _plain(value: object) -> object:
    return value if isinstance(value, str | int | float | None) else str(value)

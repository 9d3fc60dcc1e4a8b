"""The log: which form, which level, and that it never stops anybody."""

import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from irqrouter.service.config import LogFormat, LogLevel
from irqrouter.service.logs import Logs, is_journal


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture(autouse=True)
def logging_is_left_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    before = structlog.get_config(), root.level, list(root.handlers)
    yield
    assert (structlog.get_config(), root.level, list(root.handlers)) == before


def logs(stream: io.StringIO, level: LogLevel = "info", form: LogFormat = "journal") -> Logs:
    return Logs(level, form, stream=stream, environ={})


def test_logs_for_the_journal_have_priorities_and_fields(stream: io.StringIO) -> None:
    made = logs(stream, "debug")
    log = structlog.get_logger("irqrouter").bind(vm="a")
    log.debug("looked")
    log.info("attached", pid=7, why="no reason", path=Path("/x"))
    log.warning("odd")
    log.error("two\nlines", text="a\nb")
    made.close()
    assert stream.getvalue().splitlines() == [
        "<7>looked vm=a",
        '<6>attached vm=a pid=7 why="no reason" path=/x',
        "<4>odd vm=a",
        "<3>two\\nlines vm=a text=a\\nb",
    ]


def test_logs_each_line_of_a_traceback_has_the_priority(stream: io.StringIO) -> None:
    made = logs(stream)
    try:
        raise ZeroDivisionError  # noqa: TRY301 - there is nothing else to test
    except ZeroDivisionError:
        structlog.get_logger().exception("failed", vm="a")
    made.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "<3>failed vm=a"
    assert lines[1] == "<3>Traceback (most recent call last):"
    assert lines[-1] == "<3>ZeroDivisionError"
    assert all(line.startswith("<3>") for line in lines)


def test_logs_json_is_an_object_a_line(stream: io.StringIO) -> None:
    made = logs(stream, form="json")
    structlog.get_logger().info("attached", vm="a", path=Path("/x"))
    made.close()
    said = json.loads(stream.getvalue())
    assert said.pop("timestamp").endswith("Z")
    assert said == {"event": "attached", "level": "info", "vm": "a", "path": "/x"}


def test_logs_console_is_for_people(stream: io.StringIO) -> None:
    made = logs(stream, form="auto")
    structlog.get_logger().info("attached", vm="a")
    made.close()
    assert "[info     ] attached" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_logs_a_change_of_level_reaches_loggers_that_were_bound_before(stream: io.StringIO) -> None:
    made = logs(stream)
    log = structlog.get_logger().bind(vm="a")
    log.debug("1")
    made.level = "debug"
    assert made.level == "debug"
    log.debug("2")
    made.level = "error"
    log.warning("3")
    made.close()
    assert stream.getvalue() == "<7>2 vm=a\n"


def test_logs_what_libraries_say_is_there_too(stream: io.StringIO) -> None:
    made = logs(stream)
    logging.getLogger("asyncio").warning("slow %s", "callback")
    logging.getLogger("asyncio").debug("detail")
    logging.getLogger("x").log(logging.INFO + 5, "between")
    made.close()
    assert stream.getvalue().splitlines() == ["<4>slow callback logger=asyncio", "<6>between logger=x"]


def test_logs_nowhere_to_write_stops_nobody() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as broken:
        made = Logs("info", "journal", stream=broken, environ={})
        structlog.get_logger().info("attached")
        made.close()
        with pytest.raises(BrokenPipeError):
            broken.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), broken.fileno())  # what is left in the buffer goes here
    made = Logs("info", "journal", stream=broken, environ={})
    structlog.get_logger().info("attached")
    made.close()


def test_is_journal_by_device_and_inode(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        status = os.fstat(file.fileno())
        assert is_journal(file, {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"})
        assert not is_journal(file, {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino + 1}"})
        assert not is_journal(file, {"JOURNAL_STREAM": "rubbish"})
        assert not is_journal(file, {})
    assert not is_journal(io.StringIO(), {"JOURNAL_STREAM": "1:2"})
    assert sys.stderr is not None

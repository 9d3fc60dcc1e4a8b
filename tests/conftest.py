"""What every test gets: both event loops, a machine, and a check that nothing leaks."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import pytest_asyncio
import uvloop

from tests.machine import Machine

# How long one example takes says more about the machine than about the code.
hypothesis.settings.register_profile("irqrouter", deadline=None)
hypothesis.settings.load_profile("irqrouter")


async def _nothing() -> None: ...


uvloop.run(_nothing())  # its first loop makes a pipe for signals that stays with the process: not a test's leak


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Each asynchronous test runs on both loops."""
    return {"asyncio": asyncio.SelectorEventLoop, "uvloop": uvloop.new_event_loop}


@pytest.fixture
def nothing_leaks() -> Iterator[None]:
    """Fail if the test leaves a descriptor, a thread or a child process behind."""
    before = _descriptors(), threading.active_count()
    yield
    assert (_descriptors(), threading.active_count()) == before


@pytest_asyncio.fixture
async def machine() -> AsyncIterator[Machine]:
    """A VM on the real KVM, and a router that runs on the test's loop."""
    async with Machine() as machine:
        yield machine


def _descriptors() -> set[str]:
    return {
        f"{entry.name} -> {entry.readlink()}"
        for entry in Path("/proc/self/fd").iterdir()
        if entry.is_symlink() and not str(entry).startswith("/proc/self/fd/self")
    }

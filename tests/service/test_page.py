"""The state page, read under the hands of whoever writes it."""

import fcntl
import mmap
import os
import random
import threading
from collections.abc import Iterator

import pytest

from irqrouter.errors import KernelError
from irqrouter.service.page import StatePage
from irqrouter.service.wire import PAGE_MAGIC, SLOTS_MAX, PageHeader, Slot, page_size
from tests.service.client import Page, descriptors


@pytest.fixture
def pages() -> Iterator[tuple[StatePage, Page]]:
    """The service's page of 200 slots, and the agent's view of it."""
    before = descriptors()
    page = StatePage(200)
    agents = Page(os.dup(page.fd), 200)
    yield page, agents
    agents.close()
    page.close()
    page.close()
    assert descriptors() == before


def test_page_is_sealed_and_rounded_up() -> None:
    for slots in (1, 63, 64, 65, SLOTS_MAX):
        page = StatePage(slots)
        assert os.fstat(page.fd).st_size == page_size(slots) == 4096 + -(-slots // 64) * 4096
        assert fcntl.fcntl(page.fd, fcntl.F_GET_SEALS) == (fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        page.close()


def test_c1_page_cannot_be_written_through_the_services_map(pages: tuple[StatePage, Page]) -> None:
    with pytest.raises(TypeError):
        pages[0]._map[0] = 1


def test_blank_page_says_nothing(pages: tuple[StatePage, Page]) -> None:
    page, _ = pages
    assert page.header() == PageHeader()
    assert page.slot(199) == Slot()
    assert list(page.changed()) == []


def test_header_counts_only_with_its_magic(pages: tuple[StatePage, Page]) -> None:
    page, agents = pages
    agents.header(PageHeader(3, 4, 5))
    assert page.header() == PageHeader(3, 4, 5)
    agents.map[0:4] = (PAGE_MAGIC ^ 1).to_bytes(4, "little")
    assert page.header() == PageHeader()


def test_slots_are_read_as_they_were_written(pages: tuple[StatePage, Page]) -> None:
    page, agents = pages
    chance = random.Random(0)
    written = {
        number: Slot(*(chance.getrandbits(bits) for bits in (64, 64, 64, 32, 16, 8, 8, *[32] * 8)))
        for number in range(200)
    }
    for number, slot in written.items():
        agents.slot(number, slot)
    assert {number: page.slot(number) for number in written} == written
    assert page.generation(7) == written[7].generation


def test_changed_names_each_change_once(pages: tuple[StatePage, Page]) -> None:
    page, agents = pages
    agents.header(PageHeader(200))
    slots = {number: Slot(generation=number + 1, born=1) for number in (0, 63, 64, 130, 199)}
    for number, slot in slots.items():
        agents.slot(number, slot)
    assert list(page.changed()) == [0, 63, 64, 130, 199]
    assert list(page.changed()) == []
    agents.slot(64, Slot(generation=65, born=1, state=1))
    assert list(page.changed()) == [64]


def test_changed_ignores_counters_and_slots_that_are_not_used(pages: tuple[StatePage, Page]) -> None:
    page, agents = pages
    agents.header(PageHeader(10))
    agents.slot(3, Slot(generation=1, caught=1, faults=2, invalidations=3, stale=4, discarded=5, last_catch_ns=6))
    assert list(page.changed()) == [3]
    agents.slot(3, Slot(generation=1, caught=9, faults=9, invalidations=9, stale=9, discarded=9, last_catch_ns=9))
    agents.slot(100, Slot(generation=1))
    assert list(page.changed()) == []
    agents.header(PageHeader(0xFFFF_FFFF))  # more than there are
    assert list(page.changed()) == [100]


def test_c1_generation_is_loaded_first(pages: tuple[StatePage, Page], monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot that changes in between has the older label, under which its decision will be refused."""
    page, agents = pages
    agents.slot(0, Slot(generation=1, address=1))
    whole = page._map

    class Racing:
        def __getitem__(self, at: slice) -> bytes:
            agents.slot(0, Slot(generation=2, address=2))
            return whole[at]

    monkeypatch.setattr(page, "_map", Racing())
    slot = page.slot(0)
    assert (slot.generation, slot.address) == (1, 2)
    monkeypatch.undo()
    assert page.slot(0).generation == 2


def test_scribbling_at_all_times_gives_values_and_never_exceptions(pages: tuple[StatePage, Page]) -> None:
    page, agents = pages
    done = threading.Event()

    def scribble() -> None:
        chance = random.Random(1)
        while not done.is_set():
            agents.map[:] = chance.randbytes(agents.size)
            agents.header(PageHeader(chance.getrandbits(32)))

    thread = threading.Thread(target=scribble)
    thread.start()
    try:
        for number in range(3000):
            page.header()
            assert 0 <= page.slot(number % 200).state <= 0xFF
            if not number % 10:
                assert all(0 <= each < 200 for each in page.changed())
    finally:
        done.set()
        thread.join()


def test_hole_reads_as_zeros(pages: tuple[StatePage, Page]) -> None:
    page, agents = pages
    agents.slot(0, Slot(generation=1))
    agents.map.madvise(mmap.MADV_REMOVE)
    assert page.slot(0) == Slot()


@pytest.mark.parametrize("call", ["memfd_create", "ftruncate"])
def test_page_that_cannot_be_made_leaves_nothing(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(24, "Too many open files")

    before = descriptors()
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(KernelError):
        StatePage(1)
    monkeypatch.undo()
    assert descriptors() == before

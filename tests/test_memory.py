import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from irqrouter.errors import GuestMemoryError, KernelError
from irqrouter.memory import MemfdMemory, MemoryRegion, RegionError

PAGE = 4096
CONTENT = bytes(range(256)) * (2 * PAGE // 256)


@pytest.fixture(scope="module")
def memfd() -> Iterator[int]:
    fd = os.memfd_create("memory")
    os.pwrite(fd, CONTENT, 0)
    yield fd
    os.close(fd)


def open_descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def test_read_inside_a_region_gives_the_bytes_at_its_offset(memfd: int) -> None:
    with MemfdMemory([MemoryRegion(0x100000, PAGE, memfd, PAGE)]) as memory:
        assert memory.read(0x100010, 16) == CONTENT[PAGE + 16 : PAGE + 32]


def test_read_across_adjacent_regions_gives_both_parts(memfd: int) -> None:
    regions = [MemoryRegion(PAGE, PAGE, memfd, 0), MemoryRegion(0, PAGE, memfd, PAGE)]
    with MemfdMemory(regions) as memory:
        assert memory.read(PAGE - 8, 16) == CONTENT[-8:] + CONTENT[:8]


@given(gpa=st.integers(0, 6 * PAGE), size=st.integers(1, 3 * PAGE))
def test_read_agrees_with_a_flat_array_of_optional_bytes(memfd: int, gpa: int, size: int) -> None:
    regions = [
        MemoryRegion(0, PAGE, memfd, PAGE),
        MemoryRegion(PAGE, 100, memfd, 7),
        MemoryRegion(3 * PAGE, 2 * PAGE, memfd, 0),
    ]
    flat: list[int | None] = [None] * (10 * PAGE)
    for region in regions:
        flat[region.gpa : region.gpa + region.size] = CONTENT[region.offset : region.offset + region.size]
    expected = [byte for byte in flat[gpa : gpa + size] if byte is not None]
    with MemfdMemory(regions) as memory:
        if len(expected) == size:
            assert memory.read(gpa, size) == bytes(expected)
        else:
            with pytest.raises(GuestMemoryError):
                memory.read(gpa, size)


def test_read_at_the_very_top_of_the_address_space_works(memfd: int) -> None:
    with MemfdMemory([MemoryRegion((1 << 64) - PAGE, PAGE, memfd, 0)]) as memory:
        assert memory.read((1 << 64) - 16, 16) == CONTENT[PAGE - 16 : PAGE]


@pytest.mark.parametrize(
    ("gpa", "size"),
    [(PAGE, 1), (PAGE - 1, 2), ((1 << 64) - 8, 16), (1 << 64, 16), (-1, 16), (0, 0), (0, -1), (1 << 70, 1)],
)
def test_read_outside_memory_raises(memfd: int, gpa: int, size: int) -> None:
    with MemfdMemory([MemoryRegion(0, PAGE, memfd, 0)]) as memory, pytest.raises(GuestMemoryError):
        memory.read(gpa, size)


def test_read_of_memory_without_regions_raises() -> None:
    with MemfdMemory([]) as memory, pytest.raises(GuestMemoryError, match="no memory region"):
        memory.read(0, 1)


@pytest.mark.parametrize("left", [0, PAGE - 8])
def test_read_of_a_truncated_memfd_raises(left: int) -> None:
    fd = os.memfd_create("shrinking")
    os.ftruncate(fd, 2 * PAGE)
    with MemfdMemory([MemoryRegion(0, 2 * PAGE, fd, 0)]) as memory:
        assert memory.read(PAGE - 16, 16) == bytes(16)
        os.ftruncate(fd, left)
        with pytest.raises(GuestMemoryError, match="the file behind it ends"):
            memory.read(PAGE - 16, 16)
    os.close(fd)


def test_descriptors_are_owned_duplicates() -> None:
    before = open_descriptors()
    fd = os.memfd_create("given")
    os.pwrite(fd, b"content", 0)
    memory = MemfdMemory([MemoryRegion(0, 7, fd, 0), MemoryRegion(PAGE, 7, fd, 0)])
    os.close(fd)
    assert memory.read(PAGE, 7) == b"content"
    assert len(open_descriptors() - before) == 1
    memory.close()
    memory.close()
    assert open_descriptors() == before


def test_read_after_close_raises(memfd: int) -> None:
    memory = MemfdMemory([MemoryRegion(0, PAGE, memfd, 0)])
    memory.close()
    with pytest.raises(GuestMemoryError):
        memory.read(0, 16)


@pytest.mark.parametrize(
    ("gpa", "size", "offset"),
    [
        (0, 0, 0),
        (0, -1, 0),
        (-1, 1, 0),
        ((1 << 64) - 1, 2, 0),
        (0, 1, -1),
        (0, 1, 1 << 63),
        (PAGE - 1, 1, 0),
        (PAGE + 1, 1, 0),
    ],
)
def test_impossible_or_overlapping_region_raises_and_leaks_nothing(
    memfd: int, gpa: int, size: int, offset: int
) -> None:
    before = open_descriptors()
    regions = [MemoryRegion(PAGE - 1, 3, memfd, 0), MemoryRegion(gpa, size, memfd, offset)]
    with pytest.raises(RegionError):
        MemfdMemory(regions)
    assert open_descriptors() == before


def test_closed_descriptor_raises_and_leaks_nothing(memfd: int) -> None:
    closed = os.dup(memfd)
    os.close(closed)
    before = open_descriptors()
    with pytest.raises(KernelError, match="EBADF"):
        MemfdMemory([MemoryRegion(0, PAGE, memfd, 0), MemoryRegion(PAGE, PAGE, closed, 0)])
    assert open_descriptors() == before


@pytest.mark.parametrize("fd", [-1, 1 << 31])
def test_number_that_is_no_descriptor_raises(fd: int) -> None:
    with pytest.raises(RegionError, match="is none"):
        MemfdMemory([MemoryRegion(0, PAGE, fd, 0)])


def test_descriptor_of_another_kind_raises_and_leaks_nothing(memfd: int) -> None:
    reader, writer = os.pipe()
    eventfd = os.eventfd(0)
    before = open_descriptors()
    for other in (reader, eventfd):
        with pytest.raises(RegionError, match="must be a memfd"):
            MemfdMemory([MemoryRegion(0, PAGE, memfd, 0), MemoryRegion(PAGE, PAGE, other, 0)])
    assert open_descriptors() == before
    for fd in (reader, writer, eventfd):
        os.close(fd)


def test_write_only_descriptor_raises(memfd: int) -> None:
    write_only = os.open(f"/proc/self/fd/{memfd}", os.O_WRONLY)
    with pytest.raises(RegionError, match="must be readable"):
        MemfdMemory([MemoryRegion(0, PAGE, write_only, 0)])
    os.close(write_only)

"""A guest's memory for remapper tests: one memfd, written from the guest's side."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from irqrouter.memory import MemfdMemory, MemoryRegion

MEMORY_SIZE = 1 << 20


class Guest:
    """Guest physical memory 0 to 1 MiB."""

    def __init__(self, fd: int, memory: MemfdMemory) -> None:
        self._fd = fd
        self.memory = memory

    def write(self, gpa: int, value: int, size: int) -> None:
        assert os.pwrite(self._fd, value.to_bytes(size, "little"), gpa) == size

    def write_bytes(self, gpa: int, data: bytes) -> None:
        assert os.pwrite(self._fd, data, gpa) == len(data)

    def shrink(self, size: int) -> None:
        os.ftruncate(self._fd, size)


@contextmanager
def guest() -> Iterator[Guest]:
    fd = os.memfd_create("guest")
    try:
        os.ftruncate(fd, MEMORY_SIZE)
        with MemfdMemory([MemoryRegion(0, MEMORY_SIZE, fd, 0)]) as memory:
            yield Guest(fd, memory)
    finally:
        os.close(fd)

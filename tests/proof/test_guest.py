"""The guest program, run by KVM; guest memory; which pairs belong to whom."""

import os
import time
from pathlib import Path

import pytest

from irqrouter.errors import CallerError
from irqrouter.proof.guest import GUEST_VECTORS, TABLE, VCPUS_MAX, Pairs, Ram, cell, program
from irqrouter.proof.machine import KvmMachine
from irqrouter.x86.msi import remapped

needs_kvm = pytest.mark.skipif(not Path("/dev/kvm").exists(), reason="there is no /dev/kvm")


@needs_kvm
@pytest.mark.parametrize("vcpus", [1, 3])
def test_guest_counts_each_interrupt_at_the_cell_of_its_vcpu_and_vector(vcpus: int) -> None:
    pairs = Pairs(vcpus, 1)
    # Twice the first and the last vector, once some others: every cell must show exactly that.
    wanted = {
        (vcpu, vector): 1 + (vector in (0x20, 0xFE)) for vcpu in range(vcpus) for vector in (0x20, 0x21, 0x9A, 0xFE)
    }
    with KvmMachine(vcpus) as machine:
        for (vcpu, vector), count in wanted.items():
            number = cell(vcpu, vector, vcpus)
            for nth in range(count):
                message = remapped(destination=vcpu, dm=0, rh=0, vector=vector, delivery_mode=0, tm=0)
                assert machine.vm.signal_msi(message) == 1
                deadline = time.monotonic() + 5
                while machine.ram.cells[number] <= nth and time.monotonic() < deadline:
                    os.sched_yield()
        counted = {pairs.pair(number): count for number, count in enumerate(machine.ram.cells) if count}
    assert counted == wanted


@needs_kvm
@pytest.mark.usefixtures("nothing_leaks")
def test_machine_closed_leaves_no_descriptor_and_no_thread() -> None:
    with KvmMachine(2) as machine:
        machine.close_eventfd(machine.eventfd())


@pytest.mark.parametrize("vcpus", [1, VCPUS_MAX])
def test_program_fits_below_the_stacks_and_displacements_fit_16_bits(vcpus: int) -> None:
    image = program(vcpus)
    for vector in GUEST_VECTORS:
        handler = int.from_bytes(image[vector * 4 : vector * 4 + 2], "little")
        assert image[handler : handler + 3] == b"\x66\xff\x06"
        assert int.from_bytes(image[handler + 3 : handler + 5], "little") == 16 * vector * vcpus
        end = handler + 8
        assert end + int.from_bytes(image[handler + 6 : end], "little", signed=True) == 0x2000


def test_ram_table_is_what_the_remapper_reads() -> None:
    with Ram.create(1) as ram:
        ram.table[2 * 5] = 0x1122334455667788
        memory = ram.memory()
        assert memory.read(TABLE + 5 * 16, 8) == bytes.fromhex("8877665544332211")
        memory.close()


def test_ram_snapshot_changes_with_its_cells_and_no_others() -> None:
    with Ram.create(1) as ram:
        before = ram.snapshot(40, 44)
        ram.cells[39] += 1
        ram.cells[44] += 1
        assert ram.snapshot(40, 44) == before
        ram.cells[43] += 1
        assert ram.snapshot(40, 44) != before


@pytest.mark.parametrize(("vcpus", "vectors"), [(1, 1), (4, 16), (4, 64), (2, 223), (16, 100)])
def test_pairs_are_shared_out_without_overlap(vcpus: int, vectors: int) -> None:
    pairs = Pairs(vcpus, vectors)
    seen: set[tuple[int, int]] = set()
    for vector in range(vectors):
        own = {pairs.pair(number) for number in pairs.cells(vector)}
        assert len(own) >= 2
        assert not own & seen
        assert all(vcpu in range(vcpus) and guest_vector in GUEST_VECTORS for vcpu, guest_vector in own)
        seen |= own


@pytest.mark.parametrize(("vcpus", "vectors"), [(0, 1), (VCPUS_MAX + 1, 1), (1, 112), (4, 224), (4, 0)])
def test_pairs_that_cannot_be_shared_out_are_refused(vcpus: int, vectors: int) -> None:
    with pytest.raises(CallerError):
        Pairs(vcpus, vectors)

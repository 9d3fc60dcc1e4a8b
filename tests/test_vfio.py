"""irqrouter.vfio: the ABI against <linux/vfio.h>, the ioctls byte by byte, the refusals against the real kernel."""

import errno
import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from irqrouter import vfio
from irqrouter.errors import CallerError, KernelError, SpecError
from irqrouter.vfio import (
    TooFewHostVectorsError,
    VfioIrqIndex,
    VfioIrqInfo,
    VfioIrqInfoFlag,
    VfioIrqs,
    VfioIrqSetFlag,
    VfioRefusedError,
    requester_id,
)

ADDRESS = "0000:03:00.0"
DEVICE_FD = 77

# The words of struct vfio_irq_set and its flags, written down as numbers: not by the constants under test.
DATA_NONE, DATA_EVENTFD = 1, 4
MASK, UNMASK, TRIGGER = 8, 16, 32


class FakeDevice:
    """Stands where the kernel would: answers GET_IRQ_INFO, keeps the bytes of every SET_IRQS, refuses on demand."""

    def __init__(self, flags: int, count: int, result: int = 0, refuse: int | None = None) -> None:
        self.flags = flags
        self.count = count
        self.result = result
        self.refuse = refuse
        self.asked: list[tuple[int, ...]] = []
        self.set: list[bytes] = []

    def ioctl(self, fd: int, request: int, argument: bytearray) -> int:
        assert fd == DEVICE_FD
        if request == 0x3B6D:
            argsz, flags, index, count = struct.unpack("=4I", argument)
            self.asked.append((argsz, flags, index, count))
            argument[:] = struct.pack("=4I", argsz, self.flags, index, self.count)
            return 0
        assert request == 0x3B6E
        if self.refuse is not None:
            raise OSError(self.refuse, os.strerror(self.refuse))
        self.set.append(bytes(argument))
        return self.result

    def irqs(self, index: VfioIrqIndex) -> VfioIrqs:
        return VfioIrqs(DEVICE_FD, index, ADDRESS, ioctl=self.ioctl)


def msix(count: int = 5, result: int = 0, refuse: int | None = None) -> FakeDevice:
    return FakeDevice(1, count, result, refuse)


def intx() -> FakeDevice:
    return FakeDevice(7, 1)


@pytest.fixture
def null_fd() -> Iterator[int]:
    """A real descriptor that is no VFIO device."""
    fd = os.open("/dev/null", os.O_RDWR)
    yield fd
    os.close(fd)


PROBE = r"""
#include <linux/vfio.h>
#include <stddef.h>
#include <stdio.h>
#define P(name) printf("%s %ld\n", #name, (long)(name))
int main(void) {
    P(VFIO_DEVICE_GET_IRQ_INFO); P(VFIO_DEVICE_SET_IRQS);
    P(sizeof(struct vfio_irq_info));
    P(offsetof(struct vfio_irq_info, argsz)); P(offsetof(struct vfio_irq_info, flags));
    P(offsetof(struct vfio_irq_info, index)); P(offsetof(struct vfio_irq_info, count));
    P(sizeof(struct vfio_irq_set));
    P(offsetof(struct vfio_irq_set, argsz)); P(offsetof(struct vfio_irq_set, flags));
    P(offsetof(struct vfio_irq_set, index)); P(offsetof(struct vfio_irq_set, start));
    P(offsetof(struct vfio_irq_set, count)); P(offsetof(struct vfio_irq_set, data));
    P(VFIO_PCI_INTX_IRQ_INDEX); P(VFIO_PCI_MSI_IRQ_INDEX); P(VFIO_PCI_MSIX_IRQ_INDEX);
    P(VFIO_PCI_ERR_IRQ_INDEX); P(VFIO_PCI_REQ_IRQ_INDEX);
    P(VFIO_IRQ_INFO_EVENTFD); P(VFIO_IRQ_INFO_MASKABLE);
    P(VFIO_IRQ_INFO_AUTOMASKED); P(VFIO_IRQ_INFO_NORESIZE);
    P(VFIO_IRQ_SET_DATA_NONE); P(VFIO_IRQ_SET_DATA_BOOL); P(VFIO_IRQ_SET_DATA_EVENTFD);
    P(VFIO_IRQ_SET_ACTION_MASK); P(VFIO_IRQ_SET_ACTION_UNMASK); P(VFIO_IRQ_SET_ACTION_TRIGGER);
    P(VFIO_PCI_NUM_IRQS);
    return 0;
}
"""


def compiled_probe(directory: Path) -> dict[str, int]:
    """What the compiler makes of <linux/vfio.h>, name by name."""
    compiler = shutil.which("cc")
    header = Path("/usr/include/linux/vfio.h")
    if compiler is None or not header.exists():
        reason = "no C compiler (cc)" if compiler is None else f"no {header} (package linux-libc-dev)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    source, program = directory / "probe.c", directory / "probe"
    source.write_text(PROBE)
    subprocess.run([compiler, "-Wall", "-Werror", "-o", program, source], check=True, timeout=60)
    lines = subprocess.run([program], check=True, timeout=10, capture_output=True, text=True).stdout.splitlines()
    return {name: int(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def field_offsets(layout: struct.Struct) -> list[int]:
    """Where each field of ``layout`` begins, and where the last one ends."""
    order, fields = layout.format[0], layout.format[1:]
    return [struct.calcsize(f"{order}{fields[:n]}") for n in range(len(fields) + 1)]


def test_abi_compiled_from_the_header_matches(tmp_path: Path) -> None:
    probe = compiled_probe(tmp_path)

    info = [probe[f"offsetof(struct vfio_irq_info, {name})"] for name in ("argsz", "flags", "index", "count")]
    assert field_offsets(vfio.VFIO_IRQ_INFO) == [*info, probe["sizeof(struct vfio_irq_info)"]]
    irq_set = [
        probe[f"offsetof(struct vfio_irq_set, {name})"]
        for name in ("argsz", "flags", "index", "start", "count", "data")
    ]
    assert field_offsets(vfio.VFIO_IRQ_SET) == irq_set
    assert probe["sizeof(struct vfio_irq_set)"] == vfio.VFIO_IRQ_SET.size
    assert probe["VFIO_DEVICE_GET_IRQ_INFO"] == vfio.VFIO_DEVICE_GET_IRQ_INFO
    assert probe["VFIO_DEVICE_SET_IRQS"] == vfio.VFIO_DEVICE_SET_IRQS
    assert {f"VFIO_PCI_{index.name}_IRQ_INDEX": index.value for index in VfioIrqIndex} == {
        name: value for name, value in probe.items() if name.endswith("_IRQ_INDEX")
    }
    assert len(VfioIrqIndex) == probe["VFIO_PCI_NUM_IRQS"]
    assert {f"VFIO_IRQ_INFO_{flag.name}": flag.value for flag in VfioIrqInfoFlag} == {
        name: value for name, value in probe.items() if name.startswith("VFIO_IRQ_INFO_")
    }
    assert {f"VFIO_IRQ_SET_{flag.name}": flag.value for flag in VfioIrqSetFlag} == {
        name: value for name, value in probe.items() if name.startswith("VFIO_IRQ_SET_")
    }


def test_info_asks_for_the_index_and_reads_flags_and_count() -> None:
    device = FakeDevice(9, 32)

    assert device.irqs(VfioIrqIndex.MSI).info() == VfioIrqInfo(VfioIrqInfoFlag.EVENTFD | VfioIrqInfoFlag.NORESIZE, 32)
    assert device.asked == [(16, 0, 1, 0)]


def test_info_with_a_flag_of_a_newer_kernel_keeps_it() -> None:
    assert FakeDevice(1 << 9 | 1, 1).irqs(VfioIrqIndex.MSIX).info().flags == 1 << 9 | 1


def test_set_eventfds_sends_one_word_for_each_vector_and_minus_one_for_none() -> None:
    device = msix()

    device.irqs(VfioIrqIndex.MSIX).set_eventfds(2, [10, None, 12])

    assert device.set == [struct.pack("=5I3i", 32, DATA_EVENTFD | TRIGGER, 2, 2, 3, 10, -1, 12)]


def test_set_eventfds_on_intx_sends_index_zero() -> None:
    device = intx()

    device.irqs(VfioIrqIndex.INTX).set_eventfds(0, [9])

    assert device.set == [struct.pack("=5Ii", 24, DATA_EVENTFD | TRIGGER, 0, 0, 1, 9)]


def test_trigger_sends_the_range_without_data() -> None:
    device = msix()

    device.irqs(VfioIrqIndex.MSIX).trigger(1, 4)

    assert device.set == [struct.pack("=5I", 20, DATA_NONE | TRIGGER, 2, 1, 4)]


def test_disable_sends_count_zero() -> None:
    device = msix()

    device.irqs(VfioIrqIndex.MSIX).disable()

    assert device.set == [struct.pack("=5I", 20, DATA_NONE | TRIGGER, 2, 0, 0)]


def test_mask_and_unmask_on_intx_send_their_action() -> None:
    device = intx()

    device.irqs(VfioIrqIndex.INTX).mask()
    device.irqs(VfioIrqIndex.INTX).unmask()

    assert device.set == [
        struct.pack("=5I", 20, DATA_NONE | MASK, 0, 0, 1),
        struct.pack("=5I", 20, DATA_NONE | UNMASK, 0, 0, 1),
    ]


def test_set_unmask_eventfd_sends_the_descriptor_and_minus_one_for_none() -> None:
    device = intx()

    device.irqs(VfioIrqIndex.INTX).set_unmask_eventfd(11)
    device.irqs(VfioIrqIndex.INTX).set_unmask_eventfd(None)

    assert device.set == [
        struct.pack("=5Ii", 24, DATA_EVENTFD | UNMASK, 0, 0, 1, 11),
        struct.pack("=5Ii", 24, DATA_EVENTFD | UNMASK, 0, 0, 1, -1),
    ]


def test_mask_calls_on_msi_are_refused_before_any_change() -> None:
    device = FakeDevice(9, 1)
    irqs = device.irqs(VfioIrqIndex.MSI)

    for call in (irqs.mask, irqs.unmask, lambda: irqs.set_unmask_eventfd(11)):
        with pytest.raises(CallerError, match=r"0000:03:00\.0 MSI: VFIO cannot mask"):
            call()
    assert device.set == []


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (0, 0), (0, -1), (5, 1), (0, 6), (4, 2), (1 << 32, 1)])
def test_trigger_outside_the_vectors_is_refused_before_any_change(start: int, count: int) -> None:
    device = msix(count=5)

    with pytest.raises(CallerError, match=r"0000:03:00\.0 MSI-X: .* of the 5 the device has"):
        device.irqs(VfioIrqIndex.MSIX).trigger(start, count)
    assert device.set == []


@pytest.mark.parametrize(("start", "eventfds"), [(-1, [7]), (0, []), (5, [7]), (0, [7] * 6), (4, [7, 8])])
def test_set_eventfds_outside_the_vectors_is_refused_before_any_change(start: int, eventfds: list[int | None]) -> None:
    device = msix(count=5)

    with pytest.raises(CallerError, match="of the 5 the device has"):
        device.irqs(VfioIrqIndex.MSIX).set_eventfds(start, eventfds)
    assert device.set == []


@pytest.mark.parametrize("eventfd", [-1, -2, 1 << 31])
def test_set_eventfds_with_no_descriptor_is_refused_naming_the_vector(eventfd: int) -> None:
    device = msix()

    with pytest.raises(CallerError, match=f"MSI-X vector 3: eventfd {eventfd}: must be a descriptor, or None"):
        device.irqs(VfioIrqIndex.MSIX).set_eventfds(2, [7, eventfd])
    with pytest.raises(CallerError, match=f"INTx vector 0: eventfd {eventfd}"):
        intx().irqs(VfioIrqIndex.INTX).set_unmask_eventfd(eventfd)
    assert device.set == []


def test_negative_device_descriptor_is_refused() -> None:
    with pytest.raises(CallerError, match="device_fd -1"):
        VfioIrqs(-1, VfioIrqIndex.MSI, ADDRESS)


def test_set_eventfds_when_the_host_has_fewer_vectors_says_how_many() -> None:
    with pytest.raises(TooFewHostVectorsError) as caught:
        msix(result=3).irqs(VfioIrqIndex.MSIX).set_eventfds(0, [7, 8, 9, 10])

    assert caught.value.available == 3
    assert str(caught.value) == "0000:03:00.0 MSI-X vectors 0-3: the host has only 3 vectors for this device"


@pytest.mark.parametrize(
    ("refuse", "reason"),
    [
        (errno.EINVAL, "not enabled"),
        (errno.EBADF, "closed"),
        (errno.EBUSY, "taken"),
        (errno.ENOSPC, "no vector left"),
        (errno.ENOMEM, ""),
    ],
)
def test_set_eventfds_refused_by_the_kernel_names_device_index_vector_and_reason(refuse: int, reason: str) -> None:
    with pytest.raises(VfioRefusedError) as caught:
        msix(refuse=refuse).irqs(VfioIrqIndex.MSIX).set_eventfds(3, [7])

    assert caught.value.errno == refuse
    assert caught.value.object == "0000:03:00.0 MSI-X vector 3"
    assert caught.value.call == "VFIO_DEVICE_SET_IRQS"
    assert reason in caught.value.reason
    assert str(caught.value).endswith(caught.value.reason or "(Cannot allocate memory)")


def test_info_on_a_descriptor_that_is_no_vfio_device_says_so(null_fd: int) -> None:
    with pytest.raises(KernelError, match=r"0000:03:00\.0 INTx: VFIO_DEVICE_GET_IRQ_INFO .* not a VFIO device"):
        VfioIrqs(null_fd, VfioIrqIndex.INTX, ADDRESS).info()


def test_disable_on_a_descriptor_that_is_no_vfio_device_says_so(null_fd: int) -> None:
    with pytest.raises(KernelError, match=r"0000:03:00\.0 MSI: VFIO_DEVICE_SET_IRQS .* not a VFIO device"):
        VfioIrqs(null_fd, VfioIrqIndex.MSI, ADDRESS).disable()


def test_calls_on_a_closed_descriptor_say_so(null_fd: int) -> None:
    closed = os.dup(null_fd)
    os.close(closed)

    with pytest.raises(VfioRefusedError, match=r"EBADF .* the device descriptor is closed"):
        VfioIrqs(closed, VfioIrqIndex.MSIX, ADDRESS).info()


def test_set_eventfds_for_2048_vectors_reaches_the_kernel_in_one_call(null_fd: int) -> None:
    """fcntl.ioctl raises ValueError, without a call, for more than 1024 bytes that it cannot pass in place."""
    device = msix(count=2048)

    def ioctl(fd: int, request: int, argument: bytearray) -> int:
        if request == vfio.VFIO_DEVICE_GET_IRQ_INFO:
            return device.ioctl(DEVICE_FD, request, argument)
        result: int = fcntl.ioctl(fd, request, argument)
        return result

    with pytest.raises(VfioRefusedError, match="ENOTTY") as caught:
        VfioIrqs(null_fd, VfioIrqIndex.MSIX, ADDRESS, ioctl=ioctl).set_eventfds(0, [null_fd] * 2048)
    assert caught.value.object == "0000:03:00.0 MSI-X vectors 0-2047"


@pytest.mark.parametrize(
    ("address", "requester"),
    [
        ("0000:00:00.0", 0x0000),
        ("0000:03:00.0", 0x0300),
        ("0000:00:1f.7", 0x00FF),
        ("0000:ff:1f.7", 0xFFFF),
        ("0001:81:02.3", 0x8113),
        ("10000:01:00.0", 0x0100),
    ],
)
def test_requester_id_of_an_address_is_bus_device_function(address: str, requester: int) -> None:
    assert requester_id(address) == requester


@pytest.mark.parametrize(
    "address",
    [
        "",
        "03:00.0",
        "0000:03:00",
        "0000:03:20.0",
        "0000:03:00.8",
        "0000:103:00.0",
        "0000:03:00.0\n",
        " 0000:03:00.0",
        "000:03:00.0",
        "0000:0٣:00.0",
        "../0000:03:00.0",
    ],
)
def test_requester_id_of_anything_else_raises(address: str) -> None:
    with pytest.raises(SpecError, match="must be domain:bus:device"):
        requester_id(address)

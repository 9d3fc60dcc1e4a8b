"""The C compiler's word on every number, size and offset in abi.py."""

import ctypes
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from irqrouter.kvm import abi

# Each packer, its C structure and the C members in the packer's order.
PACKERS = [
    (abi.KVM_IRQFD_STRUCT, "kvm_irqfd", "fd gsi flags resamplefd"),
    (abi.KVM_MSI_STRUCT, "kvm_msi", "address_lo address_hi data flags devid"),
    (abi.KVM_IRQ_LEVEL_STRUCT, "kvm_irq_level", "irq level"),
    (abi.KVM_IRQ_ROUTING_STRUCT, "kvm_irq_routing", "nr flags"),
    (
        abi.KVM_IRQ_ROUTING_ENTRY_STRUCT,
        "kvm_irq_routing_entry",
        "gsi type flags u.msi.address_lo u.msi.address_hi u.msi.data",
    ),
    (
        abi.KVM_USERSPACE_MEMORY_REGION_STRUCT,
        "kvm_userspace_memory_region",
        "slot flags guest_phys_addr memory_size userspace_addr",
    ),
    (abi.KVM_ENABLE_CAP_STRUCT, "kvm_enable_cap", "cap flags args[0]"),
    (abi.KVM_MP_STATE_STRUCT, "kvm_mp_state", "mp_state"),
    (abi.KVM_SIGNAL_MASK_STRUCT, "kvm_signal_mask", "len"),
]
MIRRORS = [
    abi.kvm_segment,
    abi.kvm_dtable,
    abi.kvm_sregs,
    abi.kvm_regs,
    abi.kvm_lapic_state,
    abi.kvm_cpuid_entry2,
    abi.kvm_cpuid2,
]
# Not in <linux/kvm.h>: KVM's own limit, and an offset that has its own test.
NOT_MACROS = {"KVM_MAX_CPUID_ENTRIES", "KVM_RUN_EXIT_REASON_OFFSET"}
CONSTANTS = {
    **{name: value for name, value in vars(abi).items() if name.startswith("KVM_") and isinstance(value, int)},
    **{name: value for value, name in abi.KVM_EXIT_NAMES.items()},
}


def _probe() -> str:
    lines = [
        *(f'printf("{name} %lu\\n", (unsigned long){name});' for name in sorted(CONSTANTS.keys() - NOT_MACROS)),
        'printf("exit_reason %zu\\n", offsetof(struct kvm_run, exit_reason));',
    ]
    members = [(name, member) for _, name, names in PACKERS for member in names.split()]
    members += [(mirror.__name__, field[0]) for mirror in MIRRORS for field in mirror._fields_]
    lines += [f'printf("{name} %zu\\n", sizeof(struct {name}));' for name in sorted({name for name, _ in members})]
    lines += [f'printf("{name}.{member} %zu\\n", offsetof(struct {name}, {member}));' for name, member in members]
    lines += [
        f'printf("sizeof:{name}.{member} %zu\\n", sizeof(((struct {name} *)0)->{member}));'
        for name, member in members
        if (name, member) != ("kvm_cpuid2", "entries")  # a flexible array has no size
    ]
    headers = "".join(f"#include <{header}>\n" for header in ("linux/kvm.h", "stddef.h", "stdio.h"))
    return headers + "int main(void) {\n" + "\n".join(lines) + "\n}\n"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What the compiler says, by name: constants, ``sizeof``, ``struct.member`` and ``sizeof:struct.member``."""
    compiler = shutil.which("cc")
    if compiler is None or not Path("/usr/include/linux/kvm.h").exists():
        reason = "no C compiler (cc)" if compiler is None else "no <linux/kvm.h>"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    program = tmp_path_factory.mktemp("abi") / "probe"
    subprocess.run([compiler, "-x", "c", "-o", program, "-"], input=_probe(), text=True, check=True, timeout=60)
    output = subprocess.run([program], capture_output=True, text=True, check=True, timeout=60).stdout
    return {name: int(value) for name, value in (line.split() for line in output.splitlines())}


@pytest.mark.parametrize("name", sorted(CONSTANTS.keys() - NOT_MACROS))
def test_constant_compiled_equals_header(name: str, compiled: dict[str, int]) -> None:
    assert CONSTANTS[name] == compiled[name]


@pytest.mark.parametrize(("packer", "name", "members"), PACKERS)
def test_packer_compiled_puts_members_where_c_has_them(
    packer: struct.Struct, name: str, members: str, compiled: dict[str, int]
) -> None:
    values: list[int] = []
    expected = bytearray(compiled[name])
    for number, member in enumerate(members.split(), 1):
        offset, size = compiled[f"{name}.{member}"], compiled[f"sizeof:{name}.{member}"]
        # Its number in the highest byte and 1 in the lowest: a member packed too narrow or too wide shows.
        values.append(number << 8 * (size - 1) | 1)
        expected[offset : offset + size] = values[-1].to_bytes(size, "little")
    assert packer.pack(*values) == bytes(expected)


@pytest.mark.parametrize("mirror", MIRRORS)
def test_mirror_compiled_has_the_same_layout(mirror: type[ctypes.Structure], compiled: dict[str, int]) -> None:
    name = mirror.__name__
    fields = {field[0]: (getattr(mirror, field[0]).offset, getattr(mirror, field[0]).size) for field in mirror._fields_}
    if mirror is abi.kvm_cpuid2:
        offset, size = fields.pop("entries")
        assert (offset, offset + size) == (compiled["kvm_cpuid2.entries"], ctypes.sizeof(mirror))
    else:
        assert ctypes.sizeof(mirror) == compiled[name]
    assert fields == {field: (compiled[f"{name}.{field}"], compiled[f"sizeof:{name}.{field}"]) for field in fields}


def test_exit_reason_compiled_lies_where_c_has_it(compiled: dict[str, int]) -> None:
    assert compiled["exit_reason"] == abi.KVM_RUN_EXIT_REASON_OFFSET

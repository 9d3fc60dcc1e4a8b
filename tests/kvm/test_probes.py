"""The probes against the real kernel, and those that read sysfs against trees made for them."""

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from irqrouter.errors import KernelError, SpecError
from irqrouter.kvm import probes, vm
from irqrouter.kvm.probes import (
    CVE_2025_37885,
    CVE_2026_23198,
    EventSeen,
    KernelBug,
    KernelRelease,
    PostedInterrupts,
    Vfio,
    X2apicApi,
)
from irqrouter.kvm.vm import KvmMissingError

needs_kvm = pytest.mark.skipif(not Path("/dev/kvm").exists(), reason="this machine has no /dev/kvm")

NEEDING_KVM: list[Callable[[], object]] = [
    probes.capabilities,
    probes.event_while_assigned,
    probes.event_after_deassign,
    probes.event_before_assign,
    probes.event_without_route,
    probes.one_irqfd_per_eventfd,
    probes.resample_refused,
    probes.foreign_vm_errno,
    probes.vcpu_runs,
]


@needs_kvm
def test_capabilities_of_this_kernel_are_what_a_vm_is_given() -> None:
    found = probes.capabilities()
    with vm.KvmVm.create() as made:
        assert found.routes_max == made.routes_max
    assert found.split_irqchip
    assert found.irqfd
    assert found.signal_msi
    assert not found.msi_devid  # Arm's alone
    assert X2apicApi.USE_32BIT_IDS | X2apicApi.DISABLE_BROADCAST_QUIRK in found.x2apic_api


# The behaviours below are the ground the design stands on: on a kernel where one fails, so would everything else.


@needs_kvm
def test_event_while_assigned_is_injected_and_hidden() -> None:
    assert probes.event_while_assigned() == EventSeen(injected=True, reported=False, left=0)


@needs_kvm
def test_event_after_deassign_is_userspaces_alone() -> None:
    assert probes.event_after_deassign() == EventSeen(injected=False, reported=True, left=1)


@needs_kvm
def test_event_before_assign_is_injected_and_not_drained() -> None:
    assert probes.event_before_assign() == EventSeen(injected=True, reported=True, left=1)


@needs_kvm
def test_event_without_route_is_consumed_and_lost() -> None:
    assert probes.event_without_route() == EventSeen(injected=False, reported=False, left=0)


@needs_kvm
def test_one_irqfd_per_eventfd_is_host_wide_since_6_17() -> None:
    assert probes.one_irqfd_per_eventfd() == (probes.kernel_release() >= KernelRelease(6, 17, 0))


@needs_kvm
def test_resample_refused_on_a_split_irqchip() -> None:
    assert probes.resample_refused()


@needs_kvm
def test_foreign_vm_errno_is_eio() -> None:
    assert probes.foreign_vm_errno() == errno.EIO


@needs_kvm
def test_foreign_vm_errno_without_an_interpreter_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nonexistent/python")
    with pytest.raises(KernelError, match="running /nonexistent/python failed: ENOENT"):
        probes.foreign_vm_errno()


@needs_kvm
def test_vcpu_runs_and_wakes_up() -> None:
    assert probes.vcpu_runs()


@needs_kvm
@pytest.mark.usefixtures("nothing_leaks")
def test_vcpu_runs_with_a_guest_that_nothing_wakes_up_is_false_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_PATIENCE_S", 0.1)
    monkeypatch.setattr(vm.KvmVm, "irqfd_assign", lambda *_: None)
    assert not probes.vcpu_runs()


@needs_kvm
@pytest.mark.parametrize("probe", NEEDING_KVM, ids=lambda probe: probe.__name__)
@pytest.mark.usefixtures("nothing_leaks")
def test_probe_of_kvm_leaves_nothing_behind(probe: Callable[[], object]) -> None:
    probe()


@pytest.mark.parametrize("probe", NEEDING_KVM, ids=lambda probe: probe.__name__)
@pytest.mark.usefixtures("nothing_leaks")
def test_probe_of_kvm_without_dev_kvm_raises(
    probe: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vm, "_DEV_KVM", str(tmp_path / "kvm"))
    with pytest.raises(KvmMissingError):
        probe()


@pytest.mark.usefixtures("nothing_leaks")
def test_eventfd_fdinfo_names_the_lines_of_the_kernels_fdinfo() -> None:
    fd = os.eventfd(0)
    text = Path(f"/proc/self/fdinfo/{fd}").read_text("ascii")
    os.close(fd)
    assert probes.eventfd_fdinfo() == set(re.findall(r"^eventfd-\w+", text, re.MULTILINE))
    assert "eventfd-count" in probes.eventfd_fdinfo()


@pytest.mark.usefixtures("nothing_leaks")
def test_memfd_seals_hold() -> None:
    assert probes.memfd_seals()


# What is read from sysfs and procfs.


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_vfio_on_an_empty_host_is_nothing(tmp_path: Path) -> None:
    assert probes.vfio(tmp_path) == Vfio(container=False, iommufd=False, iommu_groups=0)


def test_vfio_counts_groups_and_finds_both_interfaces(tmp_path: Path) -> None:
    root = tree(tmp_path, {"dev/vfio/vfio": "", "dev/iommu": ""})
    for group in range(3):
        (root / f"sys/kernel/iommu_groups/{group}").mkdir(parents=True)
    assert probes.vfio(root) == Vfio(container=True, iommufd=True, iommu_groups=3)


@pytest.mark.parametrize(
    ("files", "found", "off"),
    [
        ({}, PostedInterrupts(None, None, None), False),
        ({"kvm/parameters/halt_poll_ns": "1\n"}, PostedInterrupts(None, None, None), False),
        ({"kvm_intel/parameters/enable_apicv": "Y\n"}, PostedInterrupts("kvm_intel", True, None), False),
        ({"kvm_intel/parameters/enable_apicv": "N\n"}, PostedInterrupts("kvm_intel", False, None), True),
        ({"kvm_amd/parameters/avic": "1\n"}, PostedInterrupts("kvm_amd", True, None), False),
        ({"kvm_amd/parameters/avic": "-1\n"}, PostedInterrupts("kvm_amd", None, None), False),
        (
            {"kvm_amd/parameters/avic": "Y\n", "kvm_amd/parameters/enable_device_posted_irqs": "N\n"},
            PostedInterrupts("kvm_amd", True, False),
            True,
        ),
    ],
)
def test_posted_interrupts_reads_the_module_parameters(
    files: dict[str, str], found: PostedInterrupts, off: bool, tmp_path: Path
) -> None:
    root = tree(tmp_path, {f"sys/module/{name}": text for name, text in files.items()})
    assert probes.posted_interrupts(root) == found
    assert found.switched_off == off


@pytest.mark.parametrize(
    ("cpuinfo", "extension"),
    [
        ("processor\t: 0\nflags\t\t: fpu vmx smx\n", "vmx"),
        ("flags\t\t: fpu svm\nbugs\t\t: none\n", "svm"),
        ("flags\t\t: fpu svme\nmodel name\t: vmx\n", None),
    ],
)
def test_cpu_virtualization_reads_the_flags(cpuinfo: str, extension: str | None, tmp_path: Path) -> None:
    assert probes.cpu_virtualization(tree(tmp_path, {"proc/cpuinfo": cpuinfo})) == extension


def test_cpu_virtualization_without_cpuinfo_is_none(tmp_path: Path) -> None:
    assert probes.cpu_virtualization(tmp_path) is None


# Releases and the bugs judged by them.


@pytest.mark.parametrize(
    ("text", "release", "described"),
    [
        ("6.12.26-1-amd64", KernelRelease(6, 12, 26), "6.12.26"),
        ("6.19.0", KernelRelease(6, 19, 0), "6.19"),
        ("6.19", KernelRelease(6, 19, 0), "6.19"),
        ("6.15.0-rc4+", KernelRelease(6, 15, -1), "6.15-rc"),
        ("5.14.0-427.13.1.el9_4.x86_64", KernelRelease(5, 14, 0), "5.14"),
        ("7.3.4", KernelRelease(7, 3, 4), "7.3.4"),
    ],
)
def test_kernel_release_parses_and_describes(text: str, release: KernelRelease, described: str) -> None:
    assert KernelRelease.parse(text) == release
    assert release.describe() == described


@pytest.mark.parametrize("text", ["", "linux", "6", "x6.1"])
def test_kernel_release_of_something_else_raises(text: str) -> None:
    with pytest.raises(SpecError, match=r"must begin with major\.minor"):
        KernelRelease.parse(text)


def test_kernel_release_is_the_running_one() -> None:
    running = probes.kernel_release()
    assert os.uname().release.startswith(f"{running.major}.{running.minor}")


@pytest.mark.parametrize(
    ("bug", "release", "fixed"),
    [
        (CVE_2026_23198, "5.10.249", False),
        (CVE_2026_23198, "5.10.250", True),
        (CVE_2026_23198, "6.6.123", False),
        (CVE_2026_23198, "6.12.70", True),
        (CVE_2026_23198, "6.17.13", False),  # a series that ended before the fix
        (CVE_2026_23198, "6.18.9", False),
        (CVE_2026_23198, "6.18.10", True),
        (CVE_2026_23198, "6.19.0-rc8", False),
        (CVE_2026_23198, "6.19", True),
        (CVE_2026_23198, "7.0", True),
        (CVE_2025_37885, "6.1.135", False),
        (CVE_2025_37885, "6.6.89", True),
        (CVE_2025_37885, "6.13.12", False),
        (CVE_2025_37885, "6.14.5", True),
        (CVE_2025_37885, "6.15", True),
        (CVE_2025_37885, "5.14.0-427.13.1.el9_4", False),
    ],
)
def test_kernel_bug_is_fixed_from_its_series_first_good_release_on(bug: KernelBug, release: str, fixed: bool) -> None:
    assert bug.fixed_in(KernelRelease.parse(release)) == fixed


def test_constants_are_those_of_the_kernels_header(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None or not Path("/usr/include/linux/kvm.h").exists():
        pytest.skip("no C compiler, or no <linux/kvm.h>")
    ours = {
        "KVM_CAP_XEN_HVM": probes._KVM_CAP_XEN_HVM,
        "KVM_CAP_MSI_DEVID": probes._KVM_CAP_MSI_DEVID,
        "KVM_IRQFD_FLAG_RESAMPLE": probes._KVM_IRQFD_FLAG_RESAMPLE,
    }
    since = {"KVM_X2APIC_": X2apicApi, "KVM_XEN_HVM_CONFIG_": probes.XenHvm}
    ours |= {f"{prefix}{flag.name}": flag.value for prefix, flags in since.items() for flag in flags}
    ours["KVM_X2APIC_API_USE_32BIT_IDS"] = ours.pop("KVM_X2APIC_USE_32BIT_IDS")
    ours["KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK"] = ours.pop("KVM_X2APIC_DISABLE_BROADCAST_QUIRK")
    source = tmp_path / "constants.c"
    lines = [f'#ifdef {name}\nprintf("{name} %llu\\n", (unsigned long long)({name}));\n#endif' for name in ours]
    source.write_text(
        "#include <stdio.h>\n#include <linux/kvm.h>\nint main(void) {\n" + "\n".join(lines) + "\nreturn 0; }\n"
    )
    subprocess.run([compiler, "-o", tmp_path / "constants", source], check=True, timeout=60)
    printed = subprocess.run([tmp_path / "constants"], check=True, capture_output=True, text=True, timeout=10).stdout
    header = {name: int(value) for name, value in (line.split() for line in printed.splitlines())}
    # An older header lacks the newest flags; these it has had for long.
    assert set(header) >= {*list(ours)[:3], "KVM_X2APIC_API_USE_32BIT_IDS", "KVM_XEN_HVM_CONFIG_EVTCHN_SEND"}
    assert header == {name: ours[name] for name in header}

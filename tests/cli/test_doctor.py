"""irqrouter doctor on this host, and on kernels that this host's is not."""

import argparse
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from irqrouter.cli import doctor
from irqrouter.cli.doctor import Diagnosis, Fact, Outcome
from irqrouter.errors import KernelError
from irqrouter.kvm import probes, vm
from irqrouter.kvm.probes import EventSeen, KernelRelease, PostedInterrupts, Vfio, X2apicApi, XenHvm
from irqrouter.kvm.vm import KvmPermissionError, KvmUnsupportedError

needs_kvm = pytest.mark.skipif(not Path("/dev/kvm").exists(), reason="this machine has no /dev/kvm")


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="irqrouter")
    doctor.add_parser(parser.add_subparsers(required=True))
    return doctor.run(parser.parse_args(["doctor", *arguments]))


@pytest.fixture
def good_host(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A host where every fact is ok, for tests that spoil one."""
    answers: dict[str, object] = {
        "capabilities": probes.Capabilities(
            split_irqchip=True,
            x2apic_api=X2apicApi.USE_32BIT_IDS | X2apicApi.DISABLE_BROADCAST_QUIRK,
            irqfd=True,
            routes_max=4096,
            signal_msi=True,
            msi_devid=False,
            xen_hvm=XenHvm.EVTCHN_2LEVEL | XenHvm.EVTCHN_SEND,
        ),
        "event_while_assigned": EventSeen(injected=True, reported=False, left=0),
        "event_after_deassign": EventSeen(injected=False, reported=True, left=1),
        "event_before_assign": EventSeen(injected=True, reported=True, left=1),
        "event_without_route": EventSeen(injected=False, reported=False, left=0),
        "one_irqfd_per_eventfd": True,
        "resample_refused": True,
        "eventfd_fdinfo": frozenset({"eventfd-count", "eventfd-id", "eventfd-semaphore"}),
        "foreign_vm_errno": errno.EIO,
        "vcpu_runs": True,
        "memfd_seals": True,
        "vfio": Vfio(container=True, iommufd=False, iommu_groups=12),
        "posted_interrupts": PostedInterrupts("kvm_intel", apicv=True, device_posted_irqs=True),
        "kernel_release": KernelRelease(7, 3, 4),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(probes, name, returning(answer))
    monkeypatch.setattr(doctor, "open_kvm", lambda: os.open("/dev/null", os.O_RDONLY))
    monkeypatch.setattr(doctor, "_uevents", lambda: None)
    return monkeypatch


def returning(answer: object) -> Callable[[], object]:
    return lambda: answer


def raising(error: Exception) -> Callable[[], object]:
    def fail() -> object:
        raise error

    return fail


def fact(diagnosis: Diagnosis, name: str) -> Fact:
    (found,) = (each for each in diagnosis.facts if each.name == name)
    return found


@needs_kvm
@pytest.mark.usefixtures("nothing_leaks")
def test_doctor_on_this_host_finds_it_usable(capsys: pytest.CaptureFixture[str]) -> None:
    status = run("--json")
    printed = capsys.readouterr()
    found = msgspec.json.decode(printed.out, type=Diagnosis)
    assert not printed.err
    assert [each for each in found.facts if each.required and each.outcome is not Outcome.OK] == []
    assert found.usable
    assert status == 0
    assert fact(found, "guest wakes up").value == "yes"


@pytest.mark.usefixtures("nothing_leaks", "good_host")
def test_doctor_on_a_good_host_has_nothing_to_say_but_ok(capsys: pytest.CaptureFixture[str]) -> None:
    found = doctor.diagnosis()
    assert [(each.name, each.value) for each in found.facts if each.outcome is not Outcome.OK] == []
    assert [each.name for each in found.facts if each.remedy] == []
    assert run() == 0
    assert capsys.readouterr().out.endswith("\nirqrouter can run here.\n")


@pytest.mark.parametrize(
    ("probe", "answer", "name", "value"),
    [
        ("event_while_assigned", EventSeen(True, True, 1), "assigned irqfd hides events", "epoll reports them too"),
        ("event_while_assigned", EventSeen(True, True, 1), "assigned irqfd drains", "1 left of one event"),
        ("event_while_assigned", EventSeen(False, False, 0), "assigned irqfd hides events", "does not inject them"),
        ("event_after_deassign", EventSeen(False, False, 0), "deassigned irqfd lets events through", "not reported"),
        ("event_after_deassign", EventSeen(True, True, 1), "deassigned irqfd lets events through", "no: injected"),
        ("event_before_assign", EventSeen(False, True, 1), "pending event at assign", "not injected"),
        ("eventfd_fdinfo", frozenset({"eventfd-count", "eventfd-id"}), "eventfd fdinfo", "lacks eventfd-semaphore"),
        ("eventfd_fdinfo", frozenset[str](), "eventfd fdinfo", "lacks eventfd-id and eventfd-semaphore"),
        ("vcpu_runs", False, "guest wakes up", "no"),
    ],
)
def test_doctor_without_a_behaviour_the_design_needs_fails(
    probe: str,
    answer: object,
    name: str,
    value: str,
    good_host: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good_host.setattr(probes, probe, returning(answer))
    found = fact(doctor.diagnosis(), name)
    assert found.outcome is Outcome.FAIL
    assert value in found.value
    assert found.remedy
    assert run() == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("irqrouter cannot run here: ")
    assert name in last


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("split irqchip", {"split_irqchip": False}),
        ("x2APIC API", {"x2apic_api": X2apicApi.USE_32BIT_IDS}),
        ("irqfd", {"irqfd": False}),
        ("routing table", {"routes_max": 0}),
        ("signal MSI", {"signal_msi": False}),
    ],
)
def test_doctor_without_a_needed_capability_fails(
    name: str, change: dict[str, object], good_host: pytest.MonkeyPatch
) -> None:
    spoilt = msgspec.structs.replace(probes.capabilities(), **change)
    good_host.setattr(probes, "capabilities", returning(spoilt))
    diagnosis = doctor.diagnosis()
    assert [each.name for each in diagnosis.facts if each.outcome is not Outcome.OK] == [name]
    assert fact(diagnosis, name).outcome is Outcome.FAIL
    assert fact(diagnosis, name).remedy
    assert not diagnosis.usable


@pytest.mark.parametrize(
    ("probe", "answer", "name"),
    [
        ("one_irqfd_per_eventfd", False, "one irqfd per eventfd, host-wide"),
        ("foreign_vm_errno", 0, "VM of another process"),
        ("memfd_seals", False, "memfd sealing"),
        ("vfio", Vfio(container=False, iommufd=False, iommu_groups=3), "VFIO"),
        ("vfio", Vfio(container=True, iommufd=True, iommu_groups=0), "IOMMU groups"),
        ("posted_interrupts", PostedInterrupts("kvm_amd", False, True), "posted interrupts"),
    ],
)
def test_doctor_without_something_optional_warns_and_stays_usable(
    probe: str, answer: object, name: str, good_host: pytest.MonkeyPatch
) -> None:
    good_host.setattr(probes, probe, returning(answer))
    diagnosis = doctor.diagnosis()
    assert [each.name for each in diagnosis.facts if each.outcome is Outcome.WARN] == [name]
    assert fact(diagnosis, name).remedy
    assert diagnosis.usable


def test_doctor_without_xen_bits_warns_and_names_those_it_has(good_host: pytest.MonkeyPatch) -> None:
    flags = XenHvm.HYPERCALL_MSR | XenHvm.SHARED_INFO | XenHvm(1 << 20)
    good_host.setattr(probes, "capabilities", returning(msgspec.structs.replace(probes.capabilities(), xen_hvm=flags)))
    found = fact(doctor.diagnosis(), "Xen HVM")
    assert (found.outcome, found.value) == (Outcome.WARN, "HYPERCALL_MSR, SHARED_INFO, 0x100000")


def test_doctor_without_uevents_or_uvloop_warns(good_host: pytest.MonkeyPatch) -> None:
    refusal = KernelError(errno.EAFNOSUPPORT, "socket", "uevents")
    good_host.setattr(doctor, "_uevents", lambda: refusal)
    good_host.setitem(sys.modules, "uvloop", None)  # what makes an import fail
    diagnosis = doctor.diagnosis()
    assert [each.name for each in diagnosis.facts if each.outcome is Outcome.WARN] == ["uevents", "uvloop"]
    assert "EAFNOSUPPORT" in fact(diagnosis, "uevents").value
    assert diagnosis.usable


@pytest.mark.parametrize(
    ("release", "found", "posted", "outcome", "value"),
    [
        ((6, 6, 80), Vfio(True, False, 12), PostedInterrupts("kvm_intel", True, None), Outcome.WARN, "not fixed"),
        ((6, 6, 80), Vfio(True, False, 12), PostedInterrupts("kvm_intel", None, None), Outcome.WARN, "backport"),
        ((6, 6, 80), Vfio(True, False, 12), PostedInterrupts("kvm_intel", False, None), Outcome.OK, "posting is off"),
        ((6, 6, 80), Vfio(False, False, 0), PostedInterrupts("kvm_intel", True, None), Outcome.OK, "no IOMMU group"),
        (
            (6, 6, 124),
            Vfio(True, False, 12),
            PostedInterrupts("kvm_intel", True, None),
            Outcome.OK,
            "fixed, by version",
        ),
    ],
)
@pytest.mark.parametrize("cve", ["CVE-2026-23198", "CVE-2025-37885"])
def test_doctor_judges_bugs_by_version_where_they_could_bite(
    cve: str,
    release: tuple[int, int, int],
    found: Vfio,
    posted: PostedInterrupts,
    outcome: Outcome,
    value: str,
    good_host: pytest.MonkeyPatch,
) -> None:
    good_host.setattr(probes, "kernel_release", returning(KernelRelease(*release)))
    good_host.setattr(probes, "vfio", returning(found))
    good_host.setattr(probes, "posted_interrupts", returning(posted))
    diagnosis = doctor.diagnosis()
    judged = fact(diagnosis, cve)
    assert judged.outcome is outcome
    assert "by version" in judged.value
    assert value in judged.value
    assert bool(judged.remedy) == (outcome is Outcome.WARN)
    assert diagnosis.usable


@pytest.mark.usefixtures("nothing_leaks")
def test_doctor_without_dev_kvm_says_so_and_names_every_fact_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vm, "_DEV_KVM", str(tmp_path / "kvm"))
    assert run("--json") == 1
    found = msgspec.json.decode(capsys.readouterr().out, type=Diagnosis)
    assert not found.usable
    assert fact(found, "/dev/kvm").outcome is Outcome.FAIL
    assert "virtualization" in fact(found, "/dev/kvm").remedy
    behaviour = fact(found, "assigned irqfd hides events")
    assert behaviour.outcome is Outcome.UNKNOWN
    assert "ENOENT" in behaviour.value
    assert fact(found, "memfd sealing").outcome is Outcome.OK  # needs no VM
    assert len(found.facts) == len({each.name for each in found.facts}) > 25


def test_doctor_with_a_probe_that_the_kernel_refuses_is_unknown_and_not_usable(good_host: pytest.MonkeyPatch) -> None:
    good_host.setattr(probes, "event_while_assigned", raising(KernelError(errno.ENOMEM, "KVM_IRQFD", "gsi 32")))
    diagnosis = doctor.diagnosis()
    unknown = {each.name for each in diagnosis.facts if each.outcome is Outcome.UNKNOWN}
    assert unknown == {"assigned irqfd hides events", "assigned irqfd drains"}
    assert "ENOMEM" in fact(diagnosis, "assigned irqfd drains").value
    assert not diagnosis.usable


@pytest.mark.parametrize(("extension", "advice"), [("vmx", "kvm_intel"), ("svm", "kvm_amd"), (None, "container")])
def test_doctor_without_the_module_names_it(
    extension: str | None, advice: str, tmp_path: Path, good_host: pytest.MonkeyPatch
) -> None:
    good_host.setattr(vm, "_DEV_KVM", str(tmp_path / "kvm"))
    good_host.setattr(doctor, "open_kvm", vm.open_kvm)
    good_host.setattr(probes, "cpu_virtualization", returning(extension))
    assert advice in fact(doctor.diagnosis(), "/dev/kvm").remedy


@pytest.mark.parametrize(
    ("mode", "group", "advice"),
    [
        (0o020660, 993999, "usermod -aG 993999 USER"),  # no such group here: its number
        (0o020600, 993999, "only its owner may open it (crw-------)"),
        (0o020660, 0, "give it a group"),
    ],
)
def test_doctor_without_permission_says_how_to_get_it(mode: int, group: int, advice: str) -> None:
    status = os.stat_result((mode, 1, 1, 1, 0, group, 0, 0, 0, 0))
    assert advice in doctor._how_to_get_permission(status)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (KvmPermissionError(errno.EACCES, "open", "/dev/kvm"), "give it a group|join its group"),
        (KvmUnsupportedError(errno.EOPNOTSUPP, "KVM_GET_API_VERSION", "KVM API version 11"), "API version 12"),
        (KernelError(errno.EMFILE, "open", "/dev/kvm"), "see its log"),
    ],
)
def test_doctor_with_a_dev_kvm_that_does_not_open_says_what_to_do(
    error: KernelError, advice: str, good_host: pytest.MonkeyPatch
) -> None:
    if isinstance(error, KvmPermissionError) and not Path("/dev/kvm").exists():
        pytest.skip("this machine has no /dev/kvm")
    good_host.setattr(doctor, "open_kvm", raising(error))
    found = fact(doctor.diagnosis(), "/dev/kvm")
    assert found.outcome is Outcome.FAIL
    assert found.value == str(error)
    assert any(text in found.remedy for text in advice.split("|"))


@pytest.mark.usefixtures("good_host")
def test_doctor_prints_plain_text_to_a_pipe_and_colours_to_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    run()
    plain = capsys.readouterr().out
    assert "\x1b" not in plain
    for found in doctor.diagnosis().facts:
        assert f"{found.outcome.value:<7} {found.name}: {found.value}\n        {found.meaning}\n" in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    run()
    assert "\x1b[32mok" in capsys.readouterr().out


@pytest.mark.usefixtures("good_host")
def test_doctor_puts_the_remedy_under_the_fact(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(probes, "memfd_seals", returning(False))
    run()
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("warn    memfd sealing: no")
    assert lines[at + 2] == "        -> use a kernel with CONFIG_MEMFD_CREATE"

"""``irqrouter doctor``: what this host's kernel can do, fact by fact."""

import argparse
import enum
import grp
import importlib
import importlib.metadata
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from irqrouter.errors import IrqrouterError
from irqrouter.kvm import probes
from irqrouter.kvm.abi import KVM_API_VERSION
from irqrouter.kvm.vm import KvmMissingError, KvmPermissionError, KvmUnsupportedError, open_kvm
from irqrouter.uevents import Uevents

_DESCRIPTION = """\
Tries out, in virtual machines that live for milliseconds, whether this host's kernel does what irqrouter builds on.
Nothing on the host is changed.
"""

_EPILOG = """\
outcomes:
  ok       as it should be
  warn     irqrouter runs, with less: the line below says what
  fail     irqrouter cannot run here
  unknown  could not be probed: the value says why

The exit status is 0 if irqrouter can run here, that is if every required fact is ok, and 1 if not.
"""

T = TypeVar("T")


class Outcome(enum.Enum):
    """How a fact turned out."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    UNKNOWN = "unknown"


class Fact(msgspec.Struct, frozen=True):
    """One thing about this host: what was found, why irqrouter cares, and what to do about it ("": nothing)."""

    name: str
    outcome: Outcome
    value: str
    meaning: str
    remedy: str
    required: bool


class Diagnosis(msgspec.Struct, frozen=True):
    """What ``--json`` prints. ``usable``: every required fact is ok."""

    usable: bool
    facts: list[Fact]


class Verdict(msgspec.Struct, frozen=True):
    """What a probe's answer amounts to."""

    outcome: Outcome
    value: str
    remedy: str = ""


# argparse has no public name for what add_subparsers() returns.
def add_parser(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",  # pyright: ignore[reportPrivateUsage]
) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "doctor",
        help="what this host's kernel can do, fact by fact",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print what was found; 0 if irqrouter can run here, 1 if not."""
    found = diagnosis()
    if args.json:
        print(msgspec.json.format(msgspec.json.encode(found)).decode())
    else:
        _print(found)
    return 0 if found.usable else 1


def diagnosis() -> Diagnosis:
    """Probe everything. Takes about half a second; no probe waits longer than ten."""
    facts = list(_facts())
    return Diagnosis(usable=all(fact.outcome is Outcome.OK for fact in facts if fact.required), facts=facts)


def _facts() -> Iterator[Fact]:
    yield from _kvm()
    yield from _irqfds()
    yield from _host()
    yield from _devices()


def _kvm() -> Iterator[Fact]:
    yield _fact(
        "kernel",
        "what follows is tried out on it, not concluded from its version, except where it says so",
        lambda: os.uname().release,
        lambda release: Verdict(Outcome.OK, release),
    )
    yield _dev_kvm()
    yield _fact(
        "split irqchip",
        "the guest's I/OAPIC and IOMMU live in userspace, its local APICs in the kernel",
        lambda: probes.capabilities().split_irqchip,
        _yes_or(Outcome.FAIL, "KVM_CAP_SPLIT_IRQCHIP is missing: use a kernel with KVM's x86 local APIC, 4.4 or later"),
        required=True,
    )
    yield _fact(
        "x2APIC API",
        "routes carry 32-bit APIC ids, as a remapping unit in x2APIC mode produces them",
        lambda: probes.capabilities().x2apic_api,
        _x2apic_api,
        required=True,
    )
    yield _fact(
        "irqfd",
        "an eventfd is bound to a guest interrupt, with no userspace in between",
        lambda: probes.capabilities().irqfd,
        _yes_or(Outcome.FAIL, "KVM_CAP_IRQFD is missing: use a kernel built with CONFIG_HAVE_KVM_IRQCHIP"),
        required=True,
    )
    yield _fact(
        "routing table",
        "every interrupt of a VM takes one route, and one GSI, of so many",
        lambda: probes.capabilities().routes_max,
        lambda most: (
            Verdict(Outcome.OK, f"{most} routes")
            if most
            else Verdict(Outcome.FAIL, "none", "KVM_CAP_IRQ_ROUTING is missing: use a kernel with it")
        ),
        required=True,
    )
    yield _fact(
        "signal MSI",
        "a caught interrupt is delivered with KVM_SIGNAL_MSI, which needs no route",
        lambda: probes.capabilities().signal_msi,
        _yes_or(Outcome.FAIL, "KVM_CAP_SIGNAL_MSI is missing: use a kernel with it, 3.5 or later"),
        required=True,
    )
    yield _fact(
        "MSI device ids",
        "only Arm's ITS takes them; x86 has no use for them, nor has irqrouter",
        lambda: probes.capabilities().msi_devid,
        lambda there: Verdict(Outcome.OK, _yes(there)),
    )
    yield _fact(
        "Xen HVM",
        "event channels of Xen guests are delivered by the kernel as far as it offers to",
        lambda: probes.capabilities().xen_hvm,
        lambda flags: (
            Verdict(Outcome.OK, _flags(flags))
            if flags & probes.XenHvm.EVTCHN_2LEVEL
            else Verdict(Outcome.WARN, _flags(flags), "for Xen guests use a kernel 5.17 or later with CONFIG_KVM_XEN")
        ),
    )


def _irqfds() -> Iterator[Fact]:
    yield _fact(
        "assigned irqfd hides events",
        "while nothing changes the loop sleeps; otherwise userspace would deliver every event a second time",
        probes.event_while_assigned,
        _hides_events,
        required=True,
    )
    yield _fact(
        "assigned irqfd drains",
        "KVM takes the count it injects, so that what is found after a deassign is new",
        lambda: probes.event_while_assigned().left,
        lambda left: (
            Verdict(Outcome.OK, "nothing left of one event")
            if not left
            else Verdict(Outcome.FAIL, f"{left} left of one event", _NEWER_KERNEL)
        ),
        required=True,
    )
    yield _fact(
        "deassigned irqfd lets events through",
        "the next event after an invalidation is caught here and retranslated",
        probes.event_after_deassign,
        _lets_through,
        required=True,
    )
    yield _fact(
        "pending event at assign",
        "KVM injects it and leaves the count; irqrouter reads that count and throws it away",
        probes.event_before_assign,
        _pending_at_assign,
        required=True,
    )
    yield _fact(
        "unrouted event",
        "an irqfd without a route would lose events, so irqrouter deassigns before it drops a route",
        probes.event_without_route,
        lambda seen: Verdict(Outcome.OK, f"left in the eventfd: {seen.left}" if seen.left else "taken, and lost"),
    )
    yield _fact(
        "one irqfd per eventfd, host-wide",
        "two VMs that were given one eventfd by mistake are told so with EBUSY",
        probes.one_irqfd_per_eventfd,
        _yes_or(Outcome.WARN, "before Linux 6.17 only one VM's own duplicates are refused: share no eventfd"),
    )
    yield _fact(
        "RESAMPLE irqfd on a split irqchip",
        "irqrouter serves level-triggered lines in userspace and does not need it",
        probes.resample_refused,
        lambda refused: Verdict(Outcome.OK, "refused" if refused else "accepted"),
    )
    yield _fact(
        "eventfd fdinfo",
        "it tells whether two descriptors are one eventfd, and which are semaphores; those are refused",
        probes.eventfd_fdinfo,
        _fdinfo,
        required=True,
    )
    yield _fact(
        "VM of another process",
        "KVM obeys only the process that created the VM: irqrouter runs in it, or has an agent there",
        probes.foreign_vm_errno,
        _foreign_vm,
    )
    yield _fact(
        "guest wakes up",
        "a guest in HLT runs its handler when an irqfd's eventfd is signalled",
        probes.vcpu_runs,
        _yes_or(Outcome.FAIL, "KVM runs no guest code here: see the kernel's log"),
        required=True,
    )


def _host() -> Iterator[Fact]:
    yield _fact(
        "memfd sealing",
        "memory shared with another process cannot shrink under the reader",
        probes.memfd_seals,
        _yes_or(Outcome.WARN, "use a kernel with CONFIG_MEMFD_CREATE"),
    )
    yield _fact(
        "uevents",
        "a VFIO device that leaves takes its vectors with it",
        _uevents,
        _uevents_verdict,
    )
    yield _fact("uvloop", "the faster event loop; irqrouter runs on the standard one as well", _uvloop, _uvloop_verdict)


def _devices() -> Iterator[Fact]:
    yield _fact(
        "VFIO",
        "devices of the host can be handed to the guest; emulated devices do without",
        probes.vfio,
        _vfio,
    )
    yield _fact(
        "IOMMU groups",
        "what VFIO hands out, one group at a time",
        lambda: probes.vfio().iommu_groups,
        lambda groups: (
            Verdict(Outcome.OK, str(groups))
            if groups
            else Verdict(Outcome.WARN, "none", "for VFIO enable the IOMMU in the firmware and with intel_iommu=on")
        ),
    )
    yield _fact(
        "posted interrupts",
        "while assigned, a VFIO device's interrupt reaches a running vCPU without the host kernel, if its IOMMU can",
        probes.posted_interrupts,
        _posted,
    )
    yield _bug(
        probes.CVE_2026_23198,
        "with it a deassigned VFIO interrupt may go on being posted by its old translation, and is never caught",
    )
    yield _bug(
        probes.CVE_2025_37885,
        "with it a VFIO interrupt may go on being posted by its old route after the routing table was rewritten",
    )


def _fact(
    name: str, meaning: str, probe: Callable[[], T], judge: Callable[[T], Verdict], *, required: bool = False
) -> Fact:
    try:
        verdict = judge(probe())
    except IrqrouterError as error:
        verdict = Verdict(Outcome.UNKNOWN, f"not probed: {error}")
    return Fact(name, verdict.outcome, verdict.value, meaning, verdict.remedy, required)


def _yes(there: bool) -> str:
    return "yes" if there else "no"


def _yes_or(otherwise: Outcome, remedy: str) -> Callable[[bool], Verdict]:
    return lambda there: Verdict(Outcome.OK, "yes") if there else Verdict(otherwise, "no", remedy)


def _flags(flags: enum.IntFlag) -> str:
    names = [flag.name or "" for flag in flags]
    if unnamed := int(flags) & ~sum(type(flags)):
        names.append(f"{unnamed:#x}")
    return ", ".join(names) or "none"


_NEWER_KERNEL = "irqrouter needs a kernel 5.11 or later"


def _dev_kvm() -> Fact:
    name, meaning = "/dev/kvm", "irqrouter works on KVM's virtual machines"
    try:
        os.close(open_kvm())
    except IrqrouterError as error:
        return Fact(name, Outcome.FAIL, str(error), meaning, _how_to_open(error), required=True)
    return Fact(name, Outcome.OK, f"opens, API version {KVM_API_VERSION}", meaning, "", required=True)


def _how_to_open(error: IrqrouterError) -> str:
    if isinstance(error, KvmPermissionError):
        return _how_to_get_permission(Path("/dev/kvm").stat())
    if isinstance(error, KvmMissingError):
        module = {"vmx": "kvm_intel", "svm": "kvm_amd"}.get(probes.cpu_virtualization() or "")
        if module is not None:
            return f"modprobe {module}; if it refuses, enable virtualization in the firmware"
        return (
            "the CPU offers no virtualization: enable it in the firmware or, in a virtual machine, nested in its host; "
            "in a container, pass /dev/kvm in"
        )
    if isinstance(error, KvmUnsupportedError):
        return f"use a kernel whose KVM has API version {KVM_API_VERSION}, that is any since 2.6.22"
    return "it exists and irqrouter may open it, but the kernel refuses: see its log"


def _how_to_get_permission(status: os.stat_result) -> str:
    mode = stat.filemode(status.st_mode)
    if status.st_gid == 0 or status.st_mode & 0o060 != 0o060:
        return f"only its owner may open it ({mode}): give it a group, as udev does (chgrp kvm, chmod 660)"
    try:
        group = grp.getgrgid(status.st_gid).gr_name
    except KeyError:  # a group of the host's, seen from a container
        group = str(status.st_gid)
    return f"join its group (usermod -aG {group} USER, then log in again); in a sandbox, allow the device"


def _x2apic_api(flags: probes.X2apicApi) -> Verdict:
    needed = probes.X2apicApi.USE_32BIT_IDS | probes.X2apicApi.DISABLE_BROADCAST_QUIRK
    if needed in flags:
        return Verdict(Outcome.OK, _flags(flags))
    return Verdict(Outcome.FAIL, _flags(flags), f"KVM_CAP_X2APIC_API lacks {_flags(needed & ~flags)}")


def _hides_events(seen: probes.EventSeen) -> Verdict:
    if not seen.injected:
        return Verdict(Outcome.FAIL, "no, and it does not inject them", "the local APIC refused: see the kernel's log")
    if seen.reported:
        return Verdict(Outcome.FAIL, "no: epoll reports them too", _NEWER_KERNEL)
    return Verdict(Outcome.OK, "yes: injected, and epoll reports nothing")


def _lets_through(seen: probes.EventSeen) -> Verdict:
    if seen == probes.EventSeen(injected=False, reported=True, left=1):
        return Verdict(Outcome.OK, "yes: epoll reports them, KVM injects nothing")
    return Verdict(Outcome.FAIL, f"no: {_seen(seen)}", "this kernel's KVM_IRQFD is not the one irqrouter knows")


def _pending_at_assign(seen: probes.EventSeen) -> Verdict:
    if seen.injected:
        return Verdict(Outcome.OK, "injected, not drained" if seen.left else "injected and drained")
    return Verdict(Outcome.FAIL, _seen(seen), "this kernel's KVM_IRQFD is not the one irqrouter knows")


def _seen(seen: probes.EventSeen) -> str:
    return (
        f"{'injected' if seen.injected else 'not injected'}, "
        f"{'reported' if seen.reported else 'not reported'} by epoll, {seen.left} left"
    )


def _fdinfo(lines: frozenset[str]) -> Verdict:
    missing = sorted({"eventfd-id", "eventfd-semaphore"} - lines)
    if not missing:
        return Verdict(Outcome.OK, "eventfd-id and eventfd-semaphore")
    return Verdict(
        Outcome.FAIL,
        f"lacks {' and '.join(missing)}",
        "use a kernel 6.5 or later: eventfd-id came with 5.2, eventfd-semaphore with 6.5",
    )


def _foreign_vm(code: int) -> Verdict:
    if code == 0:
        return Verdict(Outcome.WARN, "obeys", "let no other process have the VM's descriptor")
    return Verdict(Outcome.OK, f"refuses: {os.strerror(code)}")


def _uevents() -> IrqrouterError | None:
    try:
        Uevents().close()
    except IrqrouterError as error:
        return error
    return None


def _uevents_verdict(refusal: IrqrouterError | None) -> Verdict:
    if refusal is None:
        return Verdict(Outcome.OK, "socket opens")
    return Verdict(Outcome.WARN, str(refusal), "allow AF_NETLINK where irqrouter runs; else look for devices in sysfs")


def _uvloop() -> str | None:
    try:
        importlib.import_module("uvloop")
    except ImportError:
        return None
    return importlib.metadata.version("uvloop")


def _uvloop_verdict(version: str | None) -> Verdict:
    if version is None:
        return Verdict(Outcome.WARN, "cannot be imported", "python -m pip install uvloop")
    return Verdict(Outcome.OK, version)


def _vfio(found: probes.Vfio) -> Verdict:
    there = [path for path, exists in (("/dev/vfio/vfio", found.container), ("/dev/iommu", found.iommufd)) if exists]
    if there:
        return Verdict(Outcome.OK, ", ".join(there))
    return Verdict(Outcome.WARN, "not there", "to hand devices to the guest: modprobe vfio-pci")


def _posted(found: probes.PostedInterrupts) -> Verdict:
    if found.vendor_module is None:
        return Verdict(Outcome.UNKNOWN, "neither kvm_intel nor kvm_amd is loaded")
    apicv = "avic" if found.vendor_module == "kvm_amd" else "enable_apicv"
    switches = {apicv: found.apicv, "enable_device_posted_irqs": found.device_posted_irqs}
    value = f"{found.vendor_module}: " + ", ".join(
        f"{name}={'?' if on is None else _yes(on)}" for name, on in switches.items()
    )
    if found.switched_off:
        return Verdict(Outcome.WARN, value, f"for posting, load {found.vendor_module} with these on")
    return Verdict(Outcome.UNKNOWN if found.apicv is None else Outcome.OK, value)


def _bug(bug: probes.KernelBug, meaning: str) -> Fact:
    fixes = ", ".join(release.describe() for release in bug.fixed)

    def judge(release: probes.KernelRelease) -> Verdict:
        if bug.fixed_in(release):
            return Verdict(Outcome.OK, f"fixed, by version (in {fixes})")
        value = f"not fixed, by version (fixed in {fixes}; distributions backport)"
        if not probes.vfio().iommu_groups:
            return Verdict(Outcome.OK, f"{value}; there is no IOMMU group, so no device to be hit")
        if probes.posted_interrupts().switched_off:
            return Verdict(Outcome.OK, f"{value}; posting is off")
        return Verdict(
            Outcome.WARN,
            value,
            f'look for "{bug.title}" in your kernel\'s changelog; without it upgrade, or load kvm_intel with '
            "enable_apicv=0 (kvm_amd: avic=0)",
        )

    return _fact(bug.cve, meaning, probes.kernel_release, judge)


_STYLES = {Outcome.OK: "green", Outcome.WARN: "yellow", Outcome.FAIL: "bold red", Outcome.UNKNOWN: "magenta"}


def _print(found: Diagnosis) -> None:
    from rich.console import Console
    from rich.text import Text

    # Colours only on a terminal; no wrapping anywhere, so that a line is a line to grep.
    console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
    for fact in found.facts:
        console.print(Text(f"{fact.outcome.value:<7}", _STYLES[fact.outcome]), Text(f"{fact.name}: {fact.value}"))
        console.print(Text(f"        {fact.meaning}", "dim"))
        if fact.remedy:
            console.print(Text(f"        -> {fact.remedy}"))
    console.print()
    if found.usable:
        console.print(Text("irqrouter can run here."))
    else:
        missing = [fact.name for fact in found.facts if fact.required and fact.outcome is not Outcome.OK]
        console.print(Text(f"irqrouter cannot run here: {', '.join(missing)}."))

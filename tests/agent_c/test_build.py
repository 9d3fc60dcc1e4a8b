"""The sources as their users build them: warnings, sanitizers, the example, what is installed."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from irqrouter.proof import c_agent
from irqrouter.proof.service import ServiceProcess
from tests.agent_c.fake import eventually

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
#: A report of a sanitizer ends the process with this.
REPORTED = 66
SANITIZERS = ["address,undefined", "thread"]
ENVIRONMENT = {
    **os.environ,
    "ASAN_OPTIONS": f"exitcode={REPORTED}:detect_leaks=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": f"exitcode={REPORTED}:halt_on_error=1",
}


@pytest.fixture(scope="module")
def service() -> Iterator[ServiceProcess]:
    with ServiceProcess() as service:
        service.start()
        eventually(lambda: Path(service.path).exists(), "a service")
        yield service
        service.check()


def _make(sanitizer: str = "", *arguments: str) -> Path:
    """Build everything, where a build that is there already is good enough; return the folder."""
    build = ROOT / "build" / f"agent-{sanitizer.replace(',', '-') or 'plain'}"
    flags = [f"BUILD={build}", f"SANITIZE={sanitizer}", f"CFLAGS={'-O1' if sanitizer else '-O2'} -g"]
    subprocess.run(["make", "-s", "-C", ROOT / "agent", *flags, *arguments], check=True, timeout=180)
    return build


def _personality(sanitizer: str) -> list[str]:
    # ThreadSanitizer's shadow has fixed addresses, which a randomized layout may take.
    return ["setarch", "-R"] if sanitizer == "thread" and shutil.which("setarch") else []


def _run(command: list[str | Path]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=ENVIRONMENT)


@pytest.mark.parametrize("sanitizer", ["", *SANITIZERS])
def test_the_example_sees_everything_arrive(service: ServiceProcess, sanitizer: str) -> None:
    build = _make(sanitizer)
    run = _run([*_personality(sanitizer), build / "example_vmm", "--socket", service.path, "--name", "example"])
    assert run.returncode == 0, run.stdout + run.stderr
    assert "everything arrived where it should" in run.stdout
    assert "reason 22h, index 5, requester 00:08.0" in run.stdout


def test_the_example_explains_itself() -> None:
    build = _make()
    assert _run([build / "example_vmm", "--help"]).stdout.startswith("usage: example_vmm")
    assert _run([build / "example_vmm", "--what"]).returncode == 1


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_threads_in_each_others_way_are_clean(service: ServiceProcess, tmp_path: Path, sanitizer: str) -> None:
    """Against the real service, which is stopped and killed meanwhile."""
    build = _make(sanitizer)
    hammer = tmp_path / "hammer"
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-g", "-O1", "-pthread", f"-fsanitize={sanitizer}"]
    subprocess.run(
        ["cc", *flags, "-I", ROOT / "agent", "-o", hammer, HERE / "hammer.c", build / "libirqrouter_agent.a"],
        check=True,
        timeout=60,
    )
    ending = threading.Event()
    troubling = threading.Thread(target=_trouble, args=(service, ending))
    troubling.start()
    try:
        run = _run([*_personality(sanitizer), hammer, service.path, "3"])
    finally:
        ending.set()
        troubling.join()
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith("fired")


def _trouble(service: ServiceProcess, ending: threading.Event) -> None:
    stopped = killed = False
    while not ending.wait(0.9):
        if not stopped:
            service.stop()
            ending.wait(0.3)
            service.go_on()
            stopped = True
        elif not killed:
            service.kill()
            service.start()
            killed = True


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.timeout(240)
def test_the_other_tests_are_clean(sanitizer: str) -> None:
    """All of the above, with a library that checks itself."""
    c_agent.build(sanitize=sanitizer)
    runtime = "libasan.so" if sanitizer.startswith("address") else "libtsan.so"
    preload = subprocess.check_output(["cc", f"-print-file-name={runtime}"], text=True).strip()
    modules = ["test_handshake", "test_vectors", "test_operations", "test_invalidations", "test_connection"]
    environment = {
        **ENVIRONMENT,
        "LD_PRELOAD": preload,
        "IRQROUTER_TEST_SANITIZE": sanitizer,
        "ASAN_OPTIONS": f"exitcode={REPORTED}:detect_leaks=0",  # the interpreter's own
        "PYTHONMALLOC": "malloc",
    }
    run = subprocess.run(
        [
            *_personality(sanitizer),
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
            *(HERE / f"{module}.py" for module in modules),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-6000:]
    assert "runtime error" not in run.stderr


def test_what_is_installed_can_be_used(tmp_path: Path) -> None:
    _make("", "install", "PREFIX=/usr", f"DESTDIR={tmp_path / 'root'}")
    root = tmp_path / "root" / "usr"
    found = {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}
    assert {
        "include/irqrouter_agent.h",
        "lib/libirqrouter_agent.a",
        "lib/libirqrouter_agent.so",
        "lib/libirqrouter_agent.so.1",
        "lib/pkgconfig/irqrouter-agent.pc",
    } <= found
    assert "-lirqrouter_agent" in (root / "lib/pkgconfig/irqrouter-agent.pc").read_text("ascii")
    symbols = subprocess.check_output(["nm", "-D", "--defined-only", root / "lib/libirqrouter_agent.so"], text=True)
    assert {line.split()[-1].split("_agent_")[0] for line in symbols.splitlines()} == {"irqrouter"}


def test_the_header_is_c_and_cxx(tmp_path: Path) -> None:
    for language, compiler in (("c", "cc"), ("c++", "c++")):
        if shutil.which(compiler) is None:
            continue
        source = tmp_path / "user"
        source.write_text('#include "irqrouter_agent.h"\nint main() { return 0; }\n', "ascii")
        subprocess.run(
            [compiler, "-x", language, "-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only",
             "-I", ROOT / "agent", source],
            check=True,
            timeout=60,
        )  # fmt: skip


def test_a_build_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    with pytest.raises(c_agent.BuildError):
        c_agent.build(tmp_path)
    monkeypatch.setenv("CC", "/no/such/compiler")
    with pytest.raises(c_agent.BuildError):
        c_agent.build(tmp_path)
    monkeypatch.setattr(c_agent, "SOURCES", tmp_path / "nowhere")
    with pytest.raises(c_agent.BuildError, match="checkout"):
        c_agent.build(tmp_path)

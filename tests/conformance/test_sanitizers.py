"""The suite again, on the agent in C, compiled with sanitizers: it must pass, and they must have nothing to say."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conformance import c_agent

_REPOSITORY = Path(__file__).parents[2]
_RUNTIMES = {"address,undefined": "libasan.so", "thread": "libtsan.so"}


def runtime(sanitize: str) -> Path:
    """The sanitizer's runtime, which must be loaded before everything else; skips where the compiler has none."""
    name = _RUNTIMES[sanitize]
    compiler = os.environ.get("CC") or "cc"
    found = subprocess.run([*compiler.split(), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = Path(found.stdout.strip())
    if not path.is_absolute():
        pytest.skip(f"{compiler} has no {name}")
    return path


def command(sanitize: str) -> list[str]:
    """Python; for the thread sanitizer, which knows few layouts of the address space, without random addresses."""
    if sanitize != "thread":
        return [sys.executable]
    setarch = shutil.which("setarch")
    if setarch is None or subprocess.run([setarch, "-R", "true"], capture_output=True, check=False).returncode:
        pytest.skip("setarch -R, which the thread sanitizer needs, does not work here")
    return [setarch, "-R", sys.executable]


@pytest.mark.skipif(not Path("/dev/kvm").exists(), reason="there is no /dev/kvm")
@pytest.mark.skipif(bool(c_agent.SANITIZE), reason="this is that run")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("sanitize", _RUNTIMES)
def test_sanitizers_have_nothing_to_say(sanitize: str, tmp_path: Path) -> None:
    log = tmp_path / "said"
    options = f"log_path={log}:halt_on_error=0"
    environment = {
        **os.environ,
        "CONFORMANCE_SANITIZE": sanitize,
        "LD_PRELOAD": str(runtime(sanitize)),
        "ASAN_OPTIONS": f"{options}:detect_leaks=0",
        "UBSAN_OPTIONS": f"{options}:print_stacktrace=1",
        "TSAN_OPTIONS": f"{options}:ignore_noninstrumented_modules=1",
    }
    run = subprocess.run(
        [
            *command(sanitize),
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            "agent-c",
            f"--basetemp={tmp_path / 'tests'}",
            "tests/conformance",
        ],
        cwd=_REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    said = "".join(path.read_text(errors="replace") for path in sorted(tmp_path.glob("said*")))
    assert not said, said[:10_000]
    assert run.returncode == 0, run.stdout[-10_000:] + run.stderr[-2_000:]
    assert " passed" in run.stdout
    assert " skipped" not in run.stdout

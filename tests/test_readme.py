"""The README's example is the file in examples/, and runs as printed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "move_an_interrupt.py"


def test_readme_prints_the_example_and_it_is_under_40_lines() -> None:
    (printed,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert printed == EXAMPLE.read_text()
    assert len(printed.splitlines()) < 40


@pytest.mark.skipif(not Path("/dev/kvm").exists(), reason="there is no /dev/kvm: the example runs on the real kernel")
def test_readme_example_delivers_by_the_kernel_then_catches_once(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", EXAMPLE],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines() == [
        "kernel delivered frozenset({65}) - the loop woke 0 times",
        "caught and delivered frozenset({82}) - the loop woke 1 times",
    ]

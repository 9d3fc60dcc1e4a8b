"""The format, the linter, the type checkers and the import direction are tests like any other."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["ruff", "format", "--check", "--quiet", "."], id="format"),
        pytest.param(["ruff", "check", "--quiet", "."], id="lint"),
        pytest.param(["mypy"], id="mypy"),
        pytest.param(["pyright"], id="pyright"),
        pytest.param(["lint-imports", "--no-cache"], id="imports"),
    ],
)
def test_check_whole_tree_is_clean(command: list[str]) -> None:
    run = subprocess.run([BIN / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr

"""The golden frames, read by a program in C, against the agent's own structs."""

import os
import shlex
import subprocess
from pathlib import Path

from tests.service import frames

SOURCE = Path(__file__).with_name("frames_check.c")


def test_golden_frames_are_what_the_agent_in_c_makes_of_its_structs(tmp_path: Path) -> None:
    program = tmp_path / "frames_check"
    compiler = shlex.split(os.environ.get("CC") or "cc")
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread"]
    built = subprocess.run([*compiler, *flags, "-o", program, SOURCE], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    run = subprocess.run([program, frames.PATH], capture_output=True, text=True, check=False)
    assert (run.stdout, run.returncode) == (f"{len(frames.FRAMES)} frames\n", 0)


def test_program_in_c_notices_a_frame_that_is_another(tmp_path: Path) -> None:
    program = tmp_path / "frames_check"
    subprocess.run(["cc", "-std=gnu11", "-pthread", "-o", program, SOURCE], check=True)
    changed = tmp_path / "frames.txt"
    text = frames.PATH.read_text("ascii")
    changed.write_text(text.replace("0a00000000000000", "0b00000000000000", 1))
    run = subprocess.run([program, changed], capture_output=True, text=True, check=False)
    assert (run.stdout.splitlines()[0], run.returncode) == ("batch: has another payload", 1)

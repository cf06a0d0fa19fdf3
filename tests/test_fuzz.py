"""A bounded run of the fuzzer: damaged files end in a right result or in one line. `make fuzz` runs it for as long as one likes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from helpers.launchers import fresh
from helpers.paths import ROOT


@pytest.mark.slow
def test_damaged_files_end_in_a_right_result_or_in_one_line() -> None:
    command = [sys.executable, "tests/fuzz.py", "--seed", "0", "--cases", "30", "--minutes", "60"]
    done = subprocess.run(command, cwd=ROOT, env=fresh(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert "30 cases" in done.stdout

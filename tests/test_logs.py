"""What a run says, and who says it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lst_scale.runs.logs import LOG, Logger


def test_lines_of_several_runs_say_on_the_console_whose_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Logger(tmp_path / "a", speaker="sweep-a") as first, Logger(tmp_path / "b", speaker="sweep-b") as second:
        first.say("sweep-a: 20 training rows")
        for logger in (first, second):
            logger.advance(10, "loss 0.5", say=True)
    assert capsys.readouterr().err.splitlines() == ["sweep-a: 20 training rows", "sweep-a: step 10: loss 0.5", "sweep-b: step 10: loss 0.5"]
    assert (tmp_path / "b" / LOG).read_text().endswith(" step 10: loss 0.5\n")  # the folder says it already


def test_a_run_alone_speaks_without_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Logger(tmp_path) as logger:
        logger.advance(10, "loss 0.5", say=True)
    assert capsys.readouterr().err == "step 10: loss 0.5\n"

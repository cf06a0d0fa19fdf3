"""Signals at random moments, to ranks without Slurm: whatever arrives whenever, the run that is resumed ends as if nothing had been."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import programs, ranks
from helpers.runs import assert_same_weights, final_weights, last_step, losses
from helpers.training import train

pytestmark = pytest.mark.slow
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP, signal.SIGKILL)


def test_random_signals_end_bit_identical(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Twelve starts; each gets three signals in its run or while it starts, of which all but the first may meet its last save."""
    changes = {"training__epochs": 36, "training__evaluate_every": 25, "training__save_every_steps": 5, "method__dropout": 0.1}
    train(write_recipe("whole", **changes), processes=2)
    expected, recipe = tmp_path / "runs" / "whole-kind-seed0", write_recipe("met", **changes)
    folder, draw = tmp_path / "runs" / "met-kind-seed0", random.Random(0)
    for number in range(12):
        started = ranks.start(programs.train, ["--recipe", recipe, "--resume"], processes=2)
        with ranks.ended(started):
            if number % 5:
                goal = last_step(folder) + draw.randint(1, 4)
                ranks.wait_for(lambda goal=goal: last_step(folder) >= goal, started)
                assert not (folder / "result.json").exists(), "the run ended before the last signal: make it longer"
            else:  # while it starts, later each time
                said = (0, 1, 100)[number // 5]
                ranks.wait_for(lambda said=said, first=started[0]: len(first.stderr) >= said, started)
            for _ in range(3):
                draw.choice(started).send_signal(draw.choice(SIGNALS))
            if number % 5 == 0:  # a rank may wait for one that never came: launchers end it
                ranks.wait_for(lambda started=started: any(rank.poll() is not None for rank in started))
                continue
            ends = [rank.wait() for rank in started]
            assert all(ends), ends
            assert not any("Traceback" in rank.stderr for rank in started), [rank.stderr[-2000:] for rank in started]
    assert ranks.run(programs.train, "--recipe", recipe, "--resume", processes=2).returncode == 0
    assert_same_weights(folder, final_weights(expected))
    assert losses(folder) == losses(expected)

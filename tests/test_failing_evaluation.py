"""An evaluation that fails loses nothing: what was trained is on disk before it begins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lst_scale.recipe.schema import load_recipe
from lst_scale.training import answering
from lst_scale.training.run import run


def weights_of(run_folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {str(path.relative_to(run_folder)): load_file(path) for path in sorted(run_folder.rglob("*.safetensors"))}


def numbers_of(run_folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "seconds")} for line in lines if line["kind"] != "plan"]


def test_a_run_whose_evaluation_fails_resumes_to_an_undisturbed_runs_weights_and_scores(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"method__dropout": 0.1, "training__micro_batch_size": 6, "training__save_every_steps": 3}
    (expected,) = run(load_recipe(str(write_recipe("whole", **changes))))
    victim = str(write_recipe("failed", **changes))
    score_rows, failing = answering.score_rows, {2, 4}  # the second evaluation and, after a resume, the test split's

    def fails(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) in failing:
            raise RuntimeError("a metric that can't be")
        return score_rows(*arguments)

    calls: list[int] = []
    monkeypatch.setattr(answering, "score_rows", fails)
    for _ in failing:
        with pytest.raises(RuntimeError, match="a metric that can't be"):
            run(load_recipe(victim), resume=True)
        folder = tmp_path / "runs" / "failed-kind-seed0"
        assert max((folder / "checkpoints").glob("step-*")).name == "step-00000008"
    (found,) = run(load_recipe(victim), resume=True)
    assert len(calls) == 5  # an evaluation that is over is not done again
    whole = tmp_path / "runs" / "whole-kind-seed0"
    assert weights_of(folder).keys() == weights_of(whole).keys()
    for name, weights in weights_of(whole).items():
        assert all(torch.equal(weights_of(folder)[name][key], weight) for key, weight in weights.items()), name
    assert numbers_of(folder) == numbers_of(whole)
    assert found["scores"] == expected["scores"] and found["best_step"] == expected["best_step"]

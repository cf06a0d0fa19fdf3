"""What a step of `llm.py` takes, and what else each method needs: `python benchmarks/llm.py FOLDER --times`."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from llm_recipes import recipe

TOGETHER = """
import sys
from lst_scale.recipe.schema import load_recipe
from lst_scale.training.run import run_together
run_together([load_recipe(path) for path in sys.argv[1:]], overwrite=True)
"""
AT_RANDOM = {"initialization": "random"}  # what a probe's pass costs before the first step is what the first epoch costs here
TIMED: dict[str, dict[str, Any]] = {
    "ladder": {"methods": ["lst"], "change": AT_RANDOM},
    "ladder, context of eight": {"methods": ["lst"], "context": "draw0", "change": AT_RANDOM},
    "tail of 15 blocks": {"methods": ["tail15"]},
    "tail of nine blocks": {"methods": ["tail9"]},
    "tail of six blocks": {"methods": ["tail6"]},
    "ladder and tail of 15 blocks": {"methods": ["lst", "tail15"], "change": AT_RANDOM},
    "tail of 15 blocks, every matrix": {"methods": ["tail15-wide"]},
    "ladder and tail of every matrix": {"methods": ["lst", "tail15-wide"], "change": AT_RANDOM},
    "lora": {"methods": ["lora"]},
    "lora, checkpointed": {"methods": ["lora"], "change": {"gradient_checkpointing": True}},
    "lora-wide": {"methods": ["lora-wide"]},
    "full": {"methods": ["full"]},
}


def times(folder: Path, model: str, titles: Sequence[str] = tuple(TIMED)) -> None:
    """Print what a step on film reviews takes in the first epoch and in the second, and what else each method needs; a process each."""
    rows = (folder / "few/train.jsonl").read_text().splitlines()[:160]
    (folder / "timed.jsonl").write_text("\n".join(rows) + "\n")
    print("| method | step, first epoch, ms | step, second epoch, ms | peak memory, GiB | on disk, MB |", "| --- " * 5 + "|", sep="\n")
    for title in titles:
        recipes = [_written(folder, model, title, method) for method in TIMED[title]["methods"]]
        shutil.rmtree(_taps(folder, title), ignore_errors=True)
        subprocess.run([sys.executable, "-c", TOGETHER, *map(str, recipes)], check=True, capture_output=True)
        runs = [folder / "runs" / f"{path.stem}-few-seed0" for path in recipes]
        # From one step of the last of those that share a pass to its next: all of them trained in between.
        rows = [row for row in (runs[-1] / "metrics.jsonl").read_text().splitlines() if '"kind": "train"' in row]
        ends = [json.loads(row)["time"] for row in rows]
        steps, half = [after - before for before, after in pairwise(ends)], len(ends) // 2
        first, second = (statistics.median(part) * 1000 for part in (steps[: half - 1], steps[half:]))
        results = [json.loads((run / "result.json").read_text()) for run in runs]
        peak, size = max(each["peak_memory_bytes"] for each in results) / 2**30, sum(each["saved_bytes"] for each in results) / 1e6
        print(f"| {title} | {first:.0f} | {second:.0f} | {peak:.2f} | {size:.1f} |", flush=True)


def _taps(folder: Path, title: str) -> Path:
    return folder / f"taps-{title.replace(', ', '-').replace(' ', '-')}"


def _written(folder: Path, model: str, title: str, method: str) -> Path:
    """Write the recipe of one method of a row of the table; return its file."""
    what = TIMED[title]
    tree = recipe(folder, model, "few", method, 1e-3, 0, what.get("context", "none")).model_dump(mode="json")
    tree["name"] = f"timed-{_taps(folder, title).name}-{method}"
    tree["task"] |= {split: str(folder / "timed.jsonl") for split in ("train", "validation")}
    tree["method"] |= what.get("change", {})
    tree["data"] |= {"max_eval_rows": 16}
    tree["cache"] |= {"folder": str(_taps(folder, title))}
    tree["logging"] |= {"log_every_steps": 1}
    path = folder / f"{tree['name']}.yaml"
    path.write_text(json.dumps(tree))  # JSON is YAML
    return path

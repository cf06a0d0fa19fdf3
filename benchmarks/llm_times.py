"""What a step of `llm.py` takes, and what else each method needs: `python benchmarks/llm.py FOLDER --times`."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from llm_recipes import recipe

TIMED: dict[str, dict[str, Any]] = {
    # At random: what a probe's pass costs before the first step is what the first epoch costs here.
    "ladder": {"method": "lst", "change": {"initialization": "random"}},
    "ladder, context of eight": {"method": "lst", "context": "draw0", "change": {"initialization": "random"}},
    "tail of 15 blocks": {"method": "tail15"},
    "tail of nine blocks": {"method": "tail9"},
    "tail of six blocks": {"method": "tail6"},
    "lora": {"method": "lora"},
    "lora, checkpointed": {"method": "lora", "change": {"gradient_checkpointing": True}},
    "lora-wide": {"method": "lora-wide"},
    "full": {"method": "full"},
}


def times(folder: Path, model: str) -> None:
    """Print what a step on film reviews takes in the first epoch and in the second, and what else each method needs; a process each."""
    rows = (folder / "few/train.jsonl").read_text().splitlines()[:160]
    (folder / "timed.jsonl").write_text("\n".join(rows) + "\n")
    print("| method | step, first epoch, ms | step, second epoch, ms | peak memory, GiB | on disk, MB |", "| --- " * 5 + "|", sep="\n")
    for title, what in TIMED.items():
        base = recipe(folder, model, "few", what["method"], 1e-3, 0, what.get("context", "none"))
        tree = base.model_dump(mode="json")
        tree["name"] = f"timed-{title.replace(', ', '-').replace(' ', '-')}"
        tree["task"] |= {split: str(folder / "timed.jsonl") for split in ("train", "validation")}
        tree["method"] |= what.get("change", {})
        tree["data"] |= {"max_eval_rows": 16}
        tree["cache"] |= {"folder": str(folder / f"taps-{tree['name']}")}
        tree["logging"] |= {"log_every_steps": 1}
        shutil.rmtree(tree["cache"]["folder"], ignore_errors=True)
        path = folder / f"{tree['name']}.yaml"
        path.write_text(json.dumps(tree))  # JSON is YAML
        subprocess.run([sys.executable, "-m", "lst_scale.train", str(path), "--overwrite"], check=True, capture_output=True)
        run = folder / "runs" / f"{tree['name']}-few-seed0"
        steps = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines() if '"kind": "train"' in row]
        half = len(steps) // 2
        first, second = (statistics.median(row["seconds"] for row in part) * 1000 for part in (steps[1:half], steps[half + 1 :]))
        result = json.loads((run / "result.json").read_text())
        peak, size = result["peak_memory_bytes"] / 2**30, result["saved_bytes"] / 1e6
        print(f"| {title} | {first:.0f} | {second:.0f} | {peak:.2f} | {size:.1f} |", flush=True)

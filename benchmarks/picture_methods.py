"""Six methods on easy-VQA in one table: score, trained share, memory of a step as planned and as measured, time of a step.

    python -m lst_scale.data.easy_vqa data/easy-vqa
    OMP_NUM_THREADS=1 python benchmarks/picture_methods.py /tmp/picture-methods --epochs 2
    lst-scale compare /tmp/picture-methods --plot docs/picture-methods.png

The recipe is easy-vqa but for the method, with the supplement's learning rate and sizes (Table 3) at a quarter of T5-base's width. Each run
is a process of its own, so its memory is its own: the highest resident set less that after loading. What is finished is not done again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from lst_scale.plan.footprint import footprint
from lst_scale.plan.report import setting_of
from lst_scale.recipe.schema import load_recipe
from lst_scale.side.count import shape_of

RATE = "optimizer.learning_rate=3e-4"
METHODS: dict[str, list[str]] = {
    "lst": [],
    "full": ["method.name=full", RATE],
    "adapters": ["method={name: adapters, bottleneck: 48, cross_attention: true, train_norms: false, start_small: false}", RATE],
    "lora": ["method={name: lora, rank: 38, alpha: 8, dropout: 0.1}", RATE],
    "bitfit": ["method.name=bitfit"],
    "prompt": ["method={name: prompt, num_vectors: 40, hidden: 200}"],
}


def main(folder: Path, epochs: int) -> None:
    lines = []
    for name, changes in METHODS.items():
        overrides = [*changes, f"name={name}", f"output_dir={folder}", f"training.epochs={epochs}"]
        recipe = load_recipe("easy-vqa", overrides)
        result = folder / recipe.run_name / "result.json"
        if not result.exists():
            subprocess.run([sys.executable, "-m", "lst_scale", "train", "easy-vqa", *overrides, "--resume"], check=True)
        found: dict[str, Any] = json.loads(result.read_text())
        shape = shape_of(recipe.backbone.checkpoint)
        assert shape is not None
        setting = setting_of(recipe, world_size=1, on_gpu=False, target=found["longest_target"])
        step = footprint(recipe, shape, setting).peak
        measured = found["peak_memory_bytes"] - max(found["peak_memory_bytes_after_loading_by_rank"])
        lines.append(
            f"| {name} | {found['scores']['score']:.1f} | {found['trainable_parameters']:,} | {found['trainable_share_percent']:.1f} | "
            f"{step / 1e6:.0f} | {measured / 1e6:.0f} | {found['seconds_per_step']:.2f} |"
        )
    print("| method | test, % | trained | share, % | a step, planned, MB | measured above loading, MB | s a step |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=4)
    asked = parser.parse_args()
    main(asked.folder, asked.epochs)

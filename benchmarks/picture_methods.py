"""Six methods on easy-VQA in one table: score, trained share, memory of a step as planned and as measured, time of a step.

    python -m lst_scale.data.easy_vqa data/easy-vqa
    OMP_NUM_THREADS=1 python benchmarks/picture_methods.py /tmp/picture-methods --epochs 2
    lst-scale compare /tmp/picture-methods --plot docs/picture-methods.png

The recipe is easy-vqa but for the method, with the supplement's sizes (Table 3) at a quarter of T5-base's width. Learning rates: the
supplement's and a higher one, for this backbone is small and the epochs are few; each method's is the one with the best validation score.
Each run is a process of its own, so its memory is its own: the highest resident set less that after loading. What is finished is not done
again. `--methods lst lora` runs some of them, `--set data.max_train_rows=1000` changes the recipe for all.
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
from lst_scale.recipe.schema import Recipe, load_recipe
from lst_scale.side.count import shape_of

METHODS: dict[str, tuple[list[str], tuple[float, ...]]] = {  # what it changes of the recipe, and learning rates
    "lst": ([], (3e-3,)),
    "full": (["method.name=full"], (3e-4, 1e-3)),
    "adapters": (
        ["method={name: adapters, bottleneck: 48, cross_attention: true, train_norms: false, start_small: false}"],
        (3e-4, 3e-3),
    ),
    "lora": (["method={name: lora, rank: 38, alpha: 8, dropout: 0.1}"], (3e-4, 3e-3)),
    "bitfit": (["method.name=bitfit"], (3e-3, 3e-2)),
    "prompt": (["method={name: prompt, num_vectors: 40, hidden: 200}"], (3e-3, 1e-1)),
}


def trained(folder: Path, name: str, rate: float, options: argparse.Namespace) -> tuple[Recipe, dict[str, Any]]:
    """Train with one learning rate, unless that is done, and return the recipe and its result."""
    overrides = [*METHODS[name][0], f"optimizer.learning_rate={rate:g}", f"name={name}-{rate:g}"]
    overrides += [f"output_dir={folder}", f"training.epochs={options.epochs}", *options.set]
    recipe = load_recipe("easy-vqa", overrides)
    path = folder / recipe.run_name / "result.json"
    if not path.exists():
        subprocess.run([sys.executable, "-m", "lst_scale", "train", "easy-vqa", *overrides, "--resume"], check=True)
    result: dict[str, Any] = json.loads(path.read_text())
    return recipe, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="overrides for all")
    options = parser.parse_args()
    lines = []
    for name in options.methods:
        tried = [trained(options.folder, name, rate, options) for rate in METHODS[name][1]]
        recipe, found = max(tried, key=lambda one: one[1]["validation_score"])
        shape = shape_of(recipe.backbone.checkpoint)
        assert shape is not None
        setting = setting_of(recipe, world_size=1, on_gpu=False, target=found["longest_target"])
        step = footprint(recipe, shape, setting).peak
        measured = found["peak_memory_bytes"] - max(found["peak_memory_bytes_after_loading_by_rank"])
        others = ", ".join(f"{one.optimizer.learning_rate:g}: {result['validation_score']:.1f}" for one, result in tried)
        lines.append(
            f"| {name} | {found['scores']['score']:.1f} | {others} | {found['trainable_parameters']:,} | "
            f"{found['trainable_share_percent']:.1f} | {step / 1e6:.0f} | {measured / 1e6:.0f} | {found['seconds_per_step']:.2f} |"
        )
    print(
        "| method | test, % | validation by learning rate | trained | share, % | step planned, MB | measured above loading, MB | s a step |"
    )
    print("| --- " * 8 + "|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

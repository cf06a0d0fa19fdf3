"""What several side networks on one backbone pass are worth together: the study's tasks, eight seeds, ensembles of two, four and eight.

    (packages: see benchmarks/methods.py)
    OMP_NUM_THREADS=1 python benchmarks/ensemble.py /tmp/study --packages /tmp/packages

Each task's seeds are the members of one run: one pass of the backbone over each batch, taps from disk from the second epoch on. The
learning rate is the study's best. `alone` is the mean of the eight, its deviation theirs; `of K` the mean over the disjoint ensembles of K.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import yaml
from methods import TASKS, prepare, recipe

from lst_scale.inference.ensemble import score_together
from lst_scale.recipe.schema import Recipe, parse_recipe
from lst_scale.training.run import run

RATES = {"lst-norm": {"kind": 3e-3, "speech": 3e-3, "tweets": 1e-3}, "lst": {"kind": 1e-3, "speech": 1e-3, "tweets": 1e-3}}
SIZES = (2, 4, 8)


def members(folder: Path, task: str, method: str, epochs: int, seeds: int) -> Recipe:
    many = f"{method}-{epochs}"
    one = recipe(folder, task, method, RATES[method][task], 0, epochs)
    tree = one.model_dump(mode="json") | {"name": many, "output_dir": str(folder / "ensembles")}
    tree["data"]["shuffle_seed"] = 0
    tree["members"] = [f"seed={seed}" for seed in range(seeds)]
    return parse_recipe(yaml.safe_dump(tree), many)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--packages", type=Path, help="where they were downloaded to; kind needs none")
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--methods", nargs="+", default=["lst-norm"], choices=list(RATES))
    parser.add_argument("--tasks", nargs="+", default=["kind", "speech", "tweets"], choices=list(TASKS))
    options = parser.parse_args()
    folder = options.folder.resolve()
    prepare(folder, options.packages, options.rows, options.tasks)
    sizes = [size for size in SIZES if size <= options.seeds]
    print("| method, epochs | task | alone | " + " | ".join(f"of {size}" for size in sizes) + " |")
    print("| --- | --- | --- |" + " --- |" * len(sizes))
    for method in options.methods:
        for task in options.tasks:
            many = members(folder, task, method, options.epochs, options.seeds)
            runs = [folder / "ensembles" / f"{many.name}-{task}-seed{seed}" for seed in range(options.seeds)]
            if not all((path / "result.json").exists() for path in runs):
                run(many, overwrite=True)
            alone = [json.loads((path / "result.json").read_text())["scores"]["score"] for path in runs]
            cells = [f"{statistics.mean(alone):.1f} ± {statistics.stdev(alone):.1f}"]
            for size in sizes:
                found = []
                for first in range(0, options.seeds - size + 1, size):
                    _, result = score_together(runs[first : first + size], f"{many.name}-of-{size}-{first}", overwrite=True)
                    found.append(result["scores"]["score"])
                cells.append(f"{statistics.mean(found):.1f}" + (f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""))
            print(f"| {method}, {options.epochs} | {task} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

"""A sweep of 32 side networks on the embedded backbone in one process, on cached taps, against runs of their own.

    python benchmarks/sweep.py /tmp/sweep

Four learning rates, two reduction factors and four seeds on the quickstart's task. The sweep is one recipe with `members:`, written to
FOLDER/sweep.yaml; its table is that of `lst-scale compare FOLDER/together`. Four of the members, one a learning rate, also run alone,
plainly live, one process each; eight times their time stands for 32 such runs. Starting a process is counted in both. On a machine that is
shared, processor time is the fairer clock. `--grid` takes other members, `--alone` numbers of others to run alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import yaml

from lst_scale.recipe.grid import expand
from lst_scale.recipe.schema import load_recipe, to_yaml
from lst_scale.runs.compare import compare, find_results

GRID = ["optimizer.learning_rate=3e-4,1e-3,3e-3,1e-2", "method.reduction_factor=4,8", "seed=0,1,2,3"]
ALONE = [0, 13, 18, 31]  # one a learning rate, one a seed, two of each reduction factor


def overrides(options: argparse.Namespace, output: str) -> list[str]:
    return [
        "name=sweep",
        f"output_dir={options.folder / output}",
        "data.shuffle_seed=0",  # one order of batches for all seeds
        f"data.max_train_rows={options.rows}",
        f"data.max_eval_rows={options.eval_rows}",
        f"training.epochs={options.epochs}",
        "training.global_batch_size=8",
        "training.evaluate_every=1000000",  # at the end alone
        "training.keep_checkpoints=1",
        "evaluation.method=likelihood",  # generation needs the backbone, likelihood reads its taps
    ]


def run(recipe: Path) -> tuple[float, float]:
    """Train a recipe in a process of its own; return seconds of wall clock and of processor time."""
    before, start = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-m", "lst_scale.train", "--recipe", str(recipe), "--overwrite"], check=True)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=1500, help="training rows")
    parser.add_argument("--eval-rows", type=int, default=256, help="rows of validation and of test, each")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--grid", nargs="+", default=GRID, metavar="key=one,two", help="the members are all combinations")
    parser.add_argument("--alone", nargs="+", type=int, default=ALONE, metavar="N", help="numbers of the members that also run alone")
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    options.folder.mkdir(parents=True, exist_ok=True)
    members = expand(options.grid)
    if not all(0 <= number < len(members) for number in options.alone):
        parser.error(f"--alone: there are members 0 to {len(members) - 1}")

    cached = [*overrides(options, "together"), "cache.enabled=true", f"cache.folder={options.folder / 'taps'}"]
    together = options.folder / "sweep.yaml"
    tree = load_recipe("quickstart", cached).model_dump(mode="json") | {"members": [" ".join(member) for member in members]}
    together.write_text(yaml.safe_dump(tree, sort_keys=False))
    times = {f"{len(members)} together, cached": run(together)}

    alone = []
    for number in options.alone:
        path = options.folder / f"alone-{number}.yaml"
        path.write_text(to_yaml(load_recipe("quickstart", [*overrides(options, "alone"), f"name=alone-{number}", *members[number]])))
        alone.append(run(path))
    wall, processor = (sum(clock) for clock in zip(*alone, strict=True))
    many = len(members) / len(alone)
    times[f"{len(alone)} alone, live"] = wall, processor
    times[f"{len(members)} alone, live, extrapolated"] = wall * many, processor * many

    print(compare(find_results([options.folder / "together"]), "markdown"))
    print(compare(find_results([options.folder / "alone"]), "markdown"))
    for name, (seconds, used) in times.items():
        print(f"{name}: {seconds:.0f} s, {used:.0f} s of processor time")
    print(f"together over alone: {times[next(iter(times))][0] / (wall * many):.2f}, {times[next(iter(times))][1] / (processor * many):.2f}")
    (options.folder / "times.json").write_text(json.dumps(times, indent=2) + "\n")


if __name__ == "__main__":
    main()

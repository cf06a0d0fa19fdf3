"""What a run answered on easy-VQA, by kind of question, and a picture of twelve pictures with questions and answers.

    python benchmarks/pictures.py predictions.jsonl answers.png
    python benchmarks/pictures.py blank data/easy-vqa data/easy-vqa-blank

`predictions.jsonl` is what `lst-scale predict RUN data/easy-vqa/test.jsonl` wrote. `blank` writes the same rows, all with one white
picture: what a run reaches on those it reaches by the questions alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lst_scale.data.pictures import open_picture
from lst_scale.runs.pictures import check_picture, figure, save

RIGHT, WRONG = "#009E73", "#D55E00"
SHOWN = 12


def by_kind(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[float, int]]:
    """Return the share of right answers in percent, and how many questions there are, of each kind and of all."""
    found = {"all": list(rows)}
    for row in rows:
        found.setdefault(row["kind"], []).append(row)
    return {kind: (100 * sum(map(is_right, some)) / len(some), len(some)) for kind, some in found.items()}


def is_right(row: dict[str, Any]) -> bool:
    return bool(row["prediction"] == row["answer"])


def chosen(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a dozen rows of different pictures, kinds by turns, one of them wrong where there is one."""
    kinds = sorted({row["kind"] for row in rows})
    some: list[dict[str, Any]] = []
    wrong = next((row for row in rows if not is_right(row)), None)
    seen = set[str]()
    for number in range(SHOWN if wrong is None else SHOWN - 1):
        wanted = (row for row in rows if row["kind"] == kinds[number % len(kinds)] and row["image"] not in seen and is_right(row))
        row = next(wanted, None)
        if row is not None:
            some.append(row)
            seen.add(row["image"])
    return some if wrong is None else [*some, wrong]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw pictures in three rows of four, each with its question and the answer it got: green is right, orange is wrong."""
    drawn = figure(10, 8)
    for place, row in zip(drawn.subplots(3, 4).flat, rows, strict=False):
        place.imshow(open_picture(row["image"]))
        place.set_axis_off()
        said = row["prediction"] if is_right(row) else f"{row['prediction']} (it is {row['answer']})"
        place.set_title(f"{_two_lines(row['question'])}\n{said}", fontsize=9, color=RIGHT if is_right(row) else WRONG)
    save(drawn, path)


def _two_lines(text: str) -> str:
    words = text.split()
    middle = (len(words) + 1) // 2
    return text if len(text) < 28 else f"{' '.join(words[:middle])}\n{' '.join(words[middle:])}"


def blank(folder: Path, other: Path) -> None:
    """Write the rows of a folder's files into another one, each with the same white picture."""
    from PIL import Image

    other.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), "white").save(other / "white.png")
    for file in folder.glob("*.jsonl"):
        rows = [json.loads(line) | {"image": "white.png"} for line in file.read_text().splitlines()]
        (other / file.name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(predictions: Path, picture: Path) -> None:
    check_picture(picture)
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    for kind, (share, count) in by_kind(rows).items():
        print(f"{kind:8} {share:6.2f} % of {count:,} questions")
    draw(chosen(rows), picture)
    print(f"twelve pictures with questions and answers: {picture}")


if __name__ == "__main__":
    if sys.argv[1] == "blank":
        blank(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main(Path(sys.argv[1]), Path(sys.argv[2]))

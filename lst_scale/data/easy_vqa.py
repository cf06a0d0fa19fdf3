"""easy-VQA (Victor Zhou 2019, MIT; PyPI `easy-vqa`) as three files of one's own: questions about coloured shapes, an answer, a picture.

    python -m lst_scale.data.easy_vqa FOLDER

Writes train.jsonl (pictures 0 to 3599), validation.jsonl (3600 to 3999) and test.jsonl, with fields question, answer, image, and
kind: yes/no, shape or colour.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lst_scale.system.extras import require

FIRST_HELD_OUT = 3600  # of the training pictures, those from here on validate
SHAPES = ("circle", "rectangle", "triangle")


def kind_of(answer: str) -> str:
    """Return what kind of question has such an answer."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in SHAPES else "colour"


def rows_of(questions: tuple[list[str], list[str], list[int]], pictures: dict[int, str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each row by the number of its picture."""
    for question, answer, number in zip(*questions, strict=True):
        yield number, {"question": question, "answer": answer, "kind": kind_of(answer), "image": pictures[number]}


def write(folder: Path) -> dict[str, int]:
    """Write the three files; return how many rows each has."""
    require("easy_vqa", "vision", asked_by="easy-VQA")
    import easy_vqa

    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for number, row in rows_of(easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()):
        splits["train" if number < FIRST_HELD_OUT else "validation"].append(row)
    splits["test"] = [row for _, row in rows_of(easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths())]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: len(rows) for name, rows in splits.items()}


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))

"""Made-up files of the release's CLIP-T5 tasks: questions, statements and captions on images of which features alone exist."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

GRID, CHANNELS = 3, 8  # of features, in place of 7 and 2048
FEATURES = "clip_features/data_clip_RN101_att"
COLOURS = ("red", "green", "blue")


def make_datasets(folder: Path, questions: int = 12) -> Path:
    """Write a small `datasets` folder with all four tasks; return it."""
    _vqa(folder, questions)
    _gqa(folder, questions)
    _nlvr(folder, questions)
    _captions(folder, questions)
    return folder


def make_features(folder: Path, names: Iterable[str], shape: tuple[int, ...] = (GRID**2, CHANNELS)) -> None:
    """Write an image's features into NAME.h5 for each name; equal names have equal features."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        values = np.random.default_rng(sum(map(ord, name))).standard_normal(shape, np.float32)
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file[f"{name}/features"] = values


def write(path: Path, tree: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))


def _vqa(folder: Path, count: int) -> None:
    people = []
    for split, place in (("train", "train2014"), ("val", "val2014"), ("test", "val2014")):
        rows = []
        for number in range(count):
            colour = COLOURS[number % 3]
            label = {colour: 1.0, "dark " + colour: 0.3} if number % 4 else {}
            question = 1000 * len(people) + number
            rows.append(
                {"question_id": question, "img_id": f"COCO_{place}_{number % 5}", "sent": f"what color is it {number}?", "label": label}
            )
            people.append({"question_id": question, "question_type": "what", "answer_type": "other"})
            people[-1]["answers"] = [{"answer": colour if each < 7 else "a colour", "answer_id": each} for each in range(10)]
        write(folder / f"vqa/karpathy_{split}.json", rows)
    write(folder / "vqa/v2_mscoco_train2014_annotations.json", {"annotations": people[:count]})
    write(folder / "vqa/v2_mscoco_val2014_annotations.json", {"annotations": people[count:]})
    make_features(folder / f"COCO/{FEATURES}", [f"COCO_{place}_{number}" for place in ("train2014", "val2014") for number in range(5)])


def _gqa(folder: Path, count: int) -> None:
    for split, images in (("train", "VG"), ("valid", "VG"), ("testdev", "GQA")):
        rows = [
            {"question_id": str(number), "img_id": f"{split}{number % 4}", "sent": f"is it {COLOURS[number % 3]}?", "label": {"yes": 1.0}}
            for number in range(count)
        ]
        write(folder / f"GQA/{split}.json", rows)
        make_features(folder / f"{images}/{FEATURES}", [f"{split}{number}" for number in range(4)])


def _nlvr(folder: Path, count: int) -> None:
    for split in ("train", "valid", "test"):
        rows = []
        for number in range(count):
            images = {f"img{side}": f"{split}-{number % 3}-img{side}" for side in (0, 1)}
            identifier = f"{split}-{number // 2}-{number % 2}-0"
            rows.append(
                {"uid": f"{split}-{number}", "identifier": identifier, "sent": f"both are {COLOURS[number % 3]}.", "label": number % 2}
                | images
            )
        write(folder / f"nlvr/{split}.json", rows)
        make_features(folder / f"nlvr/{FEATURES}", [f"{split}-{number}-img{side}" for number in range(3) for side in (0, 1)])


def _captions(folder: Path, count: int) -> None:
    images = []
    for number, split in enumerate(("train", "restval", "val", "test") * (count // 4)):
        name = f"COCO_{'train' if split == 'train' else 'val'}2014_{number % 5}"
        said = [{"raw": f" A {COLOURS[number % 3]} thing number {each}."} for each in range(5)]
        images.append({"filename": f"{name}.jpg", "split": split, "sentences": said})
    write(folder / "COCO/dataset_coco.json", {"images": images})

"""Finished runs of every kind of answer, for what answers by them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.models import make_t5
from helpers.recipes import recipe_writer
from lst_scale.data.files import load_records
from lst_scale.recipe.schema import load_recipe
from lst_scale.training.run import run

VALIDATION = "embedded:wordnet/validation.jsonl"


def finished_runs(folder: Path, only: Sequence[str] = ("class", "number", "mean", "text", "lora")) -> dict[str, Path]:
    """Make runs on a small T5: two labels that the recipe does not list, numbers as text and as means, free text, another method."""
    make = recipe_writer(folder, make_t5(folder / "t5", dropout_rate=0.0))
    words = list(load_records(VALIDATION, "validation"))[:24]
    splits = {
        "class": [{"kind": ("food", "artifact")[number % 2]} for number in range(24)],
        "number": [{"kind": number % 5 / 2} for number in range(24)],
        "text": [{"kind": "a long answer of some words" if number < 12 else "short"} for number in range(24)],
    }
    runs = {}
    for name, targets in splits.items():
        for split, part in (("train", slice(0, 12)), ("validation", slice(12, 24))):
            lines = [json.dumps(word | target) + "\n" for word, target in zip(words[part], targets[part], strict=True)]
            (folder / f"{name}-{split}.jsonl").write_text("".join(lines))
    short: dict[str, Any] = {"training__max_steps": 3, "training__evaluate_every": 3, "method__side_layers": [2]}
    for name, kind, changes in (
        ("class", "classification", {"evaluation__method": "likelihood"}),
        ("number", "regression", {}),
        ("mean", "regression", {"evaluation__method": "expectation"}),
        ("text", "text", {"evaluation__num_beams": 2}),
        ("lora", "classification", {"method": {"name": "lora"}}),
    ):
        if name not in only:
            continue
        task = {"name": "kind", "kind": kind, "source": ["word", "definition"], "target": "kind"}
        data = {"lora": "class", "mean": "number"}.get(name, name)
        task |= {split: str(folder / f"{data}-{split}.jsonl") for split in ("train", "validation")}
        options = (short if name != "lora" else {key: value for key, value in short.items() if "method" not in key}) | changes
        run(load_recipe(str(make(name, task=task, **options))))
        runs[name] = folder / "runs" / f"{name}-kind-seed0"
    return runs

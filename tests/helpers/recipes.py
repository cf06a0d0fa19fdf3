"""Small recipes on the embedded data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml


def recipe_writer(folder: Path, checkpoint: Path) -> Callable[..., Path]:
    """Return a function that writes a small recipe into `folder`: 22 training rows, batches of 6, 8 steps. `a__b=value` sets a.b."""

    def write(name: str, **changes: Any) -> Path:
        tree: dict[str, Any] = {
            "name": name,
            "task": {
                "name": "kind",
                "kind": "classification",
                "train": "embedded:wordnet/train.jsonl",
                "validation": "embedded:wordnet/validation.jsonl",
                "source": ["word", "definition"],
                "target": "kind",
                "labels": ["act", "artifact", "attribute", "cognition", "communication", "food", "person", "state"],
            },
            "output_dir": str(folder / "runs"),
            "backbone": {"checkpoint": str(checkpoint), "precision": "fp32"},
            "method": {"name": "lst", "reduction_factor": 4, "side_layers": [0, 2]},
            "optimizer": {"learning_rate": 1e-2, "warmup": 2},
            "training": {"epochs": 2, "global_batch_size": 6, "micro_batch_size": 2, "evaluate_every": 4},
            "data": {"max_source_length": 24, "max_train_rows": 22, "max_eval_rows": 7},
            "logging": {"log_every_steps": 1},
        }
        for dotted, value in changes.items():
            *parents, last = dotted.split("__")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write

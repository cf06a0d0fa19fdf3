"""What `llm.py` tries: designs beside the model, rivals inside it, learning rates, contexts; each as a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm_tasks import ANSWERED, ROWS, TASKS

from lst_scale.recipe.schema import Recipe

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
EVERY_MATRIX = {"rank": 32, "alpha": 64, "targets": ("q", "k", "v", "o", "gate_proj", "up_proj", "down_proj")}
WIDE_RATES = (1e-4, 3e-4, 1e-3, 3e-3)


def _tail(block: int, updates: dict[str, Any]) -> dict[str, Any]:
    """Return the method that runs the blocks after `block` again, with updates as LoRA's."""
    own = {"side_layers": (block,), "initialization": "random", "recompute": False, "dropout": 0.1, "tail": updates}
    return {"name": "lst", "design": "tail"} | own


# With their rates. They read raw states, whose few large channels int8 would blur: hence bf16.
TAILS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    **{f"tail{29 - block}": (_tail(block, {"rank": 8, "alpha": 16, "targets": ("q", "v")}), (1e-3, 3e-3, 1e-2)) for block in (14, 20, 23)},
    "tail15-wide": (_tail(14, EVERY_MATRIX), WIDE_RATES),
}
# A ladder that was trained on plain text first, once for all tasks.
PRETRAINED, PLAIN_RATE = "pretrained", 1e-3
# From the best linear reading of few rows large steps lead away; a random start needs them.
LADDER_RATES = {"probe": (1e-5, 3e-5, 1e-4, 3e-4), "random": (2.5e-4, 5e-4, 1e-3, 2e-3)}
CONTEXTS: dict[str, dict[str, int] | None] = {
    "none": None,
    **{f"draw{draw}": {"examples": 8, "draw": draw} for draw in SEEDS},
}
RIVALS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "lora": ({"name": "lora", "rank": 8, "alpha": 16, "targets": ("q", "v")}, (3e-4, 1e-3, 3e-3, 1e-2)),
    "lora-wide": ({"name": "lora"} | EVERY_MATRIX, WIDE_RATES),
    "full": ({"name": "full", "precision": "fp32"}, (1e-5, 3e-5, 1e-4, 3e-4)),
}
PROBE: dict[str, Any] = {"name": "probe", "layers": LADDER["side_layers"]}
BATCH = 4  # rows a step: with 16, two epochs of 500 rows are 64 steps, in which no method learned what there was to learn
EPOCHS, MANY = 2, 8  # of every method; of a ladder in less than the time that LoRA takes for those


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
    tree: dict[str, Any] = {
        "name": f"{method}-{context}-{rate:g}" + (f"-{epochs}-epochs" if epochs != EPOCHS else ""),
        "task": {"name": task, "kind": "classification", "source": ("text",), "target": "target"} | files | own,
        "seed": seed,
        "output_dir": str(folder / "runs"),
        "backbone": {"checkpoint": model, "precision": "fp32", "context": CONTEXTS[context]},
        "method": PROBE if method == "probe" else _ladder(method, own) or (TAILS | RIVALS)[method][0],
        "data": {"max_source_length": 128, "shuffle_seed": seed},
        "cache": {"enabled": method not in RIVALS, "dtype": "bf16", "folder": str(folder / "taps")},
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
    if method == PRETRAINED:
        before = recipe(folder, model, "plain", "lst", PLAIN_RATE, 0)
        tree["training"] |= {"start_from": str(Path(before.output_dir) / before.run_name)}
    if task == "plain":
        tree["data"] |= {"max_target_length": 64}
        tree["evaluation"] |= {"max_new_tokens": 8}
    return Recipe.model_validate(tree)


def _ladder(method: str, task: dict[str, Any]) -> dict[str, Any] | None:
    if method == PRETRAINED:
        return LADDER | {"initialization": "random"}
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


def validated(each: Recipe) -> float:
    """Return a run's validation score."""
    score: float = (found(each) or {}).get("validation_score", float("-inf"))
    return score

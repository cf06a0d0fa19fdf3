"""The README.md of what a run trained: filled from its recipe and result, with code that runs as it is printed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from lst_scale.backbone.taps import Backbone, BackboneIdentity
from lst_scale.data.tasks import GLUE
from lst_scale.recipe.schema import LoraRecipe, LstRecipe, PromptRecipe, Recipe
from lst_scale.side import card

MOST_LABELS = 60  # that are listed


def card_of_run(recipe: Recipe, result: dict[str, Any], backbone: Backbone, folder: Path, inner: str) -> str:
    """Return the card of a finished run.

    Args:
        folder: the run's.
        inner: below it, where what was trained is.
    """
    identity = backbone.identity
    method = recipe.method
    what = f"Side network ({method.design})" if isinstance(method, LstRecipe) else f"Weights trained by {method.name}"
    lines = [
        card.head(identity.checkpoint),
        f"# {what} for {recipe.task_name}, on {identity.checkpoint}",
        "",
        *_facts(recipe, result),
        "",
        "From a text to an answer, as this run was scored:",
        "",
    ]
    by_hand = not backbone.spec.one_stack and recipe.backbone.context is None  # else rows are put together in more than these few lines
    code = _loading(recipe, identity, folder / inner) if by_hand else []
    if code:
        answer = _likeliest(recipe, result) if recipe.evaluation.method == "likelihood" else _generated(recipe, result)
        source = recipe.data.max_source_length
        lines += card.code_block(code + card.prediction_code(identity.checkpoint, identity.revision, _text(recipe), answer, source))
        lines += ["", "Or for a file of rows, at the command line:", ""]
    row = json.dumps(dict.fromkeys(_columns(recipe), "..."), ensure_ascii=False)
    predict = f"lst-scale predict {shlex.quote(str(folder.resolve()))} rows.jsonl --output answers.jsonl"
    lines += card.code_block([f"echo {shlex.quote(row)} > rows.jsonl", predict], "sh")
    return "\n".join(lines + card.backbone_lines(identity)) + "\n"


def _facts(recipe: Recipe, result: dict[str, Any]) -> list[str]:
    task, scores = recipe.task, result["scores"]
    kind = "a task of GLUE" if isinstance(task, str) else task.kind
    labels = result.get("labels")
    rows = {
        "task": f"{recipe.task_name}, {kind}",
        "text": f"`{_template(recipe)}`".replace("\n", "\\n").replace("|", "\\|"),
        "data": f"the paper's splits of {task}" if isinstance(task, str) else _files(recipe),
        "labels": ", ".join(labels[:MOST_LABELS]) + (f" and {len(labels) - MOST_LABELS} more" if len(labels) > MOST_LABELS else "")
        if labels
        else "none: free text or numbers",
        "scores": f"{result['split']}: " + ", ".join(f"{name} {value:.2f}" for name, value in scores.items()),
        "majority class": ", ".join(f"{name} {value:.2f}" for name, value in result["majority"].items()),
        "answers": f"by {recipe.evaluation.method}",
        "training": f"{result['steps']} steps of {recipe.training.global_batch_size} rows, best after {result['best_step']}; "
        f"learning rate {recipe.optimizer.learning_rate:g}, seed {recipe.seed}",
        "started from": recipe.training.start_from or "the backbone",
        "longest source, target": f"{recipe.data.max_source_length}, {result['longest_target']} tokens",
        "trained weights": f"{result['trainable_parameters']:,} ({result['trainable_share_percent']} % of the backbone's)",
        "versions": ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
    }
    return ["| | |", "| --- | --- |", *(f"| {name} | {' '.join(str(value).split())} |" for name, value in rows.items())]


def _files(recipe: Recipe) -> str:
    assert not isinstance(recipe.task, str)
    named = {"train": recipe.task.train, "validation": recipe.task.validation, "test": recipe.task.test}
    return ", ".join(f"{split} {Path(name).name}" for split, name in named.items() if name is not None)


def _template(recipe: Recipe) -> str:
    """Return the source text with {column}s, whichever way the recipe says it."""
    task = recipe.task
    if not isinstance(task, str) and task.template is not None:
        return str(task.template)
    prefix = task if isinstance(task, str) else task.prefix
    pairs = GLUE[task].fields if isinstance(task, str) else [(f"{field}:", field) for field in task.source]
    written = " ".join([*([prefix] if prefix else []), *(f"{name}\0{column}\0" for name, column in pairs)])
    pieces = written.replace("{", "{{").replace("}", "}}").split("\0")
    return "".join(f" {{{piece}}}" if number % 2 else piece for number, piece in enumerate(pieces))


def _columns(recipe: Recipe) -> list[str]:
    task = recipe.task
    return [column for _, column in GLUE[task].fields] if isinstance(task, str) else list(task.source)


def _text(recipe: Recipe) -> str:
    return "\n".join(
        [
            "from lst_scale.recipe.template import fill",
            "",
            f"row = {dict.fromkeys(_columns(recipe), '...')!r}",
            f"text = fill({_template(recipe)!r}, row)",
        ]
    )


def _loading(recipe: Recipe, identity: BackboneIdentity, folder: Path) -> list[str]:
    """Return lines that make `model`; none where only `lst-scale predict` can."""
    if isinstance(recipe.method, LstRecipe):
        return card.loading_code(folder, identity)
    if isinstance(recipe.method, PromptRecipe) or (isinstance(recipe.method, LoraRecipe) and not recipe.method.bitfit):
        revision = "" if identity.revision is None else f", revision={identity.revision!r}"
        return [
            "from lst_scale.system.assets import resolve",
            "from peft import PeftModel",
            "from transformers import AutoModelForSeq2SeqLM",
            "",
            f"backbone = AutoModelForSeq2SeqLM.from_pretrained(resolve({identity.checkpoint!r}){revision})",
            f"model = PeftModel.from_pretrained(backbone, {str(folder.resolve())!r}).eval()",
        ]
    return []


def _generated(recipe: Recipe, result: dict[str, Any]) -> list[str]:
    longest = recipe.evaluation.max_new_tokens or result["longest_target"]
    return card.generation(longest, recipe.evaluation.num_beams, _prefix(recipe))


def _likeliest(recipe: Recipe, result: dict[str, Any]) -> list[str]:
    written = f"{_prefix(recipe)} " if _prefix(recipe) else ""
    return [
        "",
        "",
        "def cost(label):  # its negative log-likelihood",
        f'    target = tokenizer({written!r} + label, return_tensors="pt").input_ids.to(model.device)',
        "    return model(input_ids=ids, attention_mask=mask, labels=target).loss.item() * target.shape[1]",
        "",
        "",
        f"print(min({list(result['labels'])!r}, key=cost))",
    ]


def _prefix(recipe: Recipe) -> str:
    return "" if isinstance(recipe.task, str) else recipe.task.target_prefix or ""

"""The README.md of what a run trained: filled from its recipe and result, with code that runs as it is printed."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lst_scale.backbone.taps import Backbone, BackboneIdentity
from lst_scale.data.tasks import GLUE
from lst_scale.recipe.method import LoraRecipe, LstRecipe, ProbeRecipe, PromptRecipe
from lst_scale.recipe.release import ReleaseTask
from lst_scale.recipe.schema import Recipe
from lst_scale.recipe.task import FileTask, Task, images_of, name_of
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
    # else rows are put together in more than these few lines
    plain = recipe.backbone.context is None and recipe.vision is None and recipe.evaluation.method != "expectation"
    by_hand = not backbone.spec.one_stack and plain and len(recipe.each_task) == 1
    code = _loading(recipe, identity, folder / inner) if by_hand else []
    if code:
        answer = _likeliest(recipe, result) if recipe.evaluation.method == "likelihood" else _generated(recipe, result)
        source = recipe.data.max_source_length
        lines += card.code_block(code + card.prediction_code(identity.checkpoint, identity.revision, _text(recipe), answer, source))
        lines += ["", "Or for a file of rows, at the command line:", ""]
    task = recipe.each_task[0]
    turns = result["conversational"] if len(recipe.each_task) == 1 else result["conversational"][name_of(task)]
    cell: Any = [{"role": "user", "content": "..."}] if turns else "..."
    row = json.dumps(dict.fromkeys(_columns(task), cell) | dict.fromkeys(images_of(task), "..."), ensure_ascii=False)
    which = "" if len(recipe.each_task) == 1 else f" task={name_of(task)}"
    predict = f"lst-scale predict {shlex.quote(str(folder.resolve()))} rows.jsonl{which} --output answers.jsonl"
    lines += card.code_block([f"echo {shlex.quote(row)} > rows.jsonl", predict], "sh")
    return "\n".join(lines + card.backbone_lines(identity)) + "\n"


def _facts(recipe: Recipe, result: dict[str, Any]) -> list[str]:
    tasks, scores = recipe.each_task, result["scores"]
    one = len(tasks) == 1

    def each(key: str) -> list[Any]:
        return [result.get(key)] if one else [result[key][name_of(task)] for task in tasks]

    longest = max(each("longest_target"))
    sizes = ", ".join(dict.fromkeys(str(recipe.rows_a_step(task)) for task in tasks))
    chosen = f"steps of {sizes} rows, best after {result['best_step']}; learning rate {recipe.optimizer.learning_rate:g}"
    rows = {
        "task": "; ".join(f"{name_of(task)}, {_kind(task)}" for task in tasks),
        "text": "; ".join(f"`{_template(task)}`" for task in tasks).replace("\n", "\\n").replace("|", "\\|"),
        "data": "; ".join(f"the paper's splits of {task}" if isinstance(task, str) else _files(task) for task in tasks),
        "labels": "; ".join(map(_listed, each("labels"))),
        "scores": f"{', '.join(dict.fromkeys(each('split')))}: " + ", ".join(f"{name} {value:.2f}" for name, value in scores.items()),
        "majority class": ", ".join(f"{name} {value:.2f}" for name, value in result["majority"].items()),
        "answers": "by " + ", ".join(dict.fromkeys(recipe.evaluation_of(task).method for task in tasks)),
        "training": "fitted after one pass over the rows"
        if isinstance(recipe.method, ProbeRecipe)
        else f"{result['steps']} {chosen}, seed {recipe.seed}",
        "started from": recipe.training.start_from or "the backbone",
        "longest source, target": f"{recipe.data.max_source_length}, {longest} tokens",
        "trained weights": f"{result['trainable_parameters']:,} ({result['trainable_share_percent']} % of the backbone's)",
        "versions": ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
    }
    return ["| | |", "| --- | --- |", *(f"| {name} | {' '.join(str(value).split())} |" for name, value in rows.items())]


def _kind(task: Task) -> str:
    if isinstance(task, str):
        return "a task of GLUE"
    return task.kind if isinstance(task, FileTask) else f"in the files of the release, {task.of.kind}"


def _listed(labels: Sequence[str] | None) -> str:
    if not labels:
        return "none: free text or numbers"
    more = f" and {len(labels) - MOST_LABELS} more" if len(labels) > MOST_LABELS else ""
    return ", ".join(labels[:MOST_LABELS]) + more


def _files(task: FileTask | ReleaseTask) -> str:
    if isinstance(task, ReleaseTask):
        return ", ".join(f"{split} {' and '.join(names)}" for split, names in task.of.files.items())
    named = {"train": task.train, "validation": task.validation, "test": task.test}
    return ", ".join(f"{split} {Path(name).name}" for split, name in named.items() if name is not None)


def _template(task: Task) -> str:
    """Return the source text with {column}s, whichever way the recipe says it."""
    if isinstance(task, ReleaseTask):
        prompt = task.of.prompt if task.prompt is None else task.prompt
        return prompt + "".join(f"{{{column}}}" for column in _columns(task))
    if not isinstance(task, str) and task.source is None:
        return "".join(f"{{{column}}}" for column in task.text_columns)
    if not isinstance(task, str) and task.template is not None:
        return str(task.template)
    prefix = task if isinstance(task, str) else task.prefix
    pairs = GLUE[task].fields if isinstance(task, str) else [(f"{field}:", field) for field in task.text_columns]
    written = " ".join([*([prefix] if prefix else []), *(f"{name}\0{column}\0" for name, column in pairs)])
    pieces = written.replace("{", "{{").replace("}", "}}").split("\0")
    return "".join(f" {{{piece}}}" if number % 2 else piece for number, piece in enumerate(pieces))


def _columns(task: Task) -> list[str]:
    if isinstance(task, ReleaseTask):
        return [] if task.format == "caption" else ["sent"]
    return [column for _, column in GLUE[task].fields] if isinstance(task, str) else list(task.text_columns)


def _text(recipe: Recipe) -> str:
    return "\n".join(
        [
            "from lst_scale.recipe.template import fill",
            "",
            f"row = {dict.fromkeys(_columns(recipe.each_task[0]), '...')!r}",
            f"text = fill({_template(recipe.each_task[0])!r}, row)",
        ]
    )


def _loading(recipe: Recipe, identity: BackboneIdentity, folder: Path) -> list[str]:
    """Return lines that make `model`; none where only `lst-scale predict` can."""
    if isinstance(recipe.method, LstRecipe):
        return card.loading_code(str(folder.resolve()), identity)
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
    task = recipe.each_task[0]
    return task.target_prefix or "" if isinstance(task, FileTask) else ""

"""`lst-scale predict`: answers for a file of inputs, from a saved side network."""

from __future__ import annotations

import json
from pathlib import Path

from lst_scale.data import files
from lst_scale.data.batches import evaluation_batches
from lst_scale.data.encode import encode
from lst_scale.data.tasks import Row
from lst_scale.data.tokenizer import load_tokenizer
from lst_scale.durable import write_file
from lst_scale.errors import ArgumentError, DataError
from lst_scale.recipe import EvaluationRecipe, Recipe, load_recipe
from lst_scale.run import RECIPE
from lst_scale.side.model import LadderModel
from lst_scale.training.evaluation import answer

MAX_NEW_TOKENS = 64


def predict_file(run: Path, source: Path, output: Path, evaluation: EvaluationRecipe) -> int:
    """Answer every row of `source` with the side network of a finished run, and write JSON lines; return how many.

    Each line of the output holds the row's fields and "prediction". The text is made of the fields that the run was trained on.

    Raises:
        LstScaleError: the run, the file or a row can't be used.
    """
    if not (run / RECIPE).is_file():
        raise ArgumentError(f"{run} is no run: give a folder that holds {RECIPE} and side_network/")
    recipe = load_recipe(str(run / RECIPE))
    records = files.load_records(str(source), "inputs")
    rows = [_row(recipe, record, str(source), number) for number, record in enumerate(records, start=1)]
    model = LadderModel.from_pretrained(run / "side_network")
    tokenizer = load_tokenizer(recipe.backbone.checkpoint, recipe.backbone.revision)
    split = encode(rows, tokenizer, recipe.data.max_source_length, None)
    labels = None if isinstance(recipe.task, str) else recipe.task.labels
    predictions: dict[int, str] = {}
    for batch in evaluation_batches(split, batch_size=evaluation.batch_size, rank=0, world_size=1):
        predictions |= dict(zip(batch.indices, answer(model, batch, tokenizer, evaluation, labels, MAX_NEW_TOKENS), strict=True))
    lines = [json.dumps(dict(record) | {"prediction": predictions[index]}, ensure_ascii=False) for index, record in enumerate(records)]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_file(output, "".join(line + "\n" for line in lines))
    return len(lines)


def _row(recipe: Recipe, record: files.Record, path: str, number: int) -> Row:
    from lst_scale.data.tasks import GLUE, source_text

    if isinstance(recipe.task, str):
        fields = GLUE[recipe.task].fields
        prefix: str | None = recipe.task
    else:
        fields = tuple((f"{field}:", field) for field in recipe.task.source)
        prefix = recipe.task.prefix
    for _, column in fields:
        if column not in record:
            raise DataError(files.missing_field(path, number, column, record))
    return Row(source_text(prefix, fields, record), "0")  # the target is not used

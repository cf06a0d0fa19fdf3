"""`lst-scale predict`: answers for a file of inputs, from a saved side network."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from lst_scale import distributed
from lst_scale.backbone.place import load_placed
from lst_scale.data import files
from lst_scale.data.encode import encode
from lst_scale.data.tasks import GLUE, Row, file_source, source_text
from lst_scale.data.tokenizer import load_tokenizer
from lst_scale.distributed import World
from lst_scale.durable import write_file
from lst_scale.ensemble import refuse_what_can_not_answer_together
from lst_scale.errors import ArgumentError, DataError
from lst_scale.folder import RECIPE
from lst_scale.methods import build_trainee, check_method
from lst_scale.methods.base import Answerer
from lst_scale.methods.lst import LadderTrainee
from lst_scale.recipe import EvaluationRecipe, Recipe, load_recipe
from lst_scale.side.ensemble import LadderEnsemble
from lst_scale.training.evaluation import answers
from lst_scale.training.sessions import run_alone

MAX_NEW_TOKENS = 64


def predict_file(runs: Sequence[Path], source: Path, output: Path, evaluation: EvaluationRecipe, overrides: Sequence[str] = ()) -> int:
    """Answer every row of `source` with what a finished run trained, and write JSON lines; return how many.

    Each line of the output holds the row's fields and "prediction". The text is made of the fields that the run was trained on.
    `overrides` change the run's recipe, for instance backbone.placement=streamed. Several ranks share the rows. Several runs of ladders
    on one backbone answer as an ensemble.

    Raises:
        LstScaleError: the run, the file or a row can't be used.
    """
    for run in runs:
        if not (run / RECIPE).is_file():
            raise ArgumentError(f"{run} is no run: give a folder that holds {RECIPE} and side_network/")
    recipe = load_recipe(str(runs[0] / RECIPE), overrides)
    records = files.load_records(str(source), "inputs")
    rows = [_row(recipe, record, str(source), number) for number, record in enumerate(records, start=1)]
    world = distributed.connect()
    tokenizer = load_tokenizer(recipe.backbone.checkpoint, recipe.backbone.revision)
    split = encode(rows, tokenizer, recipe.data.max_source_length, None)
    labels = None if isinstance(recipe.task, str) else recipe.task.labels
    prefix = "" if isinstance(recipe.task, str) else recipe.task.target_prefix or ""
    with _answering(runs, recipe, world) as model:
        session = answers(model, split, tokenizer, evaluation, labels, world, prefix, longest=MAX_NEW_TOKENS)
        predictions = run_alone(
            session, lambda batch: model.read(batch.input_ids_BS.to(model.device), batch.attention_mask_BS.to(model.device))
        )
    lines = [json.dumps(dict(record) | {"prediction": text}, ensure_ascii=False) for record, text in zip(records, predictions, strict=True)]

    def write() -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_file(output, "".join(line + "\n" for line in lines))

    distributed.on_main_rank(world, write)
    return len(lines)


@contextlib.contextmanager
def _answering(runs: Sequence[Path], recipe: Recipe, world: World) -> Iterator[Answerer]:
    """Give the model that answers: what one run trained, or the side networks of several."""
    check_method(recipe)
    if len(runs) > 1:
        refuse_what_can_not_answer_together(runs, [load_recipe(str(run / RECIPE)) for run in runs], ("task", "backbone"))
        folders = [run / LadderTrainee.FOLDER for run in runs]
        yield LadderEnsemble.from_pretrained(folders, load_placed(recipe.backbone, world))
        return
    method = recipe.method.model_copy(update={"initialization": "random"}) if recipe.method.name == "lst" else recipe.method
    recipe = recipe.model_copy(update={"method": method})  # what was trained replaces any start
    trainee = build_trainee(recipe, load_placed(recipe.backbone, world), zero_stage=0)
    with trainee.answering(trainee.load(runs[0] / trainee.FOLDER)) as model:
        yield model


def _row(recipe: Recipe, record: files.Record, path: str, number: int) -> Row:
    task = recipe.task
    columns = [column for _, column in GLUE[task].fields] if isinstance(task, str) else task.source
    for column in columns:
        if column not in record:
            raise DataError(files.missing_field(path, number, column, record))
    text = source_text(task, GLUE[task].fields, record) if isinstance(task, str) else file_source(task, record)
    return Row(text, "0")  # the target is not used

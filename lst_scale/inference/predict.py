"""`lst-scale predict`: answers for a file of inputs, given in the way that scored the run.

What can be wrong with the run, the inputs and the place of the answers is found before the backbone is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lst_scale.backbone.placement.load import load_placed
from lst_scale.backbone.taps import Backbone
from lst_scale.data import files
from lst_scale.data.answers import cut_inputs
from lst_scale.data.batches import Batch
from lst_scale.data.chat import Writer
from lst_scale.data.columns import by_chunks
from lst_scale.data.context import Reading, reading_after
from lst_scale.data.encode import EncodedSplit, encode_sources
from lst_scale.data.measures import number_in
from lst_scale.data.own_rows import asked_source, file_images, file_source, refuse_bad_cells, source_text
from lst_scale.data.prompts import in_way
from lst_scale.data.release import NamedImages, endings_of, question_text
from lst_scale.data.tasks import GLUE, chat_of, way_of
from lst_scale.errors import ArgumentError, DataError, fence
from lst_scale.images.features import image_reader
from lst_scale.inference.ensemble import check_ensemble
from lst_scale.inference.json_lines import LinesFile, as_json, lines_file
from lst_scale.inference.scored_run import ScoredRun, Way, read_result, read_scored_run, refuse_changed_weights
from lst_scale.methods import check_method, method_of
from lst_scale.methods.base import Predictor
from lst_scale.methods.full import WholeModelTrainee
from lst_scale.methods.lst import LadderTrainee, SharedPasses
from lst_scale.methods.probe import Probe
from lst_scale.recipe.method import LstRecipe, ProbeRecipe
from lst_scale.recipe.release import ReleaseTask
from lst_scale.recipe.schema import Recipe
from lst_scale.recipe.task import FileTask, method_misfit, name_of
from lst_scale.runs.logs import progress_of
from lst_scale.side import files as side_files
from lst_scale.side.ensemble import LadderEnsemble
from lst_scale.system import distributed
from lst_scale.system.distributed import World
from lst_scale.training.evaluation import each_row, expected, generated, label_scores
from lst_scale.training.sessions import Moment, Passes, Session, run_alone
from lst_scale.training.shared import load_tokenizer_of

PREDICTION, PROBABILITIES = "prediction", "probabilities"
BATCHES_AT_ONCE = 16  # of each copy of the backbone, sorted by length together; then their answers are written


def predict_file(
    runs: Sequence[Path],
    source: Path,
    output: Path,
    overrides: Sequence[str] = (),
    *,
    column: str = PREDICTION,
    probabilities: bool = False,
    resume: bool = False,
    say: Callable[[str], None] = lambda sentence: None,
) -> int:
    """Answer every row of `source` with what a finished run trained, and write JSON lines; return how many.

    The file is gone through twice, some rows at a time: to find what is wrong with it, and to answer. Each line of the output holds the
    row's fields and the answer: a text; for a regression a number, or null when it is none. Several ranks share the rows. Several runs of
    ladders on one backbone answer as an ensemble.

    Args:
        overrides: change the run's recipe, for instance backbone.placement=streamed or evaluation.num_beams=4.
        column: what the answer is called.
        probabilities: also write how likely each label is beside the others, as "probabilities".
        resume: go on after the answers that a process which was ended left beside `output`.
        say: is told what is worth knowing, such as how many rows were cut.

    Raises:
        LstScaleError: the run, the file, a row or the output can't be used.
    """
    asked = ways_of(runs, overrides, probabilities=probabilities)
    names = [column, PROBABILITIES] if probabilities else [column]
    if not column or len(set(names)) < len(names):
        raise ArgumentError(f"--column {column!r} is no name for the answer: write another, such as {PREDICTION}")
    chat = chat_of(asked.recipe.backbone) if asked.conversational else None
    rows = InputRows(asked, source, names, chat)
    count = sum(1 for _ in rows)
    refuse_inputs_as_output(source, output)
    world = distributed.connect()
    with _written(output, world, rows, _made_by(runs, asked, names), resume=resume) as (answered, keep, write):
        reader = None if asked.recipe.vision is None else image_reader(asked.recipe.vision)
        tokenizer = load_tokenizer_of(asked.recipe.backbone.checkpoint, asked.recipe.backbone.revision)
        tokenizer = in_way(tokenizer, way_of(asked.task, chat))
        reading = reading_after(asked.context, tokenizer, beside_backbone=asked.recipe.method.beside_backbone)
        with answering(runs, asked.recipe, world, reading, asked.labels) as (model, passes):
            at_once = BATCHES_AT_ONCE * asked.evaluation.batch_size * model.replica.count
            first = answered - answered % at_once  # the same rows together as without a stop
            keep(first)
            if first:
                say(f"going on after {first:,} rows")
            cut, number = 0, first + 1
            with progress_of(count, first, shown=world.is_main) as advance:
                for some in by_chunks(itertools.islice(rows, first, None), at_once):
                    split = encode_sources(
                        [text for text, _, _ in some], reading.tokenizer, asked.recipe.data.max_source_length, reading.before
                    )
                    if reader is not None:
                        split = replace(split, images=reader.read((images for _, images, _ in some), str(source), number))
                    answers = _answers(model, passes, split, tokenizer, asked, world, probabilities=probabilities)
                    write([row | dict(zip(names, said, strict=True)) for said, (_, _, row) in zip(answers, some, strict=True)])
                    cut, number = cut + split.cut_sources, number + len(some)
                    advance(len(some))
            if (sentence := cut_inputs(cut, count - first, asked.recipe.data)) is not None:
                say(sentence)
    return count


@dataclass(frozen=True)
class InputRows:
    """The rows of a file, read anew each time they are gone through: as text for the model, files of pictures, and as JSON, with room for
    `names`."""

    asked: ScoredRun
    source: Path
    names: Sequence[str]
    chat: Writer | None = None

    def __iter__(self) -> Iterator[tuple[str, tuple[str, ...], dict[str, Any]]]:
        task = self.asked.task
        named = NamedImages(task, endings_of(self.asked.recipe.vision)) if isinstance(task, ReleaseTask) else None
        for found in files.read_records(str(self.source), "test", where="inputs"):
            text = text_of_row(self.asked, found, self.chat)
            images = () if named is None else named.of(found.record, found.path, found.number)
            if isinstance(task, FileTask):
                images = file_images(task, found.record, found.path, found.number)
            yield text, images, with_room(found.record, self.names, found.path, found.number)

    def count_answered(self, earlier: Iterator[dict[str, Any]]) -> int:
        """Return how many records with answers there are, which must be of these rows.

        Raises:
            ArgumentError: one is of another row.
        """
        count = 0
        for count, (record, (_, _, row)) in enumerate(zip(earlier, self, strict=False), start=1):
            if {name: value for name, value in record.items() if name not in self.names} != row:
                raise ArgumentError(f"row {count} of {self.source} is not the one that was answered: leave --resume out to begin again")
        return count


def _made_by(runs: Sequence[Path], asked: ScoredRun, names: Sequence[str]) -> str:
    """Return a digest of all that answers depend on beside the inputs."""
    weights = [read_result(run).get("saved_sha256") or str(run.resolve()) for run in runs]
    what = {"runs": weights, "recipe": asked.recipe.model_dump(mode="json"), "names": list(names), "task": name_of(asked.task)}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def ways_of(runs: Sequence[Path], overrides: Sequence[str], *, probabilities: bool) -> ScoredRun:
    """Return how the runs answer, which must be one way for all.

    Raises:
        LstScaleError: a run is not finished or damaged, or they can't answer so, or not together.
    """
    each = [read_scored_run(run, overrides) for run in runs]
    recipe, labels = each[0].recipe, each[0].labels
    if len(runs) > 1:
        check_ensemble(runs, [one.recipe for one in each], ("each_task", "backbone", "data", "evaluation"))
        other = next((run for run, one in zip(runs, each, strict=True) if one.labels != labels), None)
        if other is not None:
            raise ArgumentError(f"{other} was trained with other labels than {runs[0]}: an ensemble answers one question")
    if probabilities and labels is None:
        raise ArgumentError(f"--probabilities are those of labels, which {runs[0]} has not (kind {each[0].kind}): remove it")
    _refuse_without_choices(runs, each)
    if each[0].evaluation.method == "generation" and each[0].evaluation.max_new_tokens is None and any(one.longest is None for one in each):
        raise ArgumentError(f"{runs[0]} does not say how long its targets were: write evaluation.max_new_tokens=64, or what they need")
    check_method(recipe)
    for run in runs:
        _refuse_without_weights(run, recipe)
    longest = max((one.longest for one in each if one.longest is not None), default=None)
    return replace(each[0], longest=longest)


def _refuse_without_choices(runs: Sequence[Path], each: Sequence[ScoredRun]) -> None:
    method, kind = each[0].evaluation.method, each[0].kind
    if (misfit := method_misfit(kind, method)) is not None:
        raise ArgumentError(f"{runs[0]}: {misfit}")
    if method == "likelihood" and each[0].labels is None:
        raise ArgumentError(f"evaluation.method=likelihood compares labels, which {runs[0]} has not: write evaluation.method=generation")
    for run, one in zip(runs, each, strict=True):
        if method == "expectation" and one.numbers is None:
            raise ArgumentError(
                f"evaluation.method=expectation is the mean of the numbers that a run was trained on, and {run} keeps none: "
                "write evaluation.method=generation"
            )
        if method == "expectation" and one.numbers != each[0].numbers:
            raise ArgumentError(f"{run} was trained on other numbers than {runs[0]}: an ensemble answers one question")


def _refuse_without_weights(run: Path, recipe: Recipe) -> None:
    """Find a run that lacks what it trained, or holds damaged weights, before its backbone is loaded."""
    if isinstance(recipe.method, LstRecipe):
        side_files.read(run / LadderTrainee.FOLDER)
        refuse_changed_weights(run, LadderTrainee.FOLDER)
        return
    folder = Probe.FOLDER if isinstance(recipe.method, ProbeRecipe) else WholeModelTrainee.FOLDER
    if not (run / folder).is_dir():
        raise ArgumentError(f"{run} holds no {folder}/: give the folder of a finished run")
    refuse_changed_weights(run, folder)


def text_of_row(asked: ScoredRun, found: files.Found, chat: Writer | None) -> str:
    """Return a row's source text, written as in training.

    Args:
        chat: writes conversations; None: the run's rows are none.

    Raises:
        DataError: a field is missing or can't be meant; names where the row is.
    """
    task, record, path, number = asked.task, found.record, found.path, found.number
    if chat is not None and isinstance(task, FileTask):
        return asked_source(task, found, chat)
    refuse_bad_cells(record, asked.columns, path, number)
    if isinstance(task, ReleaseTask):
        return question_text(task, record, f"{path}: row {number}")
    return source_text(task, GLUE[task].fields, record) if isinstance(task, str) else file_source(task, record)


def with_room(record: files.Record, names: Sequence[str], path: str, number: int, *, others_can_be_written: bool = True) -> dict[str, Any]:
    """Return a row as JSON has it, which must have room for the answer.

    Args:
        others_can_be_written: whether --column may give the first of `names` another.
    """
    for name in names:
        if name in record:
            other = others_can_be_written and name == names[0]
            mend = f"write --column NAME for another, or rename {name}" if other else f"rename {name}"
            raise DataError(f"{path}: row {number} has a field {name!r} already, where the answer would stand: {mend}")
    return as_json(record, f"{path}: row {number}")


def refuse_inputs_as_output(source: Path, output: Path) -> None:
    """Refuse an output that is the file of inputs, or one of those that a pattern stands for.

    Raises:
        ArgumentError: it is, or can't be looked at.
        DataError: there are no such inputs.
    """
    if str(source).startswith(files.HUB):
        return
    with fence(ArgumentError, f"{output} can't be written"):
        if output.exists() and any(output.samefile(path) for path in files.paths_of(str(source), "test", where="inputs")):
            raise ArgumentError(f"--output {output} is the file of inputs: write another name")


@contextlib.contextmanager
def _written(
    output: Path, world: World, rows: InputRows, made_by: str, *, resume: bool
) -> Iterator[tuple[int, Callable[[int], None], Callable[[Sequence[dict[str, Any]]], None]]]:
    """Open a file of lines on rank 0, which is whole at the end. All ranks must call it, and what it gives.

    Gives how many rows are answered in it, a function that leaves the first of them, and one that writes more.
    """
    opened: list[LinesFile] = []
    with contextlib.ExitStack() as stack:
        distributed.on_main_rank(world, lambda: opened.append(stack.enter_context(lines_file(output, made_by, resume=resume))))
        answered = distributed.on_main_rank(world, lambda: rows.count_answered(opened[0].earlier()))
        yield (
            answered,
            lambda count: distributed.on_main_rank(world, lambda: opened[0].keep(count)),
            lambda records: distributed.on_main_rank(world, lambda: opened[0].write(records)),
        )
        distributed.on_main_rank(world, lambda: opened[0].finish())


def _answers(
    model: Predictor, passes: Passes, split: EncodedSplit, tokenizer: Any, asked: ScoredRun, world: World, *, probabilities: bool
) -> list[tuple[Any, ...]]:
    """Return the answers to some rows, in order: each the answer, and with `probabilities` those of the labels."""

    def reply(batch: Batch | None, moment: Moment) -> Session[list[tuple[Any, ...]]]:
        return reply_to(model, batch, tokenizer, asked, moment, probabilities=probabilities)

    return run_alone(each_row(model, split, asked.evaluation, world, reply), passes)


def reply_to(
    model: Predictor, batch: Batch | None, tokenizer: Any, asked: Way, moment: Moment, *, probabilities: bool
) -> Session[list[tuple[Any, ...]]]:
    """A session that ends with the answer to every row of a batch, and with `probabilities` those of the labels beside it."""
    evaluation, labels, prefix = asked.evaluation, asked.labels or (), asked.target_prefix
    scores_BL = None
    if probabilities or evaluation.method == "likelihood":
        scores_BL = yield from label_scores(model, batch, tokenizer, labels, prefix, first_token=asked.by_first_token, at=moment)
    if evaluation.method == "expectation":
        texts = yield from expected(model, batch, tokenizer, asked.numbers or (), prefix, at=moment)
    elif scores_BL is not None and evaluation.method == "likelihood":
        texts = [labels[int(best)].strip() for best in scores_BL.argmax(-1)]
    else:
        texts = yield from generated(model, batch, tokenizer, evaluation, asked.longest or 1, prefix, at=moment)
    answers = [number_in(text) for text in texts] if asked.kind == "regression" else texts
    if not probabilities:
        return [(each,) for each in answers]
    assert scores_BL is not None, "probabilities are those of labels"
    shares = scores_BL.double().softmax(-1).tolist()
    return [(each, dict(zip(map(str.strip, labels), row, strict=True))) for each, row in zip(answers, shares, strict=True)]


@contextlib.contextmanager
def answering(
    runs: Sequence[Path],
    recipe: Recipe,
    world: World,
    reading: Reading,
    labels: Sequence[str] | None,
    backbone: Backbone | None = None,
) -> Iterator[tuple[Predictor, SharedPasses]]:
    """Give the model that answers, what one run trained or the side networks of several; and the backbone as it reads it.

    Args:
        labels: of a classification; None: there are none.
        backbone: what the recipe's would be loaded as, where it is in memory already; without a context.
    """
    if len(runs) > 1:
        folders = [run / LadderTrainee.FOLDER for run in runs]
        ensemble = LadderEnsemble.from_pretrained(folders, _placed(recipe, world, reading, backbone))
        yield ensemble, SharedPasses(backbone=ensemble.backbone, request=ensemble.side.request)
        return
    backbone = _placed(recipe, world, reading, backbone)
    method = method_of(recipe, backbone, labels)
    with method.evaluating(method.load(runs[0] / method.FOLDER)) as model:
        yield model, SharedPasses(backbone=backbone, request=method.request)


def _placed(recipe: Recipe, world: World, reading: Reading, backbone: Backbone | None) -> Backbone:
    backbone = backbone or load_placed(recipe.backbone, world)
    return backbone.after(reading.run_once) if reading.run_once else backbone

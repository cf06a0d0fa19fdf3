"""What the members of a run share: data, and one backbone or its tap cache. Filling that cache ahead of a run is here too.

Data comes first: a wrong file is found before any weight is read, and before the run's folder is touched.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lst_scale.backbone.cache import pay
from lst_scale.backbone.cache.backbone import CachingBackbone
from lst_scale.backbone.cache.load import load_caching
from lst_scale.backbone.check import check_quantization
from lst_scale.backbone.model_config import find_config, read_config
from lst_scale.backbone.placement.load import load_placed
from lst_scale.backbone.taps import Backbone, BackboneSpec, TapRequest, union
from lst_scale.backbone.weights.precision import QUANTIZED
from lst_scale.data.answers import cuts, refuse_unanswerable, unmatchable_share
from lst_scale.data.batches import collate, evaluation_batches
from lst_scale.data.context import Context, Reading, reading_after, sentence_of, with_context
from lst_scale.data.encode import EncodedSplit, encode, for_training
from lst_scale.data.prompts import in_way
from lst_scale.data.rows import images_of
from lst_scale.data.scores import try_own_metrics
from lst_scale.data.tasks import TaskData, load_tasks
from lst_scale.data.tokenizer import SAMPLED_ROWS, load_tokenizer, refuse_misfit, refuse_unknown_text
from lst_scale.errors import BackboneError
from lst_scale.images.features import RowReader, image_reader
from lst_scale.inputs.keys import KeyTable, joined
from lst_scale.methods import check_method, request_of
from lst_scale.methods.lst import SharedPasses, inputs_of, taps_of, with_keys
from lst_scale.recipe.schema import DataRecipe, EvaluationRecipe, Recipe
from lst_scale.recipe.task import Task
from lst_scale.runs.logs import Logger
from lst_scale.system import distributed
from lst_scale.system.distributed import World

CHECKED_ROWS = 8  # of the quantization check: enough tokens for a stable error, little memory


@dataclass(frozen=True, kw_only=True)
class TaskRows:
    """One task of a run with its rows as token ids, and how it is trained on and answered."""

    task: TaskData
    splits: dict[str, EncodedSplit]
    batch_size: int  # rows of a step
    evaluation: EvaluationRecipe
    tokenizer: Any  # as its rows are tokenized

    @property
    def train(self) -> EncodedSplit:
        return self.splits["train"]

    @property
    def scored_split(self) -> str:
        """The split that a result is scored on."""
        return "test" if "test" in self.splits else "validation"


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What all members of a run have in common: data, and one backbone."""

    world: World
    tasks: tuple[TaskRows, ...]
    tokenizer: Any
    backbone: Backbone
    loading: dict[str, Any]
    passes: SharedPasses
    reading: Reading
    context: Context | None

    def close(self) -> None:
        """Let other runs write to the tap cache."""
        self.backbone.close()


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a run reads before any weight: rows, the tokenizer, ids, and what there is to say of them."""

    tasks: tuple[TaskRows, ...]
    tokenizer: Any
    sentences: tuple[str, ...]
    reading: Reading
    context: Context | None


def load_data(recipe: Recipe) -> Data:
    """Read and encode the rows, and refuse what can't be trained on. It changes nothing, so it comes before the run's folder.

    Raises:
        LstScaleError: anything the user can fix, in one line.
    """
    tasks, context = _after_context(recipe, load_tasks(recipe))
    for task in tasks:
        try_own_metrics(task)
    tokenizer = load_tokenizer_of(recipe.backbone.checkpoint, recipe.backbone.revision)
    readings = [_reading(recipe, tokenizer, task, context) for task in tasks]
    reader = None if recipe.vision is None else image_reader(recipe.vision)
    loaded, said = [], []
    for asked, task, reading in zip(recipe.each_task, tasks, readings, strict=True):
        evaluation = recipe.evaluation_of(asked)
        unknown = refuse_misfits(reading.tokenizer, recipe, task, evaluation)
        loaded.append(_encoded_task(recipe, asked, task, reading, reader))
        unmatchable = unmatchable_share(task, reading.tokenizer, evaluation.method)
        sentences = (unknown, cuts(loaded[-1].splits, _limits(recipe, task)), unmatchable)
        said += [sentence if len(tasks) == 1 else f"{task.name}: {sentence}" for sentence in sentences if sentence is not None]
    said += [] if context is None else [sentence_of(context, readings[0])]
    return Data(tasks=tuple(loaded), tokenizer=tokenizer, sentences=tuple(said), reading=readings[0], context=context)


def _after_context(recipe: Recipe, tasks: Sequence[TaskData]) -> tuple[Sequence[TaskData], Context | None]:
    """Return tasks without the rows that stand before all others, and what stands there; the recipe refuses it before several tasks."""
    if recipe.backbone.context is None:
        return tasks, None
    task, context = with_context(tasks[0], recipe.backbone.context)
    return [task], context


def _encoded_task(recipe: Recipe, asked: Task, task: TaskData, reading: Reading, reader: RowReader | None) -> TaskRows:
    splits = {name: _encode(rows, reading, recipe, task) for name, rows in task.splits().items()}
    if reader is not None:
        splits = {name: replace(split, images=reader.read(images_of(split.rows), f"{task.name}, {name}")) for name, split in splits.items()}
    splits["train"] = for_training(splits["train"], task.loss, scored=task.scored)
    return _task_rows(recipe, asked, task, splits, reading)


def _task_rows(recipe: Recipe, asked: Task, task: TaskData, splits: dict[str, EncodedSplit], reading: Reading) -> TaskRows:
    return TaskRows(
        task=task,
        splits=splits,
        batch_size=recipe.rows_a_step(asked),
        evaluation=recipe.evaluation_of(asked),
        tokenizer=reading.tokenizer,
    )


def load_shared(recipes: Sequence[Recipe], world: World, logger: Logger, data: Data | None = None) -> Shared:
    """Load the data if need be, then the backbone, for recipes that differ in their side networks alone. All ranks must call it.

    Raises:
        LstScaleError: anything the user can fix, in one line.
    """
    recipe = recipes[0]
    data = data or load_data(recipe)
    tasks = data.tasks
    for sentence in data.sentences:
        logger.say(sentence)
    distributed.poll_interruption(world)
    start = time.perf_counter()
    live = None if recipe.cache.enabled else load_placed(recipe.backbone, world)
    backbone: Backbone
    run_once = data.reading.run_once
    if live is not None:
        _check_quantization(live, tasks[0].train, recipe, logger)
        backbone = live.after(run_once) if run_once else live
    else:
        backbone, tasks = _remembering(recipes, tasks, world, logger, run_once)
    loading = {
        "loading_seconds": round(time.perf_counter() - start, 3),
        "peak_memory_bytes_after_loading_by_rank": distributed.gather(peak_memory_bytes(world)),
    }
    distributed.poll_interruption(world)
    return Shared(
        world=world,
        tasks=tasks,
        tokenizer=data.tokenizer,
        backbone=backbone,
        loading=loading,
        passes=SharedPasses(backbone=backbone, request=_request(recipes, backbone.spec)),
        reading=data.reading,
        context=data.context,
    )


def build_cache(recipe: Recipe) -> tuple[int, Path]:
    """Run the training rows that are not in the tap cache through the backbone; return how many rows there are, and the cache's folder.

    Ranks share the rows. Batches are evaluation's: neighbours in length together.

    Raises:
        LstScaleError: anything the user can fix, in one line; another run that writes the same rows at the moment.
    """
    check_method(recipe)
    world = distributed.connect()
    with Logger(None) as logger:
        tokenizer = load_tokenizer_of(recipe.backbone.checkpoint, recipe.backbone.revision)
        found, context = _after_context(recipe, load_tasks(recipe))
        readings = [_reading(recipe, tokenizer, task, context) for task in found]
        each = list(zip(recipe.each_task, found, readings, strict=True))
        for asked, task, reading in each:
            refuse_misfits(reading.tokenizer, recipe, task, recipe.evaluation_of(asked))
        text = [_text_to_train_on(recipe, asked, task, reading) for asked, task, reading in each]
        backbone, tasks = _remembering([recipe], text, world, logger, readings[0].run_once)
        splits = [task.train for task in tasks]
        request = _taps_of([recipe], backbone.spec)
        if not backbone.lock.held():
            raise distributed.same_everywhere(
                BackboneError(
                    f"these rows can't be written: {backbone.lock.refused}"
                    if backbone.lock.refused
                    else f"another run is writing these rows to {backbone.cache.folder}: start runs on them, or wait for its end"
                )
            )
        size = recipe.training.micro_batch_size or recipe.evaluation.batch_size
        for split in splits:
            batches = evaluation_batches(split, batch_size=size, rank=world.rank, world_size=world.size)
            for _ in range(-(-len(split) // (size * world.size))):  # as often on every rank, so that all can leave together
                distributed.poll_interruption(world)
                batch = next(batches, None)
                if batch is None:
                    continue
                taps_of(backbone, batch, request)
        backbone.cache.flush()
        backbone.close()
    distributed.barrier()
    return sum(map(len, splits)), backbone.cache.folder


def _text_to_train_on(recipe: Recipe, asked: Task, task: TaskData, reading: Reading) -> TaskRows:
    """Return a task's training rows as text alone: what a tap cache holds."""
    splits = {"train": _encode(task.train, reading, recipe, task)}
    return _task_rows(recipe, asked, task, splits, reading)


def refuse_misfits(tokenizer: Any, recipe: Recipe, task: TaskData, evaluation: EvaluationRecipe) -> str | None:
    """Compare a tokenizer with a task's training texts and labels, and return what it does not know of them.

    Raises:
        DataError: it does not fit.
    """
    unknown = refuse_unknown_text(tokenizer, [row.source for row in task.train[:SAMPLED_ROWS]], recipe.backbone.checkpoint)
    refuse_unanswerable(task, tokenizer, _limits(recipe, task), evaluation)
    return unknown


def load_tokenizer_of(checkpoint: str, revision: str | None) -> Any:
    """Return the tokenizer of a backbone, which fits its vocabulary.

    Raises:
        DataError: it does not fit.
        BackboneError: the checkpoint's config.json can't be meant.
    """
    tokenizer = load_tokenizer(checkpoint, revision)
    config = find_config(checkpoint, revision)
    vocab_size = read_config(config).get("vocab_size") if config is not None else None
    if isinstance(vocab_size, int):
        refuse_misfit(tokenizer, vocab_size, checkpoint)
    return tokenizer


def peak_memory_bytes(world: World) -> int:
    """Return the most that this rank has held so far: allocated by torch on a GPU, resident on the CPU."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _request(recipes: Sequence[Recipe], spec: BackboneSpec) -> TapRequest | None:
    """Return which taps serve all members; None: the method reads none."""
    requests = [request for recipe in recipes if (request := request_of(recipe, spec)) is not None]
    return union(requests) if requests else None


def _taps_of(recipes: Sequence[Recipe], spec: BackboneSpec) -> TapRequest:
    request = _request(recipes, spec)
    assert request is not None, "check_method refuses a tap cache for other methods"
    return request


def _reading(recipe: Recipe, tokenizer: Any, task: TaskData, context: Context | None) -> Reading:
    text = None if context is None else context.text
    return reading_after(text, in_way(tokenizer, task.way), beside_backbone=recipe.method.beside_backbone)


def _encode(rows: Any, reading: Reading, recipe: Recipe, task: TaskData) -> EncodedSplit:
    limits = _limits(recipe, task)
    return encode(rows, reading.tokenizer, limits.max_source_length, limits.max_target_length, task.target_prefix, reading.before)


def _limits(recipe: Recipe, task: TaskData) -> DataRecipe:
    """Return the recipe's limits of lengths, with those that a task has of its own."""
    data = recipe.data
    source = min(data.max_source_length, task.source_length or data.max_source_length)
    return data.model_copy(update={"max_source_length": source, "max_target_length": data.max_target_length or task.target_length})


def _remembering(
    recipes: Sequence[Recipe], tasks: Sequence[TaskRows], world: World, logger: Logger, context: Sequence[int]
) -> tuple[CachingBackbone, tuple[TaskRows, ...]]:
    """Open the backbone's tap cache, and return tasks with their rows' keys; the backbone itself is loaded only if a row is missing."""
    recipe = recipes[0]

    def check(live: Backbone) -> None:
        logger.say("some rows are not in the tap cache: the backbone is loaded")
        _check_quantization(live, tasks[0].train, recipe, logger)

    backbone = load_caching(recipe.backbone, recipe.cache, world, lambda spec: _taps_of(recipes, spec), check, context)
    keyed = tuple(replace(task, splits={name: with_keys(split, backbone.spec) for name, split in task.splits.items()}) for task in tasks)
    rows = joined([task.train.keys for task in keyed if task.train.keys is not None])
    writes = backbone.claim_rows(rows, world)
    sources, targets = backbone.known(rows)
    num_missing = int((~(sources & targets)).sum())
    if writes:
        backbone.cache.refuse_if_too_large(*rows.distinct_tokens(~sources, ~targets))
    why = backbone.lock.refused
    others = f"the others can't be written: {why}" if why else "another run writes the others"
    elsewhere = f"; {others}" if num_missing and not writes else ""
    logger.say(f"tap cache {backbone.cache.folder}: {len(rows) - num_missing:,} of {len(rows):,} training rows are there{elsewhere}")
    if world.rank == 0:
        _say_whether_it_pays(backbone, rows, recipe.training.global_batch_size / world.size, logger)
    return backbone, keyed


def _say_whether_it_pays(backbone: CachingBackbone, rows: KeyTable, rows_a_rank: float, logger: Logger) -> None:
    """Log what the cache takes and what a step's reading costs; nothing where the folder is read-only, so that no disk can be tried."""
    cache, kept = backbone.cache, rows.distinct_tokens()
    mean_S, mean_T = rows.lengths.mean(0)
    step = pay.Tokens(source=rows_a_rank * mean_S, target=rows_a_rank * mean_T)
    with suppress(OSError):
        found = pay.rates(cache.folder, cache.key.d_model, cache.key.precision, backbone.device)
        logger.say(pay.sentence(cache.key, backbone.spec, pay.Tokens(source=kept[0], target=kept[1]), step, found))


def _check_quantization(backbone: Backbone, split: EncodedSplit, recipe: Recipe, logger: Logger) -> None:
    """Compare a quantized backbone with its checkpoint on the first rows, and log what was found."""
    if backbone.identity.precision not in QUANTIZED:
        return
    batch = collate(split, range(min(CHECKED_ROWS, len(split))))
    report = check_quantization(backbone, inputs_of(batch, backbone.spec), recipe.backbone.max_quantization_error)
    logger.say(report.sentence)

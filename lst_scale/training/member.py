"""One member of a run: its own method, optimizer, schedule, checkpoints, scores and folder, on what all members share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lst_scale.data.encode import Encoding
from lst_scale.data.stream import Stream
from lst_scale.errors import LadderError, LstScaleError
from lst_scale.methods import build_trainee
from lst_scale.methods.base import Trainee, trained_parameters
from lst_scale.methods.importance import task_importance
from lst_scale.methods.lst import LadderTrainee
from lst_scale.recipe.marks import KEPT_BY_RESUME, marked
from lst_scale.recipe.method import LstRecipe
from lst_scale.recipe.schema import Recipe
from lst_scale.recipe.task import FileTask, name_of
from lst_scale.runs.logs import Logger
from lst_scale.system import distributed
from lst_scale.system.durable import write_directory
from lst_scale.system.preemption import Interrupted
from lst_scale.training.answering import Answered, scored_splits
from lst_scale.training.checkpoint import TRAINING_ROWS, WEIGHTS, Checkpoint, Progress, Resuming, load_latest, read_tensors
from lst_scale.training.engine import build_engine, full_weights, release, restore_moments
from lst_scale.training.finish import answer, finish
from lst_scale.training.loop import Plan, Scores, Trainer, make_plan
from lst_scale.training.probe_start import Starts, begins_as_probe
from lst_scale.training.result import write_start
from lst_scale.training.sessions import EVALUATION, Moment, Session
from lst_scale.training.shared import Shared
from lst_scale.training.warm_start import start_folder


class Member:
    """One run of one recipe on what a `Shared` holds."""

    def __init__(
        self, recipe: Recipe, folder: Path, logger: Logger, shared: Shared, starts: Starts, ds_config: dict[str, Any], *, resume: bool
    ) -> None:
        self.recipe, self.folder, self.logger, self.shared = recipe, folder, logger, shared
        world, backbone, trains = shared.world, shared.backbone, [rows.train for rows in shared.tasks]
        plan = _plan(recipe, shared)
        stream = _stream(recipe, plan, shared)
        rows = f"{sum(train.num_questions for train in trains):,} training rows" if stream is None else "training rows as they come"
        logger.say(
            f"{recipe.run_name}: {rows}, {plan.total_steps} steps of "
            f"{_sizes(shared)} on {world.size} process{'es' if world.size > 1 else ''} ({world.device.type})"
        )
        identity = _identity(recipe, plan, shared) | ({} if stream is None else {"processes": world.size})
        initial = recipe if recipe.training.start_from is None else _without_carving(recipe)
        importance = task_importance(initial, trains, backbone, world)
        stage = ds_config.get("zero_optimization", {}).get("stage", 0)
        self.trainee = build_trainee(initial, backbone, zero_stage=stage, importance=importance)
        self._shapes = {name: parameter.shape for name, parameter in trained_parameters(self.trainee.module).items()}
        asking = Resuming(identity=identity, shapes=self._shapes, total_steps=plan.total_steps, best=lambda step: _best_path(folder, step))
        checkpoint = load_latest(folder / "checkpoints", asking) if resume else None
        begin = start_folder(recipe) if checkpoint is None else None
        if begin is not None:
            _begin_with(self.trainee, begin, logger)
        self._start = _restore_weights(self.trainee.module, checkpoint, logger)
        if checkpoint is None and begin is None and begins_as_probe(recipe):
            assert isinstance(self.trainee, LadderTrainee)
            self._start = replace(self._start, seconds=starts.begin(self.trainee, logger))
        self._trainable = sum(parameter.numel() for parameter in trained_parameters(self.trainee.module).values())
        self._engine = build_engine(
            self.trainee.module.to(world.device),
            recipe.optimizer,
            ds_config,
            micro_batch_size=plan.micro_batch_size,
            accumulation=plan.accumulation,
            no_decay=self.trainee.no_decay(),
        )
        if checkpoint is not None:
            restore_moments(self._engine, checkpoint.snapshot.moments, self._start.step)
        self._trainer = Trainer(
            world=world,
            recipe=recipe,
            plan=plan,
            trainee=self.trainee,
            engine=self._engine,
            train=[(rows.train, rows.batch_size) for rows in shared.tasks],
            evaluate=lambda weights, step: self._score(weights, Moment(step, EVALUATION)),
            save_best=lambda weights, step: distributed.on_main_rank(world, lambda: _save_best(folder, weights, step)),
            logger=logger,
            folder=folder,
            identity=identity,
            stream=stream,
        )

    def session(self) -> Session[dict[str, Any]]:
        """Train to the end and finish, asking for what the backbone makes of each batch on the way; return what result.json holds."""
        try:
            if self.recipe.evaluation.score_start and self._start.step == 0:
                yield from self._score_start()
            progress = yield from self._trainer.session(self._start)
            result = yield from self._finish(progress)
            self.logger.callbacks.on_end(result, None)
            return result
        except LstScaleError as error:
            if not isinstance(error, Interrupted):
                self.logger.say(f"failed: {error}")
            self.logger.callbacks.on_end(None, error)
            raise
        finally:
            release(self._engine)

    def _finish(self, progress: Progress) -> Session[dict[str, Any]]:
        """Score and save the best weights, and write and return result.json."""
        assert progress.best_step is not None, "a run ends with an evaluation"
        best = read_tensors(_best_path(self.folder, progress.best_step), self._shapes)
        return (
            yield from finish(self.recipe, self.folder, self.logger, self.shared, self.trainee, best, progress, trainable=self._trainable)
        )

    def _score_start(self) -> Session[None]:
        """Score what the method starts as: beside a backbone that the first predictions are, that is the backbone without any training."""
        weights = full_weights(self._engine)
        splits = scored_splits(self.shared.tasks)
        scores = (yield from self._answer(weights, splits, Moment(0, EVALUATION))).scores
        distributed.on_main_rank(self.shared.world, lambda: write_start(self.folder, scores))
        self.logger.say(f"before training: {splits[0] if len(splits) == 1 else 'mean'} score {scores['score']:.2f}")

    def _score(self, weights: dict[str, Tensor], at: Moment) -> Session[Scores]:
        return (yield from self._answer(weights, ["validation"] * len(self.shared.tasks), at)).scores

    def _answer(self, weights: dict[str, Tensor], splits: Sequence[str], at: Moment) -> Session[Answered]:
        """Return what these weights' answers to one split of each task are worth."""
        return (yield from answer(self.trainee, weights, self.shared, splits, at))


def _plan(recipe: Recipe, shared: Shared) -> Plan:
    """Return when a run does what; a stream is one epoch of all its steps."""
    if is_stream(recipe):
        assert recipe.training.max_steps is not None, "the recipe refuses a stream without an end"
        size = shared.tasks[0].batch_size
        return make_plan(recipe, [(recipe.training.max_steps * size, size)], 1, shared.world.size)
    sizes = [(rows.train.num_questions, rows.batch_size) for rows in shared.tasks]
    return make_plan(recipe, sizes, recipe.training.epochs or max(rows.task.epochs for rows in shared.tasks), shared.world.size)


def _sizes(shared: Shared) -> str:
    """Return how many rows a step has, of several tasks how many on each."""
    sizes = [rows.batch_size for rows in shared.tasks]
    each = [f"{rows.batch_size} ({rows.task.name})" for rows in shared.tasks]
    return str(sizes[0]) if len(set(sizes)) == 1 else f"{', '.join(each[:-1])} or {each[-1]}"


def is_stream(recipe: Recipe) -> bool:
    return isinstance(recipe.task, FileTask) and recipe.task.streaming


def _stream(recipe: Recipe, plan: Plan, shared: Shared) -> Stream | None:
    """Return the steps of a stream; None: rows are in a table or a list."""
    if not isinstance(recipe.task, FileTask) or not recipe.task.streaming:
        return None
    data, rows = recipe.data, shared.tasks[0]
    encoding = Encoding(
        tokenizer=shared.reading.tokenizer,
        max_source_length=data.max_source_length,
        max_target_length=data.max_target_length,
        target_prefix=rows.task.target_prefix,
        before=shared.reading.before,
    )
    return Stream(
        recipe.task,
        encoding,
        steps=plan.total_steps,
        global_batch_size=rows.batch_size,
        micro_batches=plan.accumulation,
        window=data.shuffle_buffer,
        seed=recipe.seed if data.shuffle_seed is None else data.shuffle_seed,
        rank=shared.world.rank,
        world_size=shared.world.size,
        chat=rows.task.chat,
    )


def _identity(recipe: Recipe, plan: Plan, shared: Shared) -> dict[str, Any]:
    """What must not change between a checkpoint and its resume. World size, micro-batch and ZeRO stage may."""
    backbone = shared.backbone
    settings = {key.rpartition(".")[2]: value for key, value in marked(recipe, KEPT_BY_RESUME).items()}
    found = {"backbone": backbone.identity.fingerprint, "precision": backbone.identity.precision, "total_steps": plan.total_steps}
    if backbone.identity.context:
        found["context"] = list(backbone.identity.context)
    trains = [rows.train for rows in shared.tasks]
    of = ", ".join(task.train if isinstance(task, FileTask) else name_of(task) for task in recipe.each_task)
    ids = trains[0].digest if len(trains) == 1 else hashlib.sha256(" ".join(train.digest for train in trains).encode()).hexdigest()
    return settings | found | {TRAINING_ROWS: {"of": of, "rows": sum(map(len, trains)), "ids": ids[:20]}}


def _without_carving(recipe: Recipe) -> Recipe:
    """Return a recipe whose side network is not carved out of the backbone, since other weights will replace those."""
    if not isinstance(recipe.method, LstRecipe):
        return recipe
    return recipe.model_copy(update={"method": recipe.method.model_copy(update={"initialization": "random"})})


def _begin_with(trainee: Trainee, folder: Path, logger: Logger) -> None:
    """Put the weights that an earlier run trained into a new one."""
    try:
        weights = trainee.load(folder)
    except LadderError as error:
        raise LadderError(f"training.start_from: {error}") from error
    parameters = trained_parameters(trainee.module)
    wrong = [name for name in parameters if name not in weights or weights[name].shape != parameters[name].shape]
    if wrong:
        found = f"is {tuple(weights[wrong[0]].shape)}" if wrong[0] in weights else "is missing"
        raise LadderError(
            f"training.start_from: {folder} does not fit this recipe: {wrong[0]} {found}, here {tuple(parameters[wrong[0]].shape)} "
            f"({len(wrong)} in all); write the method that it was trained with"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    logger.say(f"starting from the weights in {folder}")


def _restore_weights(module: nn.Module, checkpoint: Checkpoint | None, logger: Logger) -> Progress:
    if checkpoint is None:
        logger.truncate_after(0, 0)
        return Progress()
    for broken in checkpoint.skipped:
        logger.say(f"skipped a broken checkpoint: {broken}")
    with torch.no_grad():
        for name, parameter in trained_parameters(module).items():
            parameter.copy_(checkpoint.snapshot.weights[name])
    logger.truncate_after(checkpoint.progress.step, checkpoint.progress.evaluated_at)
    logger.say(f"resuming at step {checkpoint.progress.step} from {checkpoint.path}")
    return checkpoint.progress


def _best_path(folder: Path, step: int) -> Path:
    return folder / "best" / f"step-{step:08d}" / WEIGHTS


def _save_best(folder: Path, weights: dict[str, Tensor], step: int) -> None:
    path = _best_path(folder, step)
    write_directory(path.parent, lambda partial: save_file(weights, partial / WEIGHTS), lambda whole: load_file(whole / WEIGHTS))

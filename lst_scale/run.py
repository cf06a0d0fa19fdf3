"""One run, top to bottom: recipe -> data -> backbone -> side network -> training -> score -> files. The page to read first.

runs/NAME-TASK-seedN/
    recipe.yaml        the resolved recipe; `--recipe runs/.../recipe.yaml` repeats the run
    log.txt            sentences
    metrics.jsonl      numbers: train, validation, gates
    checkpoints/       the newest ones, to resume from
    best/              weights of the best validation score
    side_network/      the result: `LadderModel.from_pretrained` and `lst-scale predict` read it; of other methods: trained/
    result.json        score, time, memory, counts, versions
"""

from __future__ import annotations

import contextlib
import functools
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lst_scale import distributed
from lst_scale.assets import cache_folder, load_ds_config
from lst_scale.backbone.caching import CachingBackbone
from lst_scale.backbone.check import check_quantization
from lst_scale.backbone.checkpoint import open_checkpoint
from lst_scale.backbone.fisher import Example, fisher_importance, stored_importance
from lst_scale.backbone.local import LocalBackbone
from lst_scale.backbone.place import load_caching, load_placed
from lst_scale.backbone.precision import QUANTIZED
from lst_scale.backbone.taps import BackboneSpec, TapRequest, Taps
from lst_scale.data.batches import Batch, collate, evaluation_batches
from lst_scale.data.encode import EncodedSplit, encode
from lst_scale.data.scores import majority_score, score
from lst_scale.data.tasks import TaskData, load_task
from lst_scale.data.tokenizer import load_tokenizer
from lst_scale.distributed import World
from lst_scale.durable import write_directory, write_file
from lst_scale.errors import ArgumentError
from lst_scale.logs import Logger
from lst_scale.members import members_of
from lst_scale.methods import build_trainee, check_method
from lst_scale.methods.base import trained_parameters
from lst_scale.methods.lst import ladder_config, prefetch_taps, taps_of, union
from lst_scale.recipe import LstRecipe, Recipe, to_yaml
from lst_scale.side.loss import shift_right
from lst_scale.side.network import SideNetwork
from lst_scale.training.checkpoint import Checkpoint, Progress, load_latest
from lst_scale.training.engine import build_engine, restore_moments
from lst_scale.training.evaluation import predict
from lst_scale.training.loop import Plan, Scores, Session, Trainer, fit_together, make_plan

AnyBackbone = LocalBackbone | CachingBackbone
RESULT, RECIPE = "result.json", "recipe.yaml"
CHECKED_ROWS = 8  # of the quantization check: enough tokens for a stable error, little memory


def run(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> list[dict[str, Any]]:
    """Carry out one recipe, or its members side by side, on this process and its peers, and return what each result.json holds.

    Args:
        recipe: what to do.
        resume: continue from the newest whole checkpoint of each folder, or start when there is none.
        overwrite: throw away what the folders hold.

    Raises:
        LstScaleError: anything the user can mend, in one line.
    """
    recipes = [recipe] if recipe.members is None else members_of(recipe)
    ds_config = load_ds_config(recipe.training.deepspeed)
    for each in recipes:
        check_method(each)
    world = distributed.connect()
    folders = [Path(each.output_dir) / each.run_name for each in recipes]

    def prepare_folders() -> None:
        for each, folder in zip(recipes, folders, strict=True):
            _prepare_folder(folder, each, resume=resume, overwrite=overwrite)

    distributed.on_main_rank(world, prepare_folders)
    with contextlib.ExitStack() as stack:
        loggers = [
            stack.enter_context(Logger(folder if world.is_main else None, tensorboard=each.logging.tensorboard))
            for each, folder in zip(recipes, folders, strict=True)
        ]
        shared = _load_shared(recipes, world, loggers[0])
        members = [
            Member(each, folder, logger, shared, ds_config, resume=resume)
            for each, folder, logger in zip(recipes, folders, loggers, strict=True)
        ]
        backbone = shared.backbone
        prefetch = functools.partial(prefetch_taps, backbone) if isinstance(backbone, CachingBackbone) else None
        progresses = fit_together([member.session() for member in members], shared.prepare or members[0].trainee.prepare, prefetch)
        return [member.finish(progress) for member, progress in zip(members, progresses, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What all members of a run have in common: data, and one backbone."""

    world: World
    task: TaskData
    tokenizer: Any
    splits: dict[str, EncodedSplit]
    backbone: AnyBackbone
    loading: dict[str, Any]
    prepare: Callable[[Batch], Taps] | None  # taps for all members; None: a single run asks its own method


def _load_shared(recipes: Sequence[Recipe], world: World, logger: Logger) -> Shared:
    """Load data and backbone. Data first: a wrong file is found before any weight is read."""
    recipe = recipes[0]
    task = load_task(recipe)
    tokenizer = load_tokenizer(recipe.backbone.checkpoint, recipe.backbone.revision)
    splits = {name: _encode(rows, tokenizer, recipe, task.target_prefix) for name, rows in task.splits().items()}
    distributed.poll_interruption(world)
    start = time.perf_counter()
    backbone = _backbone(recipes, splits, world, logger)
    loading = {
        "loading_seconds": round(time.perf_counter() - start, 3),
        "peak_memory_bytes_after_loading_by_rank": distributed.gather(_peak_memory_bytes(world)),
    }
    distributed.poll_interruption(world)
    if isinstance(backbone, LocalBackbone) and backbone.identity.precision in QUANTIZED:
        logger.say(_check_quantization(backbone, splits["train"], recipe))
    request = _request(recipes, backbone.spec) if len(recipes) > 1 else None
    return Shared(
        world=world,
        task=task,
        tokenizer=tokenizer,
        splits=splits,
        backbone=backbone,
        loading=loading,
        prepare=None if request is None else lambda batch: taps_of(backbone, batch, request),
    )


def _request(recipes: Sequence[Recipe], spec: BackboneSpec) -> TapRequest:
    """Return which taps serve all members."""
    configs = [ladder_config(recipe.method, spec) for recipe in recipes if isinstance(recipe.method, LstRecipe)]
    return union([SideNetwork.request_of(config) for config in configs])


class Member:
    """One run of one recipe on a shared backbone: own method, optimizer, schedule, checkpoints, scores and folder."""

    def __init__(self, recipe: Recipe, folder: Path, logger: Logger, shared: Shared, ds_config: dict[str, Any], *, resume: bool) -> None:
        self.recipe, self.folder, self.logger, self.shared = recipe, folder, logger, shared
        world, splits, backbone = shared.world, shared.splits, shared.backbone
        plan = make_plan(recipe, len(splits["train"].rows), recipe.training.epochs or shared.task.epochs, world.size)
        logger.say(
            f"{recipe.run_name}: {len(splits['train'].rows):,} training rows, {plan.total_steps} steps of "
            f"{recipe.training.global_batch_size} on {world.size} process{'es' if world.size > 1 else ''} ({world.device.type})"
        )
        importance = _importance(recipe, splits["train"], backbone, world)
        stage = ds_config.get("zero_optimization", {}).get("stage", 0)
        self.trainee = build_trainee(recipe, backbone, zero_stage=stage, importance=importance)
        identity = _identity(recipe, plan, backbone)
        checkpoint = load_latest(folder / "checkpoints", identity) if resume else None
        self._start = _restore_weights(self.trainee.module, checkpoint, logger)
        self._trainable = sum(parameter.numel() for parameter in trained_parameters(self.trainee.module).values())
        engine = build_engine(
            self.trainee.module.to(world.device),
            recipe.optimizer,
            ds_config,
            micro_batch_size=plan.micro_batch_size,
            accumulation=plan.accumulation,
        )
        if checkpoint is not None:
            restore_moments(engine, checkpoint.snapshot.moments, self._start.step)
        self._trainer = Trainer(
            world=world,
            recipe=recipe,
            plan=plan,
            trainee=self.trainee,
            engine=engine,
            train_split=splits["train"],
            evaluate=lambda weights: self._score(weights, "validation"),
            save_best=lambda weights, step: distributed.on_main_rank(world, lambda: _save_best(folder, weights, step)),
            logger=logger,
            folder=folder,
            identity=identity,
        )

    def session(self) -> Session:
        """Train to the end, asking for taps on the way."""
        return self._trainer.session(self._start)

    def finish(self, progress: Progress) -> dict[str, Any]:
        """Score the best weights on the test split, save them, and write and return result.json."""
        assert progress.best_step is not None, "a run ends with an evaluation"
        recipe, shared, folder, trainee = self.recipe, self.shared, self.folder, self.trainee
        best = load_file(_best_path(folder, progress.best_step) / "weights.safetensors")
        split = "test" if "test" in shared.splits else "validation"
        scores = self._score(best, split)
        distributed.on_main_rank(shared.world, lambda: trainee.save(folder / trainee.FOLDER, best))
        result = {
            "name": recipe.name,
            "task": shared.task.name,
            "seed": recipe.seed,
            "split": split,
            "scores": {name: round(value, 4) for name, value in scores.items()},
            "majority": {name: round(value, 4) for name, value in majority_score(shared.task, shared.splits[split].rows).items()},
            "validation_score": progress.best_score,
            "best_step": progress.best_step,
            "method": recipe.method.name,
            **_measurements(progress, shared.world, self._trainable, shared.backbone),
            "saved_bytes": sum(file.stat().st_size for file in (folder / trainee.FOLDER).rglob("*") if file.is_file()),
            **shared.loading,
            **_cache_facts(shared.backbone),
            "versions": _versions(),
            "command": sys.argv,
            "recipe": recipe.model_dump(mode="json"),
        }
        distributed.on_main_rank(shared.world, lambda: _write_result(folder, result))
        self.logger.say(_closing_sentence(result, folder))
        return result

    def _score(self, weights: dict[str, Tensor], name: str) -> Scores:
        task, split, recipe = self.shared.task, self.shared.splits[name], self.recipe
        with self.trainee.answering(weights) as model:
            texts = predict(
                model, split, self.shared.tokenizer, recipe.evaluation, task.labels, self.shared.world, target_prefix=task.target_prefix
            )
        return score(task, texts, [row.target for row in split.rows])


def build_cache(recipe: Recipe) -> tuple[int, Path]:
    """Run the training rows that are not in the tap cache through the backbone; return how many rows there are, and the cache's folder.

    Ranks share the rows. Batches are evaluation's: neighbours in length together.
    """
    check_method(recipe)
    world = distributed.connect()
    with Logger(None) as logger:
        task = load_task(recipe)
        tokenizer = load_tokenizer(recipe.backbone.checkpoint, recipe.backbone.revision)
        split = _encode(task.train, tokenizer, recipe, task.target_prefix)
        backbone = _backbone([recipe], {"train": split}, world, logger)
        assert isinstance(backbone, CachingBackbone) and isinstance(recipe.method, LstRecipe)
        request = SideNetwork.request_of(ladder_config(recipe.method, backbone.spec))
        size = recipe.training.micro_batch_size or recipe.evaluation.batch_size
        for batch in evaluation_batches(split, batch_size=size, rank=world.rank, world_size=world.size):
            decoder_input_ids_BT = shift_right(batch.labels_BT, backbone.spec).to(world.device)
            backbone(batch.input_ids_BS.to(world.device), batch.attention_mask_BS.to(world.device), decoder_input_ids_BT, request)
        backbone.cache.flush()
    distributed.barrier()
    return len(split.rows), backbone.cache.folder


def _prepare_folder(folder: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ArgumentError("--resume and --overwrite exclude each other: write one of them")
    if overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    elif not resume and (folder / RECIPE).exists():
        raise ArgumentError(f"{folder} already holds a run: add --resume to continue it, --overwrite to start again, or change name=")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECIPE).write_text(to_yaml(recipe))


def _encode(rows: Any, tokenizer: Any, recipe: Recipe, target_prefix: str) -> EncodedSplit:
    return encode(rows, tokenizer, recipe.data.max_source_length, recipe.data.max_target_length, target_prefix)


def _backbone(recipes: Sequence[Recipe], splits: dict[str, EncodedSplit], world: World, logger: Logger) -> AnyBackbone:
    """Load the backbone, or open its tap cache and load it only if a row is missing there."""
    recipe = recipes[0]
    if not recipe.cache.enabled:
        return load_placed(recipe.backbone, world)

    def check(live: LocalBackbone) -> None:
        logger.say("some rows are not in the tap cache: the backbone is loaded")
        if live.identity.precision in QUANTIZED:
            logger.say(_check_quantization(live, splits["train"], recipe))

    backbone = load_caching(recipe.backbone, recipe.cache, world, lambda spec: _request(recipes, spec), check)
    rows = list(zip(splits["train"].input_ids, splits["train"].labels, strict=True))
    missing = [(s, t) for s, t in rows if not backbone.known(torch.tensor(s), _decoder_ids(t, backbone))]
    backbone.cache.refuse_if_too_large(sum(len(s) for s, _ in missing), sum(len(t) for _, t in missing))
    logger.say(f"tap cache {backbone.cache.folder}: {len(rows) - len(missing):,} of {len(rows):,} training rows are there")
    return backbone


def _decoder_ids(labels: list[int], backbone: CachingBackbone) -> Tensor:
    return shift_right(torch.tensor([labels]), backbone.spec)[0]


def _cache_facts(backbone: AnyBackbone) -> dict[str, Any]:
    if isinstance(backbone, LocalBackbone):
        return {}
    backbone.cache.flush()
    facts = {"rows_read": backbone.rows_read, "rows_run": backbone.rows_run, "backbone_loaded": backbone.is_loaded}
    return {"cache": facts | {"damaged": backbone.cache.damaged}}


def _importance(recipe: Recipe, split: EncodedSplit, backbone: AnyBackbone, world: World) -> Callable[[str], Tensor] | None:
    """Return the backbone's Fisher information on this task, from an earlier run on this machine where there was one."""
    method = recipe.method
    if not isinstance(method, LstRecipe) or method.initialization != "fisher":
        return None
    order = torch.randperm(len(split.rows), generator=torch.Generator().manual_seed(recipe.seed))[: method.fisher_samples].tolist()
    examples = [Example(input_ids_S=torch.tensor(split.input_ids[row]), labels_T=torch.tensor(split.labels[row])) for row in order]
    tree = recipe.model_dump(mode="json")
    key = {"backbone": backbone.identity.fingerprint, "task": tree["task"], "data": tree["data"], "samples": len(examples)}
    key |= {"seed": recipe.seed}
    folder = cache_folder("fisher")

    def make() -> dict[str, Tensor]:
        return fisher_importance(open_checkpoint(recipe.backbone.checkpoint, recipe.backbone.revision), examples, world.device)

    if world.local_rank == 0:
        stored_importance(folder, key, make)
    distributed.barrier()
    return stored_importance(folder, key, make)


def _check_quantization(backbone: LocalBackbone, split: EncodedSplit, recipe: Recipe) -> str:
    """Compare the quantized backbone with its checkpoint on the first rows and return what was found."""
    batch = collate(split, range(min(CHECKED_ROWS, len(split.rows))))
    decoder_input_ids_BT = shift_right(batch.labels_BT, backbone.spec)
    report = check_quantization(
        backbone, batch.input_ids_BS, batch.attention_mask_BS, decoder_input_ids_BT, recipe.backbone.max_quantization_error
    )
    return report.sentence


def _identity(recipe: Recipe, plan: Plan, backbone: AnyBackbone) -> dict[str, Any]:
    """What must not change between a checkpoint and its resume. World size, micro-batch and ZeRO stage may."""
    return {
        "task": recipe.model_dump(mode="json")["task"],
        "seed": recipe.seed,
        "backbone": backbone.identity.fingerprint,
        "precision": backbone.identity.precision,
        "method": recipe.method.model_dump(mode="json"),
        "optimizer": recipe.optimizer.model_dump(mode="json"),
        "data": recipe.data.model_dump(mode="json"),
        "global_batch_size": recipe.training.global_batch_size,
        "total_steps": plan.total_steps,
    }


def _restore_weights(module: nn.Module, checkpoint: Checkpoint | None, logger: Logger) -> Progress:
    if checkpoint is None:
        logger.forget_after(0, 0)
        return Progress()
    for broken in checkpoint.skipped:
        logger.say(f"skipped a broken checkpoint: {broken}")
    with torch.no_grad():
        for name, parameter in trained_parameters(module).items():
            parameter.copy_(checkpoint.snapshot.weights[name])
    logger.forget_after(checkpoint.progress.step, checkpoint.progress.evaluated_at)
    logger.say(f"resuming at step {checkpoint.progress.step} from {checkpoint.path}")
    return checkpoint.progress


def _best_path(folder: Path, step: int) -> Path:
    return folder / "best" / f"step-{step:08d}"


def _save_best(folder: Path, weights: dict[str, Tensor], step: int) -> None:
    path = _best_path(folder, step)
    write_directory(
        path, lambda partial: save_file(weights, partial / "weights.safetensors"), lambda whole: load_file(whole / "weights.safetensors")
    )


def _measurements(progress: Progress, world: World, trainable: int, backbone: AnyBackbone) -> dict[str, Any]:
    tokens = progress.source_tokens + progress.target_tokens
    peaks = distributed.gather(_peak_memory_bytes(world))
    return {
        "steps": progress.step,
        "train_seconds": round(progress.seconds, 3),
        "tokens_per_second": round(tokens / progress.seconds, 1) if progress.seconds else None,
        "seconds_per_step": round(progress.seconds / progress.step, 4) if progress.step else None,
        "peak_memory_bytes": max(peaks),
        "peak_memory_bytes_by_rank": peaks,
        "peak_memory_kind": "torch.cuda.max_memory_allocated" if world.device.type == "cuda" else "peak resident set",
        "trainable_parameters": trainable,
        "backbone_parameters": backbone.num_parameters,
        "backbone_bytes_by_rank": distributed.gather(backbone.weight_bytes()),
        "trainable_share_percent": round(100 * trainable / backbone.num_parameters, 4),
        "world_size": world.size,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
    }


def _peak_memory_bytes(world: World) -> int:
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _versions() -> dict[str, str]:
    names = ("lst_scale", "torch", "transformers", "deepspeed", "bitsandbytes")
    return {name: version(name) for name in names} | {"python": sys.version.split()[0]}


def _write_result(folder: Path, result: dict[str, Any]) -> None:
    finished = {"finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    write_file(folder / RESULT, json.dumps(result | finished, indent=2) + "\n")


def _closing_sentence(result: dict[str, Any], folder: Path) -> str:
    return (
        f"{result['split']} score {result['scores']['score']:.2f} (majority {result['majority']['score']:.2f}), "
        f"{result['train_seconds']:.0f} s of training, peak memory {result['peak_memory_bytes'] / 2**30:.2f} GiB a process "
        f"({result['peak_memory_kind']}), {result['trainable_parameters']:,} trainable parameters "
        f"({result['trainable_share_percent']} %); saved in {folder}"
    )

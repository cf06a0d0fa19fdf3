"""What the members of a run share: data, and one backbone or its tap cache. Filling that cache ahead of a run is here too.

Data comes first: a wrong file is found before any weight is read, and before the run's folder is touched.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
from lst_scale.data.encode import EncodedSplit, encode, weighted_by_row
from lst_scale.data.scores import try_own_metrics
from lst_scale.data.tasks import TaskData, load_task
from lst_scale.data.tokenizer import SAMPLED_ROWS, load_tokenizer, refuse_misfit, refuse_unknown_text
from lst_scale.errors import BackboneError
from lst_scale.images.features import ImageReader
from lst_scale.methods import check_method
from lst_scale.methods.images import vision_config
from lst_scale.methods.lst import SharedPasses, inputs_of, ladder_config, taps_of, with_keys
from lst_scale.recipe.schema import LstRecipe, Recipe
from lst_scale.runs.logs import Logger
from lst_scale.side.network import SideNetwork
from lst_scale.system import distributed
from lst_scale.system.distributed import World

CHECKED_ROWS = 8  # of the quantization check: enough tokens for a stable error, little memory


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What all members of a run have in common: data, and one backbone."""

    world: World
    task: TaskData
    tokenizer: Any
    splits: dict[str, EncodedSplit]
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

    task: TaskData
    tokenizer: Any
    splits: dict[str, EncodedSplit]
    sentences: tuple[str, ...]
    reading: Reading
    context: Context | None


def load_data(recipe: Recipe) -> Data:
    """Read and encode the rows, and refuse what can't be trained on. It changes nothing, so it comes before the run's folder.

    Raises:
        LstScaleError: anything the user can fix, in one line.
    """
    task, context = with_context(load_task(recipe), recipe.backbone.context)
    try_own_metrics(task)
    tokenizer, unknown = load_fitting_tokenizer(recipe, task)
    reading = _reading(recipe, tokenizer, context)
    splits = {name: _encode(rows, reading, recipe, task.target_prefix) for name, rows in task.splits().items()}
    splits = with_images(splits, recipe)
    if not isinstance(recipe.task, str) and recipe.task.loss == "example_mean":
        splits["train"] = weighted_by_row(splits["train"])
    before = None if context is None else sentence_of(context, reading)
    said = (unknown, cuts(splits, recipe.data), unmatchable_share(task, tokenizer), before)
    return Data(
        task=task,
        tokenizer=tokenizer,
        splits=splits,
        sentences=tuple(sentence for sentence in said if sentence is not None),
        reading=reading,
        context=context,
    )


def load_shared(recipes: Sequence[Recipe], world: World, logger: Logger, data: Data | None = None) -> Shared:
    """Load the data if need be, then the backbone, for recipes that differ in their side networks alone. All ranks must call it.

    Raises:
        LstScaleError: anything the user can fix, in one line.
    """
    recipe = recipes[0]
    data = data or load_data(recipe)
    task, tokenizer, splits = data.task, data.tokenizer, data.splits
    for sentence in data.sentences:
        logger.say(sentence)
    distributed.poll_interruption(world)
    start = time.perf_counter()
    live = None if recipe.cache.enabled else load_placed(recipe.backbone, world)
    backbone: Backbone
    run_once = data.reading.run_once
    if live is not None:
        _check_quantization(live, splits["train"], recipe, logger)
        backbone = live.after(run_once) if run_once else live
    else:
        backbone, splits = _remembering(recipes, splits, world, logger, run_once)
    loading = {
        "loading_seconds": round(time.perf_counter() - start, 3),
        "peak_memory_bytes_after_loading_by_rank": distributed.gather(peak_memory_bytes(world)),
    }
    distributed.poll_interruption(world)
    return Shared(
        world=world,
        task=task,
        tokenizer=tokenizer,
        splits=splits,
        backbone=backbone,
        loading=loading,
        passes=SharedPasses(backbone=backbone, request=_request(recipes, backbone.spec)),
        reading=data.reading,
        context=data.context,
    )


def with_images(splits: dict[str, EncodedSplit], recipe: Recipe) -> dict[str, EncodedSplit]:
    """Return splits whose batches bring the features of their images, where rows have some; features that are missing are made.

    Raises:
        LstScaleError: a picture or the image model can't be used.
    """
    if recipe.vision is None:
        return splits
    reader = ImageReader(recipe.vision)
    return {name: replace(split, images=reader.read(row.images for row in split.rows)) for name, split in splits.items()}


def build_cache(recipe: Recipe) -> tuple[int, Path]:
    """Run the training rows that are not in the tap cache through the backbone; return how many rows there are, and the cache's folder.

    Ranks share the rows. Batches are evaluation's: neighbours in length together.

    Raises:
        LstScaleError: anything the user can fix, in one line; another run that writes the same rows at the moment.
    """
    check_method(recipe)
    world = distributed.connect()
    with Logger(None) as logger:
        task, context = with_context(load_task(recipe), recipe.backbone.context)
        tokenizer, _ = load_fitting_tokenizer(recipe, task)
        reading = _reading(recipe, tokenizer, context)
        encoded = {"train": _encode(task.train, reading, recipe, task.target_prefix)}
        backbone, splits = _remembering([recipe], encoded, world, logger, reading.run_once)
        split = splits["train"]
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
    return len(split), backbone.cache.folder


def load_fitting_tokenizer(recipe: Recipe, task: TaskData) -> tuple[Any, str | None]:
    """Return the backbone's tokenizer, which fits its vocabulary, the training texts and the labels; and what it does not know of them.

    Raises:
        DataError: it does not fit.
        BackboneError: the checkpoint's config.json can't be meant.
    """
    checkpoint = recipe.backbone.checkpoint
    tokenizer = load_tokenizer_of(checkpoint, recipe.backbone.revision)
    unknown = refuse_unknown_text(tokenizer, [row.source for row in task.train[:SAMPLED_ROWS]], checkpoint)
    refuse_unanswerable(task, tokenizer, recipe.data, recipe.evaluation)
    return tokenizer, unknown


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
    configs = [ladder_config(recipe.method, spec, vision_config(recipe)) for recipe in recipes if isinstance(recipe.method, LstRecipe)]
    return union([SideNetwork.request_of(config) for config in configs]) if configs else None


def _taps_of(recipes: Sequence[Recipe], spec: BackboneSpec) -> TapRequest:
    request = _request(recipes, spec)
    assert request is not None, "check_method refuses a tap cache for other methods"
    return request


def _reading(recipe: Recipe, tokenizer: Any, context: Context | None) -> Reading:
    return reading_after(None if context is None else context.text, tokenizer, beside_backbone=recipe.method.beside_backbone)


def _encode(rows: Any, reading: Reading, recipe: Recipe, target_prefix: str) -> EncodedSplit:
    limits = (recipe.data.max_source_length, recipe.data.max_target_length)
    return encode(rows, reading.tokenizer, *limits, target_prefix, reading.before)


def _remembering(
    recipes: Sequence[Recipe], splits: dict[str, EncodedSplit], world: World, logger: Logger, context: Sequence[int]
) -> tuple[CachingBackbone, dict[str, EncodedSplit]]:
    """Open the backbone's tap cache, and return splits with their keys; the backbone itself is loaded only if a row is missing there."""
    recipe = recipes[0]

    def check(live: Backbone) -> None:
        logger.say("some rows are not in the tap cache: the backbone is loaded")
        _check_quantization(live, splits["train"], recipe, logger)

    backbone = load_caching(recipe.backbone, recipe.cache, world, lambda spec: _taps_of(recipes, spec), check, context)
    splits = {name: with_keys(split, backbone.spec) for name, split in splits.items()}
    rows = splits["train"].keys
    assert rows is not None
    writes = backbone.claim_rows(rows, world)
    missing = ~backbone.known(rows)
    num_missing = int(missing.sum())
    if writes:
        backbone.cache.refuse_if_too_large(*map(int, rows.lengths[missing].sum(0, dtype=np.int64)))
    why = backbone.lock.refused
    others = f"the others can't be written: {why}" if why else "another run writes the others"
    elsewhere = f"; {others}" if num_missing and not writes else ""
    logger.say(f"tap cache {backbone.cache.folder}: {len(rows) - num_missing:,} of {len(rows):,} training rows are there{elsewhere}")
    return backbone, splits


def _check_quantization(backbone: Backbone, split: EncodedSplit, recipe: Recipe, logger: Logger) -> None:
    """Compare a quantized backbone with its checkpoint on the first rows, and log what was found."""
    if backbone.identity.precision not in QUANTIZED:
        return
    batch = collate(split, range(min(CHECKED_ROWS, len(split))))
    report = check_quantization(backbone, inputs_of(batch, backbone.spec), recipe.backbone.max_quantization_error)
    logger.say(report.sentence)

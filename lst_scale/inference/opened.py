"""What a pipeline runs on: a finished run, or a side network that was saved by itself, with all that its answers depend on."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lst_scale.backbone import as_backbone
from lst_scale.backbone.placement.load import load_alone
from lst_scale.backbone.taps import Backbone
from lst_scale.data.chat import Chat
from lst_scale.data.context import Reading, reading_after, reading_of
from lst_scale.data.prompts import PromptTokenizer, ends_no_text, in_way
from lst_scale.data.tasks import way_of
from lst_scale.errors import ArgumentError
from lst_scale.inference.predict import answering, ways_of
from lst_scale.inference.scored_run import ScoredRun
from lst_scale.methods.base import Predictor
from lst_scale.methods.lst import SharedPasses
from lst_scale.recipe.schema import EvaluationRecipe
from lst_scale.runs.folder import RECIPE
from lst_scale.side import files
from lst_scale.side.card import LIVE
from lst_scale.side.model import LadderModel
from lst_scale.system.distributed import World
from lst_scale.training.shared import load_tokenizer_of

DEFAULT_TOKENS = 64  # that an answer has at most, where no run says how long its targets were


@dataclass(frozen=True, kw_only=True)
class AnyAnswer:
    """How a batch is answered; a `scored_run.Way`."""

    kind: str
    labels: tuple[str, ...] | None
    numbers: tuple[str, ...] | None = None
    longest: int | None
    evaluation: EvaluationRecipe
    target_prefix: str = ""
    by_first_token: bool = False


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model that answers, and how."""

    model: Predictor
    passes: SharedPasses
    way: AnyAnswer
    reading: Reading
    run: ScoredRun | None
    chat: Chat | None  # of a run on conversations
    folder: Path
    closing: contextlib.ExitStack


def open_run(folder: Path, overrides: Sequence[str], device: torch.device, backbone: Backbone | None) -> Opened:
    """Open a finished run.

    Raises:
        LstScaleError: it is not finished, damaged, or reads pictures.
    """
    run = ways_of([folder], overrides, probabilities=False)
    if run.recipe.vision is not None:
        raise ArgumentError(
            f"{folder} reads pictures, which a pipeline is not given: write lst-scale predict {folder} ROWS --output ANSWERS"
        )
    tokenizer = load_tokenizer_of(run.recipe.backbone.checkpoint, run.recipe.backbone.revision)
    chat = Chat(tokenizer, run.recipe.backbone.checkpoint, run.recipe.backbone.context) if run.conversational else None
    tokenizer = in_way(tokenizer, way_of(run.task, chat))
    reading = reading_after(run.context, tokenizer, beside_backbone=run.recipe.method.beside_backbone)
    if backbone is not None and not run.recipe.method.beside_backbone:
        raise ArgumentError(f"{folder} trained method {run.recipe.method.name}, which changes the backbone: leave backbone out")
    placement = run.recipe.backbone.placement
    if not placement.each_rank_alone:
        raise ArgumentError(f"placement {placement.name} needs several processes, and a pipeline is one: add backbone.placement=replicated")
    closing = contextlib.ExitStack()
    world = World(rank=0, size=1, local_rank=0, device=device)
    backbone = backbone or load_alone(run.recipe.backbone, world)  # this process asks no other, and may be no rank at all
    model, passes = closing.enter_context(answering([folder], run.recipe, world, reading, run.labels, backbone))
    way = AnyAnswer(
        kind=run.kind,
        labels=run.labels,
        numbers=run.numbers,
        longest=run.longest,
        evaluation=run.evaluation,
        target_prefix=run.target_prefix,
        by_first_token=run.by_first_token,
    )
    return Opened(model=model, passes=passes, way=way, reading=reading, run=run, chat=chat, folder=folder, closing=closing)


def open_side_network(
    folder: Path, overrides: Sequence[str], device: torch.device, backbone: Backbone | None, labels: Sequence[str] | None, tokenizer: Any
) -> Opened:
    """Open a side network that was saved without a run.

    Raises:
        LstScaleError: it is damaged, or nothing says what its backbone's tokenizer is.
    """
    if overrides:
        raise ArgumentError(f"{folder} holds a side network without a recipe, of which {overrides[0]} would change something: leave it out")
    saved = files.read(folder)
    name = saved.identity.checkpoint
    if tokenizer is None and name == LIVE:
        raise ArgumentError(
            f"{folder} was trained beside a model without a name, so its tokenizer is not known: write tokenizer=, backbone="
        )
    tokenizer = load_tokenizer_of(name, saved.identity.revision) if tokenizer is None else _as_ours(tokenizer)
    model = LadderModel.from_pretrained(folder, backbone).to(device).requires_grad_(False)
    reading = reading_of(model.backbone.identity.context, tokenizer)
    evaluation = EvaluationRecipe(method="generation" if labels is None else "likelihood")
    way = AnyAnswer(
        kind="text" if labels is None else "classification",
        labels=None if labels is None else tuple(labels),
        longest=DEFAULT_TOKENS,
        evaluation=evaluation,
    )
    passes = SharedPasses(backbone=model.backbone, request=model.side.request)
    return Opened(model=model, passes=passes, way=way, reading=reading, run=None, chat=None, folder=folder, closing=contextlib.ExitStack())


def open_folder(
    folder: Path, overrides: Sequence[str], device: str | None, backbone: Any, labels: Sequence[str] | None, tokenizer: Any
) -> Opened:
    """Open either."""
    if backbone is not None and device is not None:
        raise ArgumentError(f"a backbone that is given stays where it is, so device={device!r} has no effect: leave one of them out")
    frozen = None if backbone is None else as_backbone(backbone)
    usual = torch.device("cuda" if torch.cuda.is_available() else "cpu") if frozen is None else frozen.device
    where = usual if device is None else torch.device(device)
    if not (folder / RECIPE).is_file():
        return open_side_network(folder, overrides, where, frozen, labels, tokenizer)
    for name, given in (("labels", labels), ("tokenizer", tokenizer)):
        if given is not None:
            raise ArgumentError(f"{folder} is a run, which has its own {name}: leave {name} out")
    return open_run(folder, overrides, where, frozen)


def _as_ours(tokenizer: Any) -> Any:
    already = isinstance(tokenizer, PromptTokenizer) or not ends_no_text(tokenizer)
    return tokenizer if already else PromptTokenizer(tokenizer)

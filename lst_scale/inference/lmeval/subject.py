"""What is evaluated: a finished run of any method, a side network that was saved by itself, or a backbone as it was published."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lst_scale.backbone.model_config import find_config, read_config
from lst_scale.backbone.placement.load import load_alone
from lst_scale.backbone.taps import Replica
from lst_scale.data.chat import Chat, without_template
from lst_scale.data.context import Reading
from lst_scale.errors import ArgumentError
from lst_scale.inference.opened import open_folder
from lst_scale.methods.base import Predictor
from lst_scale.methods.full import WholeModel
from lst_scale.methods.lst import SharedPasses
from lst_scale.recipe import decode
from lst_scale.recipe.backbone import BackboneRecipe
from lst_scale.recipe.decode import Section
from lst_scale.recipe.method import ProbeRecipe
from lst_scale.recipe.schema import load_recipe
from lst_scale.runs.folder import RECIPE
from lst_scale.system.distributed import World
from lst_scale.training.shared import load_tokenizer_of

BATCH_SIZE = 64  # prompts at once, where no run says how it was scored
LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx")  # in a config.json, in the order in which lm_eval looks
USUAL_LENGTH, NO_LENGTH = 2048, 10**9  # what lm_eval takes where nothing is said; what no tokenizer means


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that answers, and how it reads text."""

    model: Predictor
    passes: SharedPasses
    reading: Reading
    chat: Chat | None  # of a run on conversations
    batch_size: int
    about: dict[str, Any]  # what a result says of it
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def tokenizer(self) -> Any:
        return self.reading.tokenizer

    @property
    def most_tokens(self) -> int:
        """How many tokens prompt and answer have together at most: as many as there are positions, without those of a context."""
        identity = self.passes.backbone.identity
        path = find_config(identity.checkpoint, identity.revision)
        config = {} if path is None else read_config(path)
        said = [config[key] for key in LENGTHS if config.get(key)] or [self.tokenizer.model_max_length]
        return (int(said[0]) if said[0] < NO_LENGTH else USUAL_LENGTH) - self.reading.length


class _BackboneAlone(Section):
    backbone: BackboneRecipe


def refuse_before(folder: Path | None, overrides: Sequence[str]) -> None:
    """Refuse what can't be evaluated, or an override without effect, before anything is loaded.

    Raises:
        LstScaleError: says what to do instead.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ArgumentError("lst-scale eval is one process: start it without a launcher")
    for override in overrides:
        key = override.partition("=")[0]
        if not key.startswith("backbone.") and (key != "task" or folder is None):
            raise ArgumentError(
                f"{key} has no effect on tasks of lm_eval, which write prompts of their own: remove it (what has: backbone)"
            )
    if folder is None:
        return
    if not folder.is_dir():
        raise ArgumentError(f"{folder} is no folder: give that of a finished run, or of a saved side network")
    if not (folder / RECIPE).is_file():
        return
    recipe = load_recipe(str(folder / RECIPE))
    if isinstance(recipe.method, ProbeRecipe):
        raise ArgumentError(
            f"{folder} is a probe, which tells its own labels apart and knows no other text: its score is in its result.json, "
            f"and lst-scale predict {folder} ROWS answers"
        )


def open_subject(folder: Path | None, checkpoint: str | None, overrides: Sequence[str]) -> Subject:
    """Open a folder, or else a backbone by its name.

    Raises:
        LstScaleError: it can't be opened.
    """
    if folder is None:
        assert checkpoint is not None
        return _backbone_alone(checkpoint, overrides)
    opened = open_folder(folder, overrides, None, None, None, None)
    run = opened.run
    return Subject(
        model=opened.model,
        passes=opened.passes,
        reading=opened.reading,
        chat=opened.chat,
        batch_size=BATCH_SIZE if run is None else run.evaluation.batch_size,
        about=_about(opened.passes, opened.reading, folder, "lst" if run is None else run.recipe.method.name),
        closing=opened.closing,
    )


def _backbone_alone(checkpoint: str, overrides: Sequence[str]) -> Subject:
    tree: dict[str, Any] = {"backbone": {"checkpoint": checkpoint}}
    problems = decode.apply_overrides(tree, overrides)
    recipe = decode.build(_BackboneAlone, tree, problems).backbone
    if recipe.checkpoint != checkpoint:
        raise ArgumentError("--backbone and backbone.checkpoint are one thing: leave the second out")
    if recipe.context is not None or not recipe.placement.trains_inside:
        raise ArgumentError("--backbone evaluates a model whole and as it is: leave backbone.context and backbone.placement out")
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    reading = Reading(tokenizer=load_tokenizer_of(recipe.checkpoint, recipe.revision))
    backbone = load_alone(recipe, world)
    passes = SharedPasses(backbone=backbone, request=None)
    return Subject(
        model=WholeModel(backbone.give_model(), backbone, Replica(), contextlib.nullcontext),
        passes=passes,
        reading=reading,
        chat=None,
        batch_size=BATCH_SIZE,
        about=_about(passes, reading, None, None),
    )


def _about(passes: SharedPasses, reading: Reading, folder: Path | None, method: str | None) -> dict[str, Any]:
    identity = passes.backbone.identity
    return {
        "run": None if folder is None else str(folder),
        "method": method,
        "backbone": identity.checkpoint,
        "precision": identity.precision,
        "context_tokens": reading.length,
    }


def refuse_without_template(subject: Subject) -> None:
    """Refuse a tokenizer that writes no conversations.

    Raises:
        ArgumentError: it has no chat template.
    """
    if subject.chat is None and getattr(subject.tokenizer, "chat_template", None) is None:
        raise ArgumentError(f"--chat: {without_template(subject.passes.backbone.identity.checkpoint)}; or leave --chat out")

"""A member that takes no steps: the frozen backbone runs over its rows once, and validation chooses what is fitted to its states.

There is nothing to resume: a run that was ended goes over the rows again, with a tap cache from disk.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lst_scale.data.batches import FILLER, Batch, evaluation_batches
from lst_scale.data.encode import EncodedSplit
from lst_scale.data.rows import targets_of
from lst_scale.data.scores import score_rows
from lst_scale.errors import BackboneError, LstScaleError
from lst_scale.methods.linear import LinearMap, fits
from lst_scale.methods.probe import Probe
from lst_scale.recipe.method import ProbeRecipe
from lst_scale.recipe.schema import Recipe
from lst_scale.runs.logs import Logger
from lst_scale.system import distributed
from lst_scale.system.preemption import Interrupted
from lst_scale.training.checkpoint import Progress
from lst_scale.training.finish import finish
from lst_scale.training.sessions import TRAINING, BackboneRequest, Moment, Session
from lst_scale.training.shared import Shared


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A fitted map, and what chooses it: the validation score, then the loss on those rows."""

    layers: tuple[int, ...]
    weight_decay: float
    score: float
    loss: float  # nats a row
    fitted: LinearMap

    @property
    def rank(self) -> tuple[float, float]:
        return self.score, -self.loss


@dataclass(frozen=True, kw_only=True)
class Passed:
    """What one pass over the rows of a split left: states and numbers of labels, by row, on rank 0; elsewhere this rank's alone."""

    states_NF: Tensor
    labels_N: Tensor


class FittedMember:
    """One run of a linear probe on what a `Shared` holds."""

    def __init__(self, recipe: Recipe, folder: Path, logger: Logger, shared: Shared) -> None:
        self.recipe, self.folder, self.logger, self.shared = recipe, folder, logger, shared
        (self._rows,) = shared.tasks
        assert isinstance(recipe.method, ProbeRecipe) and self._rows.task.labels is not None
        self._probe = Probe(recipe.method, shared.backbone, self._rows.task.labels)
        self._method = recipe.method
        self._seconds, self._tokens, self._asked = 0.0, [0, 0], 0

    def session(self) -> Session[dict[str, Any]]:
        """Go over the rows, fit, choose and finish; return what result.json holds."""
        try:
            self.logger.truncate_after(0, 0)
            self.logger.say(self._plan())
            train = yield from self._pass(self._rows.train)
            validation = yield from self._pass(self._rows.splits["validation"])
            start = time.perf_counter()
            weights, score, trainable = distributed.on_main_rank(self.shared.world, lambda: self._fit(train, validation))
            progress = Progress(
                step=1,
                evaluated_at=1,
                best_step=1,
                best_score=score,
                finished=True,
                seconds=self._seconds + time.perf_counter() - start,
                source_tokens=self._tokens[0],
                target_tokens=self._tokens[1],
            )
            run = (self.recipe, self.folder, self.logger, self.shared, self._probe)
            result = yield from finish(*run, weights, progress, trainable=trainable)
            self.logger.callbacks.on_end(result, None)
            return result
        except LstScaleError as error:
            if not isinstance(error, Interrupted):
                self.logger.say(f"failed: {error}")
            self.logger.callbacks.on_end(None, error)
            raise

    def _plan(self) -> str:
        train, validation = (len(self._rows.splits[name]) for name in ("train", "validation"))
        size = (train + validation) * self._probe.width * 4
        blocks = len(self._probe.layers)
        return (
            f"{self.recipe.run_name}: one pass over {train:,} training rows and {validation:,} of validation, on {self.shared.world.size} "
            f"process{'es' if self.shared.world.size > 1 else ''} ({self.shared.world.device.type}); the states of {blocks} "
            f"block{'s' if blocks > 1 else ''} take {size / 1e9:.2f} GB on the first"
        )

    def _pass(self, split: EncodedSplit) -> Session[Passed]:
        """Return the states of all rows on rank 0. All ranks run as many batches, as some placements need."""
        mine: list[Tensor] = []
        rows: list[int] = []
        batches = _batches(split, self._rows.evaluation.batch_size, self.shared.world.rank, self.shared.world.size)
        batch = next(batches, None)
        while batch is not None:
            distributed.poll_interruption(self.shared.world)
            following = next(batches, None)
            at = Moment(0, TRAINING, self._asked)
            answer = yield BackboneRequest(at=at, batch=batch, following=functools.partial(_itself, following))
            self._asked += 1
            start = time.perf_counter() - answer.seconds
            states_BF = self._probe.states(answer.prepared)
            kept = [place for place, row in enumerate(batch.indices) if row != FILLER]
            mine.append(states_BF[kept])
            rows += [batch.indices[place] for place in kept]
            self._tokens[0] += int(batch.attention_mask_BS.sum())
            self._tokens[1] += len(kept)
            self._seconds += time.perf_counter() - start
            batch = following
        gathered = distributed.gather_on_main(self.shared.world, (torch.tensor(rows, dtype=torch.long), torch.cat(mine)))
        assert self._rows.task.labels is not None
        known = {label: number for number, label in enumerate(self._rows.task.labels)}
        labels_N = torch.tensor([known[target] for target in targets_of(split.rows)])
        states_NF = torch.empty(len(split), self._probe.width) if gathered else mine[0]
        for numbers, states in gathered:
            states_NF[numbers] = states
        distributed.on_main_rank(self.shared.world, lambda: _refuse_not_finite(states_NF, self.recipe))
        return Passed(states_NF=states_NF, labels_N=labels_N)

    def _fit(self, train: Passed, validation: Passed) -> tuple[dict[str, Tensor], float, int]:
        """Try every choice; return the weights of the best, its validation score, and how many weights it has. Rank 0 only."""
        best: Choice | None = None
        for layers in self._probe.choices():
            found = max(self._tried(layers, train, validation), key=lambda each: each.rank)
            self.logger.say(
                f"{_named(layers)}: validation score {found.score:.2f}, loss {found.loss:.4f}, with weight decay {found.weight_decay:g}"
            )
            if best is None or found.rank > best.rank:
                best = found
        assert best is not None
        self.logger.evaluated(1, {"score": best.score, "loss": best.loss}, {})
        self.logger.say(f"chosen by validation: {_named(best.layers)}, weight decay {best.weight_decay:g}, score {best.score:.2f}")
        trainable = best.fitted.weight_LF.numel() + best.fitted.bias_L.numel()
        return self._probe.widened(best.fitted, best.layers), best.score, trainable

    def _tried(self, layers: tuple[int, ...], train: Passed, validation: Passed) -> Iterator[Choice]:
        columns, task = self._probe.columns(layers), self._rows.task
        assert task.labels is not None
        states_NF, held_MF = (passed.states_NF[:, columns] for passed in (train, validation))
        rows = self._rows.splits["validation"].rows
        for decay, fitted in fits(states_NF, train.labels_N, len(task.labels), self._method.weight_decay):
            logits_ML = fitted(held_MF)
            score = score_rows(task, [task.labels[int(best)] for best in logits_ML.argmax(-1)], rows)["score"]
            loss = float(torch.nn.functional.cross_entropy(logits_ML, validation.labels_N))
            yield Choice(layers=layers, weight_decay=decay, score=score, loss=loss, fitted=fitted)


def _refuse_not_finite(states_NF: Tensor, recipe: Recipe) -> None:
    wrong = (~torch.isfinite(states_NF).all(1)).nonzero()[:, 0].tolist()
    if wrong:
        mend = "" if recipe.backbone.precision == "fp32" else ", or write backbone.precision=fp32"
        where = f"in row {wrong[0] + 1}: look at the weights of {recipe.backbone.checkpoint}{mend}"
        raise BackboneError(f"the backbone's states are not finite {where}")


def _batches(split: EncodedSplit, size: int, rank: int, world_size: int) -> Iterator[Batch]:
    return evaluation_batches(split, batch_size=size, rank=rank, world_size=world_size, equally_many=True)


def _itself(batch: Batch | None) -> Batch | None:
    return batch


def _named(layers: tuple[int, ...]) -> str:
    return f"block {layers[0]}" if len(layers) == 1 else f"{len(layers)} blocks together"

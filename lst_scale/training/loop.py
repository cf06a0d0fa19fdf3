"""The training loop: taps, side network, loss, step; evaluation and checkpoints at step boundaries.

One optimizer step covers one global batch, whatever the number of ranks and micro-batches. Its loss is the mean over all target
tokens of the global batch (the paper's, on one GPU), so that one process and eight give the same gradient.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lst_scale.data.ahead import Ahead
from lst_scale.data.batches import Batch, MixedSteps, Step, Steps, global_batches
from lst_scale.data.encode import EncodedSplit
from lst_scale.data.stream import Stream
from lst_scale.errors import BackboneError, LstScaleError, TrainingError
from lst_scale.methods.base import Trainee
from lst_scale.recipe.method import ProbeRecipe
from lst_scale.recipe.schema import Recipe
from lst_scale.runs.logs import Logger
from lst_scale.system import distributed, preemption
from lst_scale.system.distributed import World
from lst_scale.system.preemption import Interrupted
from lst_scale.training.checkpoint import Progress, remove_old_checkpoints, remove_unneeded_best, save_checkpoint, update_progress
from lst_scale.training.engine import full_weights, set_learning_rate, snapshot
from lst_scale.training.schedule import learning_rate
from lst_scale.training.sessions import TRAINING, BackboneRequest, Moment, Session, timed
from lst_scale.training.trace import Trace

Scores = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many steps there are and where they fall; derived from recipe, data and world."""

    steps_per_epoch: int
    total_steps: int
    micro_batch_size: int  # rows of the largest
    accumulation: int
    evaluate_every: int  # steps
    save_every: int  # steps


def make_plan(recipe: Recipe, sizes: Sequence[tuple[int, int]], epochs: int, world_size: int) -> Plan:
    """Derive the plan of a run over tasks of these sizes: training rows, and rows of a step on the task.

    All steps have as many micro-batches: as the largest needs.
    """
    training = recipe.training
    steps_per_epoch = sum(-(-rows // batch) for rows, batch in sizes)
    total_steps = steps_per_epoch * epochs
    if training.max_steps is not None:
        total_steps = min(total_steps, training.max_steps)
    rows_a_rank = -(-max(batch for _, batch in sizes) // world_size)
    micro_batch_size = min(training.micro_batch_size or rows_a_rank, rows_a_rank)
    evaluate_every = steps_per_epoch if training.evaluate_every == "epoch" else training.evaluate_every
    return Plan(
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        micro_batch_size=micro_batch_size,
        accumulation=-(-rows_a_rank // micro_batch_size),
        evaluate_every=evaluate_every,
        save_every=training.save_every_steps or evaluate_every,
    )


class Trainer:
    """Trains one method on one backbone. `member.py` builds the parts, `session` uses them."""

    def __init__(
        self,
        *,
        world: World,
        recipe: Recipe,
        plan: Plan,
        trainee: Trainee,
        engine: Any,
        train: Sequence[tuple[EncodedSplit, int]],
        evaluate: Callable[[dict[str, Tensor], int], Session[Scores]],
        save_best: Callable[[dict[str, Tensor], int], None],
        logger: Logger,
        folder: Path,
        identity: dict[str, Any],
        stream: Stream | None = None,
    ) -> None:
        self.world, self.recipe, self.plan, self.logger = world, recipe, plan, logger
        self.trainee, self.engine = trainee, engine
        self._train = train  # of each task its rows, and how many of them a step has
        self.evaluate, self.save_best = evaluate, save_best
        self.folder, self.identity, self._stream = folder, identity, stream
        self._trace = Trace(recipe.logging.profile_steps, folder, world, logger.say if logger is not None else print)
        self._request: int | None = None  # to leave, of any rank, as the last step's sums told
        self._epochs: dict[int, Sequence[Step]] = {}  # this one and, once its end is near, the next
        self._steps = Ahead(self._gather, plan.total_steps)

    def session(self, progress: Progress) -> Session[Progress]:
        """Train from `progress` to the end, or until the score has not improved for `training.patience` evaluations."""
        plan = self.plan
        self.logger.start_bar(plan.total_steps, progress.step)
        self.logger.record("plan", progress.step, {"total_steps": plan.total_steps, "steps_per_epoch": plan.steps_per_epoch})
        self._saved = progress
        try:
            return (yield from self._train_to_the_end(progress))
        finally:
            self._trace.close()

    def _train_to_the_end(self, progress: Progress) -> Session[Progress]:
        plan = self.plan
        while True:
            try:
                self._leave_if_asked()
                if self._evaluation_is_due(progress):
                    self._keep(progress)  # an evaluation that fails, or is killed, loses no step
                    progress = yield from self._evaluate(progress)
                    self._keep(progress)
            except Interrupted:
                self._keep(progress)
                self.logger.say(f"step {progress.step}: saved on a signal; --resume goes on from here")
                raise
            last = progress.step == plan.total_steps or progress.finished
            if progress.step % plan.save_every == 0 or last:
                self._keep(progress)
            if last:
                return replace(progress, finished=True)
            try:
                self._trace.before(progress.step + 1)
                progress = yield from self._train_step(self._steps[progress.step], progress)
                self._trace.after(progress.step)
            except Interrupted:  # thrown in while others left: this step was not taken
                self._keep(progress)
                self.logger.say(f"step {progress.step}: saved on a signal; --resume goes on from here")
                raise

    def _leave_if_asked(self) -> None:
        """Leave together when any rank was asked to: the step before has asked all ranks with its own sums."""
        if self._request is None:
            distributed.poll_interruption(self.world)
            return
        request, self._request = self._request, None
        preemption.leave_if(request)

    def _evaluation_is_due(self, progress: Progress) -> bool:
        last = progress.step == self.plan.total_steps
        return progress.step > progress.evaluated_at and (progress.step % self.plan.evaluate_every == 0 or last)

    def _after(self, number: int, index: int) -> Batch | None:
        """Return the micro-batch after the given one of step `number`: in it, or the first of the next step."""
        micro_batches = self._steps[number].micro_batches
        if index + 1 < len(micro_batches):
            return micro_batches[index + 1]
        return self._steps[number + 1].micro_batches[0] if number + 1 < self.plan.total_steps else None

    def _gather(self, number: int) -> Step:
        """Return a step by its number, with its rows; of the epochs the one before is kept, too. Always called in one thread."""
        if self._stream is not None:
            step = self._stream[number]
            return replace(step, micro_batches=list(step.micro_batches))
        epoch, index = divmod(number, self.plan.steps_per_epoch)
        if epoch not in self._epochs:
            self._epochs = {kept: steps for kept, steps in self._epochs.items() if kept == epoch - 1} | {epoch: self._steps_of(epoch)}
        step = self._epochs[epoch][index]
        return replace(step, micro_batches=list(step.micro_batches))

    def _steps_of(self, epoch: int) -> Sequence[Step]:
        data = self.recipe.data
        order = {"epoch": epoch, "seed": self.recipe.seed if data.shuffle_seed is None else data.shuffle_seed}
        ranks = {"micro_batches": self.plan.accumulation, "rank": self.world.rank, "world_size": self.world.size}
        each = [Steps(split, global_batches(split, size=size, pool=data.length_pool, **order), **ranks) for split, size in self._train]
        return MixedSteps(each, **order)

    def _train_step(self, step: Step, progress: Progress) -> Session[Progress]:
        """Run one global batch: forward and backward of every micro-batch, one look at the loss, one optimizer step."""
        rate = learning_rate(self.recipe.optimizer, progress.step, self.plan.total_steps)
        if self._stream is not None:  # each rank knows its own rows alone
            own = torch.tensor([step.num_target_tokens], dtype=torch.float64, device=self.world.device)
            step = replace(step, num_target_tokens=int(distributed.sum_over_ranks(own)[0]))
        losses: list[Tensor] = []
        source_tokens, seconds = 0, 0.0
        last = len(step.micro_batches) - 1
        for index, batch in enumerate(step.micro_batches):
            following = functools.partial(self._after, progress.step, index)
            answer = yield BackboneRequest(at=Moment(progress.step, TRAINING, index), batch=batch, following=following)
            start = time.perf_counter() - answer.seconds  # while others trained, the clock stood still
            torch.manual_seed(_step_seed(self.recipe.seed, progress.step, self.world.rank, index))
            losses.append(self._forward_backward(batch, answer.prepared, step.divisor))
            del answer  # or the next micro-batch's taps would be made beside these
            source_tokens += int(batch.attention_mask_BS.sum())
            if index == last:
                loss, all_source_tokens = self._agree_on_loss(losses, source_tokens, step, progress.step)
                set_learning_rate(self.engine, rate)
            self.engine.step()
            if index == last:
                self._refuse_gradient(progress.step)
            seconds += time.perf_counter() - start
        progress = replace(
            progress,
            step=progress.step + 1,
            seconds=progress.seconds + seconds,
            source_tokens=progress.source_tokens + all_source_tokens,
            target_tokens=progress.target_tokens + step.num_target_tokens,
        )
        self._log_step(progress, loss, rate, seconds)
        return progress

    def _forward_backward(self, batch: Batch, prepared: Any, divisor: int) -> Tensor:
        """Return this micro-batch's summed negative log-likelihood, in nats, where it was made: nobody waits for a GPU here."""
        nll = self.trainee.nll(self.engine, batch, prepared)
        # DeepSpeed averages over ranks and micro-batches; undo both, so that every token (or row) of the global batch weighs the same.
        scale = self.world.size * self.plan.accumulation / divisor
        self.engine.backward(nll * scale)
        return nll.detach()

    def _agree_on_loss(self, losses: list[Tensor], source_tokens: int, taken: Step, step: int) -> tuple[float, int]:
        """Return the global batch's mean loss and source tokens; raise on every rank when any rank's loss is not finite.

        One sum over all ranks, and one wait for the device: who was asked to leave is told with it.
        """
        size, rank = self.world.size, self.world.rank
        nll = functools.reduce(torch.add, [loss.double() for loss in losses])  # in order, as one float after another
        finite = nll.isfinite()
        told = torch.zeros(2 + 2 * size, dtype=torch.float64)
        told[1], told[2 + size + rank] = source_tokens, int(preemption.requested())
        told = told.to(nll.device)
        told[0], told[2 + rank] = torch.where(finite, nll, 0.0), ~finite
        total_nll, total_source, *flags = distributed.sum_over_ranks(told)
        self._request = int(max(flags[size:]))
        ranks = [str(rank) for rank, flag in enumerate(flags[:size]) if flag]
        if ranks:
            self._refuse_loss(losses, taken, step, ranks)
        return total_nll / taken.divisor, int(total_source)

    def _refuse_loss(self, losses: list[Tensor], taken: Step, step: int, ranks: list[str]) -> None:
        """Say what made a loss that is not finite. All ranks look at one micro-batch again, since some backbones run on all at once."""
        wrong = [index for index, loss in enumerate(losses) if not loss.isfinite()]
        prepared = self.trainee.prepare(taken.micro_batches[wrong[0] if wrong else 0])
        fault = self.trainee.fault(prepared, fresh=step == 0) if wrong else None
        faults = [found for found in distributed.gather(fault) if found is not None]
        if faults:
            raise self._broken_backbone(faults[0], step)
        raise self._diverged(f"the loss of step {step} is not finite on rank {', '.join(ranks)}; the step was not taken")

    def _refuse_gradient(self, step: int) -> None:
        """Stop after a step whose gradient had no finite norm: clipping made nothing of it, or NaN, and no checkpoint may hold that."""
        norm = self._gradient_norm()
        if norm is not None and not _is_finite(norm):
            raise self._diverged(f"the gradient of step {step} is not finite")

    def _gradient_norm(self) -> float | None:
        """Return the norm before clipping, over all ranks; None under ZeRO 0, which does not tell."""
        norm = self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def _diverged(self, what: str) -> LstScaleError:
        assert not isinstance(self.recipe.method, ProbeRecipe), "it takes no steps"
        mend = "" if self.recipe.method.precision == "fp32" else " or method.precision=fp32"
        return distributed.same_everywhere(
            TrainingError(
                f"{what}: start again (--overwrite) with an optimizer.learning_rate below {self.recipe.optimizer.learning_rate:g}{mend}"
            )
        )

    def _broken_backbone(self, fault: str, step: int) -> LstScaleError:
        backbone = self.recipe.backbone
        mend = "" if backbone.precision == "fp32" else ", or write backbone.precision=fp32"
        return distributed.same_everywhere(
            BackboneError(f"{fault} (step {step}): no learning rate mends that; look at the weights of {backbone.checkpoint}{mend}")
        )

    def _log_step(self, progress: Progress, loss: float, rate: float, seconds: float) -> None:
        due = progress.step % self.recipe.logging.log_every_steps == 0 or progress.step == 1
        self.logger.advance(progress.step, f"loss {loss:.4f}, lr {rate:.2e}, {seconds:.2f} s", say=due)
        if due:
            values: dict[str, Any] = {"loss": loss, "learning_rate": rate, "seconds": round(seconds, 4)}
            norm = self._gradient_norm()
            if norm is not None:
                values["gradient_norm"] = norm
            self.logger.step(progress.step, values)

    def _evaluate(self, progress: Progress) -> Session[Progress]:
        """Score the validation split; remember the best weights; count evaluations without progress towards `patience`."""
        weights = full_weights(self.engine)
        scores, seconds = yield from timed(self.evaluate(weights, progress.step))
        self.logger.evaluated(progress.step, scores | {"seconds": round(seconds, 3)}, self.trainee.openings(weights))
        self.logger.say(f"step {progress.step}: validation " + ", ".join(f"{name} {value:.2f}" for name, value in scores.items()))
        if progress.best_score is None or scores["score"] > progress.best_score or self.recipe.training.result == "last":
            self.save_best(weights, progress.step)
            return replace(
                progress, evaluated_at=progress.step, best_score=scores["score"], best_step=progress.step, evaluations_since_best=0
            )
        since = progress.evaluations_since_best + 1
        patience = self.recipe.training.patience
        if patience is not None and since >= patience:
            self.logger.say(f"step {progress.step}: no better score in {since} evaluations, stopping early")
        finished = patience is not None and since >= patience
        return replace(progress, evaluated_at=progress.step, evaluations_since_best=since, finished=finished)

    def _keep(self, progress: Progress) -> None:
        """Put `progress` on disk unless it is there: as a checkpoint, or as a new state of the one of this step, whose weights it has."""
        if progress == self._saved or progress.step == 0:
            return
        folder = self.folder / "checkpoints"
        if self._saved.step == progress.step:
            distributed.on_main_rank(self.world, lambda: update_progress(folder, progress, self.identity))
        else:
            self._save(folder, progress)
        distributed.on_main_rank(self.world, lambda: remove_unneeded_best(self.folder / "best", folder))
        self._saved = progress

    def _save(self, folder: Path, progress: Progress) -> None:
        state = snapshot(self.engine, keep=self.world.is_main)

        def write() -> None:
            save_checkpoint(folder, state, progress, self.identity)
            remove_old_checkpoints(folder, self.recipe.training.keep_checkpoints, newest=progress.step)

        distributed.on_main_rank(self.world, write)


def _is_finite(value: float) -> bool:
    return value - value == 0.0


def _step_seed(seed: int, step: int, rank: int, micro_batch: int) -> int:
    """Derive the dropout seed of one micro-batch on one rank: a resume needs no random state, and members that train side by side do
    not disturb each other. Odd constants keep neighbours apart."""
    return (seed * 1_000_003 + step * 8_191 + rank * 131 + micro_batch * 65_537 + 1) % 2**63

"""What a method gives the harness: the module that DeepSpeed trains, a loss, a model that answers, and a way to save what was trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lst_scale.backbone.families import family_of
from lst_scale.backbone.taps import BackboneSpec, Replica, TapRequest
from lst_scale.data.batches import Batch
from lst_scale.inputs.images import Images


class Scoring(Protocol):
    """The rows of one batch, about to be scored on several targets. What depends on their source alone is made once."""

    def logits(self, target_BT: Tensor, taps: Any, *, last: bool = False) -> Tensor:
        """Return logits (B, T, V) of one target; `taps`: what the frozen backbone makes of it, None where there is none.

        After the `last` one no other comes, for which something would have to be kept.
        """
        ...


class Predictor(Protocol):
    """A model as evaluation uses it."""

    @property
    def label_head(self) -> Callable[[Any], Tensor] | None:
        """Return what makes log-probabilities of the labels (B, L) straight from taps of any target; None: labels are scored as texts."""
        ...

    @property
    def spec(self) -> BackboneSpec: ...
    @property
    def replica(self) -> Replica: ...
    @property
    def device(self) -> torch.device: ...

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        """Return generated ids (B, T), start token first; `source`: what the frozen backbone makes of the inputs, None: it is made here;
        `image_features`: of the images beside the texts, where there are some."""
        ...

    def scoring(self, input_ids_BS: Tensor, attention_mask_BS: Tensor, images: Images | None = None) -> Scoring: ...

    def text_logits(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """Return logits (B, T, V) of whole texts, padded after their last token, of a model that goes on with a text."""
        ...


class Method(Protocol):
    """One method on one backbone: what it needs of it, a model that answers, and its file."""

    FOLDER: str  # below the run's, where `save` puts what was trained

    @property
    def request(self) -> TapRequest | None:
        """Return what it reads of a frozen backbone beside it; None: nothing."""
        ...

    def evaluating(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[Predictor]:
        """Give a model with these trained weights, in eval mode. All ranks must enter it together."""
        ...

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write what was trained, and nothing else. Rank 0 only."""
        ...

    def load(self, folder: Path) -> dict[str, Tensor]:
        """Return the weights that `save` wrote.

        Raises:
            LadderError: the folder is not whole, or does not fit this backbone.
        """
        ...


class Trainee(Method, Protocol):
    """A method that trains in steps."""

    @property
    def module(self) -> nn.Module:
        """What the engine gets. Those of its parameters that require a gradient are trained and checkpointed, no others."""
        ...

    def prepare(self, batch: Batch) -> Any:
        """Return what can be known of a micro-batch before anything that trains: the taps, or None."""
        ...

    def nll(self, engine: Any, batch: Batch, prepared: Any) -> Tensor:
        """Return one micro-batch's summed negative log-likelihood in nats, with its gradient."""
        ...

    def fault(self, prepared: Any, *, fresh: bool) -> str | None:
        """Say what is not finite although no step made it so, where a loss is not; None: training did it.

        Args:
            fresh: no step has been taken yet.
        """
        ...

    def no_decay(self) -> frozenset[str]:
        """Return the names of trained matrices that weight decay would spoil; it never touches vectors."""
        ...

    def openings(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Return how far each gate is open with these weights, for the log; empty where a method has none."""
        ...


def divided(batch: Batch, labels_BT: Tensor, spec: BackboneSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a model reads of a batch, where that is, to predict these labels: source ids, their mask, target ids."""
    return family_of(spec.model_type, "this backbone").divide(spec, batch.input_ids_BS, batch.attention_mask_BS, labels_BT)


def as_labels(target: Sequence[int], batch: Batch) -> Tensor:
    """Return one target (token ids) as the labels (B, T) of all rows of a batch."""
    return torch.tensor([target]).expand(len(batch.indices), -1)


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return what a module trains, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return a parameter's shape; under ZeRO-3, which leaves an empty tensor in its place, that of all ranks' parts together."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape

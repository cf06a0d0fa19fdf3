"""What tools made for transformers' models ask of one beside `forward`, `generate` and files: Trainer, TRL, accelerate, collators.

A ladder is no `PreTrainedModel`, which holds all weights that it runs: the backbone is no submodule, and may be quantized, divided or far
away. So it answers by the same names, as a ladder has to answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from lst_scale.backbone.families import family_of
from lst_scale.backbone.taps import Backbone, BackboneSpec
from lst_scale.errors import LadderError
from lst_scale.side.config import LadderConfig


@dataclass(frozen=True)
class Head:
    """The backbone's frozen output matrix, named as a linear map's is."""

    weight: Tensor
    bias: None = None


class Face(nn.Module):
    """The other half of a ladder's face; `side.model.Ladder` is the one to read."""

    side: Any
    _frozen: tuple[Backbone]
    # Trainer gives `num_items_in_batch` to models that say so, and divides by it exactly where micro batches have unlike many labels.
    accepts_loss_kwargs = True
    supports_gradient_checkpointing = True
    model_tags: list[str] | None = None

    @property
    def backbone(self) -> Backbone:
        return self._frozen[0]

    @property
    def spec(self) -> BackboneSpec:
        return self.backbone.spec

    @property
    def loss_type(self) -> str:
        """Transformers' name of the loss: that of a causal model counts labels from the second on."""
        return "ForCausalLM" if self.spec.one_stack else "ForConditionalGeneration"

    @property
    def name_or_path(self) -> str:
        """The backbone's name."""
        return str(self.backbone.identity.checkpoint)

    def _get_name(self) -> str:
        """Trainer shifts labels that it smooths where this is the class of a causal model, by a list of transformers' own: so it is one."""
        return family_of(self.spec.model_type, "this backbone").live_classes[0] if self.spec.one_stack else type(self).__name__

    def extra_repr(self) -> str:
        return f"{type(self).__name__} beside {self.name_or_path}"

    # How many.

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the weights of backbone and side network, or of what trains alone; without the word table if so asked."""
        mine = sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)
        if only_trainable:
            return mine
        table = self.spec.vocab_size * self.spec.d_model if exclude_embeddings else 0
        return mine + self.backbone.num_parameters - table

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return how many weights train, and how many there are with the backbone's: PEFT's name, and its order."""
        return self.num_parameters(only_trainable=True), self.num_parameters()

    def print_trainable_parameters(self) -> None:
        """Print both and the share, in PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}")

    # A loss that makes no logits of its own accord, such as TRL's: the last states, and the matrix that makes logits of them.

    @property
    def base_model(self) -> Callable[..., BaseModelOutput]:
        """What returns `.last_hidden_state` (B, T, D): times `get_output_embeddings().weight`, and with the soft cap and the divisor of
        `config`, if it has them, it is the logits."""
        return self._last_state

    def get_output_embeddings(self) -> Head:
        return Head(self.backbone.head.weight_VD)

    def _last_state(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False, position_ids: Tensor | None = None, **_: Any
    ) -> BaseModelOutput:
        if position_ids is not None:
            raise LadderError(
                "a ladder reads one text a row, padded: leave padding_free out, and packing too (or write packing_strategy='wrapped')"
            )
        return BaseModelOutput(last_hidden_state=self.last_hidden_state(input_ids, attention_mask) * self.backbone.head.scale)

    def last_hidden_state(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    # Recomputing.

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether side blocks run again in the backward pass."""
        config: LadderConfig = self.side.config
        return config.recompute

    is_gradient_checkpointing = is_activation_checkpointing

    def activation_checkpointing_enable(self, *_args: Any, **_options: Any) -> None:
        """Do nothing: side blocks are recomputed as their design says (`recompute`), and of the backbone nothing is kept."""

    def gradient_checkpointing_enable(self, *_args: Any, **_options: Any) -> None:
        """Do nothing; see `activation_checkpointing_enable`."""

    def gradient_checkpointing_disable(self) -> None:
        """Do nothing; see `activation_checkpointing_enable`."""

    def enable_input_require_grads(self) -> None:
        """Do nothing: no gradient enters the frozen backbone."""

    def disable_input_require_grads(self) -> None:
        """Do nothing; see `enable_input_require_grads`."""

    # What changes the backbone.

    def get_input_embeddings(self) -> nn.Module:
        raise LadderError(
            "the backbone's word table is frozen, and perhaps elsewhere, so noise on it does nothing: leave neftune_noise_alpha out"
        )

    def resize_token_embeddings(self, *_args: Any, **_options: Any) -> nn.Module:
        raise LadderError("a frozen backbone learns no new tokens: resize the model of transformers first, and give that to LadderModel")

    # For a card.

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Remember what a model card is to be tagged with."""
        given = [tags] if isinstance(tags, str) else tags
        self.model_tags = list(dict.fromkeys([*(self.model_tags or []), *given]))

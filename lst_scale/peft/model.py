"""LadderTuner: what peft calls the base model, once a ladder answers in its place.

The backbone stays as it came, frozen, in eval mode and under no_grad. Its module gets one child, `ladder`, which holds the adapters.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from lst_scale.backbone import as_backbone
from lst_scale.errors import LadderError
from lst_scale.peft.layer import MERGE_REASON, LadderLayer
from lst_scale.peft.register import PREFIX
from lst_scale.side.ladder import Ladder
from lst_scale.side.model import LadderModel

CHILD = "ladder"
KNOWN = frozenset(inspect.signature(Ladder.forward).parameters)  # arguments that a ladder has


class LadderTuner(BaseTuner):  # type: ignore[misc]
    """A frozen model of transformers with the ladders of its adapters, one of which answers.

    Raises:
        LadderError: no backbone, or a design that does not fit it.
    """

    prefix = PREFIX
    tuner_layer_cls = LadderLayer
    target_module_mapping: dict[str, list[str]] = {}  # as peft has it
    uses_shared_state = True

    def inject_adapter(self, model: nn.Module, adapter_name: str, *_args: Any, **_options: Any) -> None:
        """Add a side network for the adapter; the first freezes the model."""
        config = self.peft_config[adapter_name]
        layer: Any = model._modules.get(CHILD)
        if layer is None:
            backbone = as_backbone(model)  # before the model has the child: its fingerprint is of the backbone alone
            layer = LadderLayer(backbone)
            layer.add(adapter_name, config.ladder)
            model.add_module(CHILD, layer)
        else:
            layer.add(adapter_name, config.ladder)
        layer.train(self.training)
        layer.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def layer(self) -> LadderLayer:
        """What holds the adapters."""
        found: Any = self.model._modules[CHILD]
        layer: LadderLayer = found
        return layer

    @property
    def answering(self) -> LadderModel | None:
        """The ladder that answers; None while adapters are disabled."""
        return None if self.layer.disable_adapters or not self.active_adapters else self.layer.active

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the active ladder's output (`LadderModel.forward`), or the plain model's while adapters are disabled.

        TRL puts a forward pass of its own on the plain model object, whose loss makes no logits: asked in a way that only it knows, it
        runs with the ladder in the plain model's place, so that last states and head are the ladder's.

        Raises:
            LadderError: embeddings in place of token ids.
        """
        ladder = self.answering
        if ladder is None:
            return self.model(*args, **kwargs)
        if kwargs.get("inputs_embeds") is not None:
            raise LadderError("a ladder reads input_ids, which it knows rows by: give those in place of inputs_embeds")
        given = {name: value for name, value in kwargs.items() if value is not None}
        replaced = vars(self.model).get("forward")
        if replaced is not None and not given.keys() <= KNOWN:
            return replaced.__func__(ladder, *args, **given)
        return ladder(*args, **given)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Return generated ids (B, T) of the active ladder, or of the plain model while adapters are disabled."""
        ladder = self.answering
        return self.model.generate(*args, **kwargs) if ladder is None else ladder.generate(*args, **kwargs)

    def train(self, mode: bool = True) -> LadderTuner:
        """Switch the side networks alone: a frozen backbone reads without dropout."""
        super().train(mode)
        self.model.eval()
        self.layer.train(mode)
        return self

    def gradient_checkpointing_enable(self, *_args: Any, **_options: Any) -> None:
        """Do nothing: a ladder recomputes its blocks (`recompute`), and the backbone keeps nothing for a backward pass."""

    def gradient_checkpointing_disable(self) -> None:
        """Do nothing; see `gradient_checkpointing_enable`."""

    def enable_input_require_grads(self) -> None:
        """Do nothing: no gradient enters the frozen backbone."""

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Let one adapter answer.

        Raises:
            LadderError: several, or one that isn't there.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        if len(names) != 1:
            raise LadderError(f"one ladder answers at a time, not {len(names)}: give one of {', '.join(self.peft_config)}")
        super().set_adapter(names[0], inference_mode=inference_mode)

    def unload(self) -> nn.Module:
        """Return the plain model, without the adapters."""
        del self.model._modules[CHILD]
        self.model.__dict__.pop("peft_config", None)  # put there by peft
        plain: nn.Module = self.model
        return plain

    def _check_merge_allowed(self) -> None:
        raise LadderError(MERGE_REASON)

    def _unload_and_optionally_merge(self, merge: bool = True, *_args: Any, **_options: Any) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        return self.unload()

    def _create_and_replace(self, *_args: Any, **_options: Any) -> None:
        raise LadderError("a ladder replaces no module: call get_peft_model")

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Return a weight's name in a file. peft looks for the adapter's name next to the end; ours is at the container's."""
        holder = f"{CHILD}.{LadderLayer.adapter_layer_names[0]}."
        return key.replace(f"{holder}{adapter_name}.", holder, 1)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Leave the weights float32, which they are beside a bf16 backbone, too."""
        assert all(p.dtype == torch.float32 for p in self.layer.ladder_side[adapter_name].parameters())

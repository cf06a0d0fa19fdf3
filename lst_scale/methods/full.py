"""Methods that train inside the backbone: full fine-tuning, and what is added to it by `inside.py` and by peft.

They run backward through the whole backbone, which is what LST avoids; here they are its rivals in the same harness.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from lst_scale.backbone.placement.replicated import LocalBackbone
from lst_scale.backbone.taps import BackboneSpec, Replica
from lst_scale.data.batches import Batch
from lst_scale.errors import LadderError, fence
from lst_scale.methods.base import trained_parameters, whole_shape
from lst_scale.side.files import read_weights
from lst_scale.side.loss import IGNORED, shift_right
from lst_scale.system.durable import write_directory

WEIGHTS, CONFIG = "trained.safetensors", "method.json"


class WholeModelTrainee:
    """A model with some of its weights, or some added to it, in training.

    Args:
        model: changed by the method; what it trains requires a gradient.
        backbone: where the model came from.
        bf16: compute in bf16 by autocast; trained weights are float32 in any case.
        in_step: all ranks must run forward equally often (ZeRO-3 gathers weights from all).
        facts: what is stored beside the weights.
    """

    FOLDER = "trained"
    request = None

    def __init__(self, model: Any, backbone: LocalBackbone, *, bf16: bool, in_step: bool, facts: dict[str, Any]) -> None:
        self.module: nn.Module = model
        self.backbone, self._bf16, self._facts = backbone, bf16, facts
        self._replica = Replica(index=backbone.replica.index, count=backbone.replica.count, in_step=in_step)
        wrong = [name for name, parameter in trained_parameters(model).items() if parameter.dtype != torch.float32]
        assert trained_parameters(model), "a method that trains nothing"
        assert not wrong, f"trained weights are float32, but {wrong[0]} is not"

    def prepare(self, batch: Batch) -> None:
        return None

    def nll(self, engine: Any, batch: Batch, prepared: Any = None) -> Tensor:
        device, spec = self.backbone.device, self.backbone.spec
        labels_BT = batch.labels_BT.to(device)
        with self._precision():
            logits_BTV: Tensor = engine(
                input_ids=batch.input_ids_BS.to(device),
                attention_mask=batch.attention_mask_BS.to(device),
                decoder_input_ids=shift_right(labels_BT, spec),
                use_cache=False,
            ).logits
        return (
            nn.functional.cross_entropy(logits_BTV.float().flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED, reduction="sum")
            + 0.0 * logits_BTV.float().sum()
        )  # filler rows alone still join the reduction

    def fault(self, prepared: Any, *, fresh: bool) -> str | None:
        for name, parameter in self.module.named_parameters():
            if (fresh or not parameter.requires_grad) and parameter.is_floating_point() and not torch.isfinite(parameter).all():
                return f"the backbone's weights are not finite in {name}"
        return None

    @contextlib.contextmanager
    def evaluating(self, weights: Mapping[str, Tensor]) -> Iterator[WholeModel]:
        # The live module: a second copy of a whole model would not fit beside it.
        self._put(weights)
        self.module.eval()
        try:
            yield WholeModel(self.module, self.backbone.spec, self._replica, self.backbone.device, self._precision)
        finally:
            self.module.train()

    def no_decay(self) -> frozenset[str]:
        return frozenset()

    def openings(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        return {}

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        def fill(partial: Path) -> None:
            save_file(dict(weights), partial / WEIGHTS)
            (partial / CONFIG).write_text(json.dumps(self._facts, indent=2) + "\n")

        write_directory(folder, fill, lambda whole: load_file(whole / WEIGHTS))

    def load(self, folder: Path) -> dict[str, Tensor]:
        weights = read_weights(folder / WEIGHTS)
        expected = trained_parameters(self.module)
        wrong = sorted(weights.keys() ^ expected.keys())
        wrong += [name for name in weights.keys() & expected.keys() if weights[name].shape != whole_shape(expected[name])]
        if wrong:
            raise LadderError(f"{folder / WEIGHTS} does not fit this method and backbone: {', '.join(wrong[:3])} ({len(wrong)} in all)")
        self._refuse_another_backbone(folder)
        return weights

    def _refuse_another_backbone(self, folder: Path) -> None:
        if not (folder / CONFIG).is_file():
            return
        with fence(LadderError, f"{folder / CONFIG} is damaged"):
            found = json.loads((folder / CONFIG).read_bytes())["backbone"]
            name, fingerprint = str(found["checkpoint"]), str(found["fingerprint"])
        if fingerprint != self.backbone.identity.fingerprint:
            raise LadderError(f"{folder} was trained in {name} with fingerprint {fingerprint[:12]}, which this backbone is not")

    def _put(self, weights: Mapping[str, Tensor]) -> None:
        import deepspeed

        for name, parameter in trained_parameters(self.module).items():
            partitioned = hasattr(parameter, "ds_id")
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0) if partitioned else contextlib.nullcontext():
                if parameter.numel():
                    parameter.data.copy_(weights[name].view_as(parameter))

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.backbone.device.type, torch.bfloat16) if self._bf16 else contextlib.nullcontext()


class WholeModel:
    """The trained model as evaluation uses it."""

    def __init__(self, model: Any, spec: BackboneSpec, replica: Replica, device: torch.device, precision: Any) -> None:
        self._model, self.spec, self.replica, self.device, self._precision = model, spec, replica, device, precision

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, source: None = None, **options: Any) -> Any:
        together = self.replica.in_step and self.replica.count > 1
        with self._precision():
            return self._model.generate(input_ids=input_ids, attention_mask=attention_mask, synced_gpus=together, **options)

    def scoring(self, input_ids_BS: Tensor, attention_mask_BS: Tensor) -> WholeModelScoring:
        return WholeModelScoring(self, input_ids_BS, attention_mask_BS)

    def logits_for_targets(self, input_ids_BS: Tensor, attention_mask_BS: Tensor, targets: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield logits (B, T, V) for each of several decoder inputs (B, T) of one source, whose encoder runs once."""
        scoring = self.scoring(input_ids_BS, attention_mask_BS)
        return (scoring.logits(decoder_input_ids_BT) for decoder_input_ids_BT in targets)

    @torch.no_grad()
    def run(self, **inputs: Any) -> Any:
        with self._precision():
            return self._model(use_cache=False, **inputs)


class WholeModelScoring:
    """Several targets of the rows of one batch; the encoder runs for the first."""

    def __init__(self, model: WholeModel, input_ids_BS: Tensor, attention_mask_BS: Tensor) -> None:
        self._model, self._source = model, {"input_ids": input_ids_BS, "attention_mask": attention_mask_BS}
        self._encoded: BaseModelOutput | None = None

    def logits(self, decoder_input_ids_BT: Tensor, taps: None = None) -> Tensor:
        output = self._model.run(**self._source, encoder_outputs=self._encoded, decoder_input_ids=decoder_input_ids_BT)
        if not self._model.replica.in_step:  # ZeRO-3 fetches weights in the order in which modules ran before
            self._encoded = BaseModelOutput(last_hidden_state=output.encoder_last_hidden_state)
        logits_BTV: Tensor = output.logits
        return logits_BTV

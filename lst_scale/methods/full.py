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

from lst_scale.backbone.families import Family
from lst_scale.backbone.placement.replicated import LocalBackbone
from lst_scale.backbone.taps import BackboneSpec, Replica
from lst_scale.data.batches import Batch
from lst_scale.errors import LadderError, fence
from lst_scale.inputs.batch import moved
from lst_scale.inputs.images import Images
from lst_scale.inputs.keys import IGNORED
from lst_scale.methods.base import divided, trained_parameters, whole_shape
from lst_scale.side.files import read_weights
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
        device = self.backbone.device
        labels_BT = moved(batch.labels_BT, device)
        source_BS, mask_BS, target_BT = (moved(ids, device) for ids in divided(batch, batch.labels_BT, self.backbone.spec))
        with self._precision():
            images = None if batch.images is None else batch.images.to(device)
            logits_BTV = _logits(self.backbone.family, engine, source_BS, mask_BS, target_BT, images)[0]
        flat, wanted = logits_BTV.float().flatten(0, 1), labels_BT.flatten()
        if batch.weights_B is None:
            nll = nn.functional.cross_entropy(flat, wanted, ignore_index=IGNORED, reduction="sum")
        else:
            weights = moved(batch.weights_B.repeat_interleave(labels_BT.shape[1]), device)
            nll = (nn.functional.cross_entropy(flat, wanted, ignore_index=IGNORED, reduction="none") * weights).sum()
        return nll + 0.0 * logits_BTV.float().sum()  # filler rows alone still join the reduction

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
            yield WholeModel(self.module, self.backbone, self._replica, self._precision)
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


def _logits(
    family: Family,
    run: Any,
    source_BS: Tensor,
    mask_BS: Tensor,
    target_BT: Tensor,
    images: Images | None,
    source: Any | None = None,
    *,
    keep: bool = False,
    share: bool = False,
) -> tuple[Tensor, Any]:
    """Return a target's logits (B, T, V) and, with `keep`, the `source` that other targets of these rows need not run again."""
    if images is None:
        return family.whole_logits(run, source_BS, mask_BS, target_BT, source, keep=keep, share=share)
    found: tuple[Tensor, Any] = run(source_BS, mask_BS, images, target_BT, source)  # `methods.images.ReadingImages`
    return found


class WholeModel:
    """The trained model as evaluation uses it."""

    label_head = None

    def __init__(self, model: Any, backbone: LocalBackbone, replica: Replica, precision: Any) -> None:
        self._model, self.replica, self._precision = model, replica, precision
        self.family: Family = backbone.family
        self.spec: BackboneSpec = backbone.spec
        self.device: torch.device = backbone.device

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, source: None = None, image_features: Tensor | None = None, **options: Any
    ) -> Any:
        options |= {"synced_gpus": self.replica.in_step and self.replica.count > 1}
        if image_features is not None:
            options |= {"images": Images(features_BIGF=image_features)}
        with self._precision():
            return self._model.generate(input_ids=input_ids, attention_mask=attention_mask, **options)

    def scoring(self, input_ids_BS: Tensor, attention_mask_BS: Tensor, images: Images | None = None) -> WholeModelScoring:
        return WholeModelScoring(self, input_ids_BS, attention_mask_BS, images)

    def text_logits(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """Return logits (B, T, V) of whole texts, of a model that goes on with a text."""
        logits_BTV: Tensor = self.run(input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False).logits
        return logits_BTV[:, -input_ids_BT.shape[1] :]  # without those of trained vectors before it

    def logits_for_targets(self, input_ids_BS: Tensor, attention_mask_BS: Tensor, targets: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield logits (B, T, V) for each of several targets (B, T) of one source, which runs once."""
        scoring = self.scoring(input_ids_BS, attention_mask_BS)
        return map(scoring.logits, targets)

    @torch.no_grad()
    def run(self, *rows: Any, **inputs: Any) -> Any:
        with self._precision():
            return self._model(*rows, **inputs)


class WholeModelScoring:
    """Several targets of the rows of one batch; their source runs for the first."""

    def __init__(self, model: WholeModel, source_BS: Tensor, source_mask_BS: Tensor, images: Images | None = None) -> None:
        self._model, self._rows, self._images = model, (source_BS, source_mask_BS), images
        self._source: Any | None = None

    def logits(self, target_BT: Tensor, taps: None = None, *, last: bool = False) -> Tensor:
        free = not self._model.replica.in_step  # ZeRO-3 fetches weights in the order in which modules ran before
        keep = free and not last
        given = self._model.family, self._model.run, *self._rows, target_BT, self._images, self._source
        logits_BTV, source = _logits(*given, keep=keep, share=free)
        self._source = source if keep else None
        return logits_BTV

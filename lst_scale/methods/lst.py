"""Ladder side-tuning: the side network trains, the backbone runs forward only and is no part of the module."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lst_scale.backbone.families import family_of
from lst_scale.backbone.taps import Backbone, BackboneSpec, Inputs, SourceState, TapRequest, Taps, select, where_not_finite
from lst_scale.data.batches import Batch, collate
from lst_scale.data.encode import EncodedSplit, stored_keys
from lst_scale.inputs.batch import moved
from lst_scale.inputs.keys import FILLER, KeyTable, RowKey
from lst_scale.methods.base import as_labels, divided
from lst_scale.recipe.method import LstRecipe
from lst_scale.side.config import LadderConfig
from lst_scale.side.files import refuse_config_of_another
from lst_scale.side.initialize import WeightSource, initialize_by_pruning, initialize_random
from lst_scale.side.loss import cross_entropy_sum
from lst_scale.side.model import LadderModel, save_side_network
from lst_scale.side.network import SideNetwork
from lst_scale.side.tail_config import TailConfig
from lst_scale.side.vision_config import VisionConfig

HASHED_AT_ONCE = 1024  # rows that are padded together


class LadderTrainee:
    """A side network beside a backbone held in any placement."""

    FOLDER = "side_network"

    def __init__(
        self,
        recipe: LstRecipe,
        backbone: Backbone,
        seed: int,
        importance: WeightSource | None = None,
        vision: VisionConfig | None = None,
    ) -> None:
        self.backbone = backbone
        self._spec, self._config = backbone.spec, ladder_config(recipe, backbone.spec, vision)
        self.module: SideNetwork = build_side_network(recipe, backbone, seed, importance, self._config)
        self.request = SideNetwork.request_of(self._config)

    def prepare(self, batch: Batch) -> Taps:
        return taps_of(self.backbone, batch, self.request)

    def nll(self, engine: Any, batch: Batch, prepared: Taps) -> Tensor:
        images = () if batch.images is None else (batch.images.to(self.backbone.device),)
        hidden_BTD = engine(select(prepared, self.request), *images)
        nll, _ = cross_entropy_sum(self.backbone.head, hidden_BTD, batch.labels_BT, batch.weights_B)
        return nll

    def fault(self, prepared: Taps, *, fresh: bool) -> str | None:
        where = where_not_finite(prepared)
        if where is not None:
            return f"the backbone's taps are not finite {where}"
        head_is_finite = bool(torch.isfinite(self.backbone.head.weight_VD).all())
        return None if head_is_finite else "the backbone's output head is not finite"

    @contextlib.contextmanager
    def evaluating(self, weights: Mapping[str, Tensor]) -> Iterator[LadderModel]:
        # A copy beside the engine's module: no collective is needed, so ranks may take unequal numbers of steps.
        with torch.device("meta"):
            side = SideNetwork(self._spec, self._config)
        whole = {**weights, **self._frozen()}
        side.load_state_dict({name: tensor.to(self.backbone.device) for name, tensor in whole.items()}, assign=True)
        yield LadderModel(self.backbone, side.eval().requires_grad_(False))

    def no_decay(self) -> frozenset[str]:
        return self.module.no_decay()

    def openings(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        gates = self.module.gates()
        return {name: round(gates[name].opening(alpha), 5) for name, alpha in weights.items() if name in gates and alpha.numel() == 1}

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        save_side_network(folder, {**weights, **self._frozen()}, self._config, self.backbone)

    def load(self, folder: Path) -> dict[str, Tensor]:
        side = LadderModel.from_pretrained(folder, self.backbone).side
        refuse_config_of_another(side.config, self._config, folder)
        self.module.load_state_dict(dict(side.named_buffers()), strict=False)  # what its weights were trained beside
        return {name: parameter.detach() for name, parameter in side.named_parameters()}

    def _frozen(self) -> dict[str, Tensor]:
        """What belongs to the side network and does not train: what tells image tokens apart."""
        trained = {name for name, _ in self.module.named_parameters()}
        return {name: tensor for name, tensor in self.module.state_dict().items() if name not in trained}


def inputs_of(batch: Batch, spec: BackboneSpec) -> Inputs:
    """Return a batch as a backbone takes it, on the CPU."""
    source_BS, source_mask_BS, target_BT = divided(batch, batch.labels_BT, spec)
    return Inputs(
        source_BS=source_BS,
        source_mask_BS=source_mask_BS,
        target_BT=target_BT,
        target_lengths=batch.target_lengths,
        encoded_keys=batch.keys,
    )


def with_keys(split: EncodedSplit, spec: BackboneSpec) -> EncodedSplit:
    """Return a split whose batches say by what a tap cache knows their rows, so that no batch's ids are hashed again."""

    def keys(rows: Sequence[int]) -> Iterator[RowKey]:
        return inputs_of(collate(split, rows), spec).keys.rows()

    (filler,), (first,) = keys([FILLER]), keys([0])

    def make() -> KeyTable:
        return KeyTable(_each_key(keys, split), filler, len(split))

    return replace(split, keys=stored_keys(split, [filler.target, first.target], make))


def _each_key(keys: Callable[[Sequence[int]], Iterator[RowKey]], split: EncodedSplit) -> Iterator[RowKey]:
    for first in range(0, len(split), HASHED_AT_ONCE):
        yield from keys(range(first, min(first + HASHED_AT_ONCE, len(split))))
        split.input_ids.let_go()


def taps_of(backbone: Backbone, batch: Batch, request: TapRequest) -> Taps:
    """Run the frozen backbone on one micro-batch."""
    return backbone(inputs_of(batch, backbone.spec).to(backbone.device), request)


@dataclass(frozen=True, kw_only=True)
class SharedPasses:
    """What the frozen backbone makes of batches, for all side networks on it; None for methods that read nothing of it."""

    backbone: Backbone
    request: TapRequest | None

    def all_of(self, batch: Batch) -> Taps | None:
        return None if self.request is None else taps_of(self.backbone, batch, self.request)

    def source_of(self, batch: Batch) -> SourceState | None:
        if self.request is None or not family_of(self.backbone.spec.model_type, "this backbone").answers_from_source:
            return None
        device = self.backbone.device
        return self.backbone.read(moved(batch.input_ids_BS, device), moved(batch.attention_mask_BS, device), self.request)

    def each_target(self, batch: Batch, targets: Sequence[Sequence[int]]) -> Iterator[Taps | None]:
        """Yield what it makes of each of several targets (token ids), the same for all rows; the source is run, or read, once."""
        if self.request is None:
            return iter([None] * len(targets))
        inputs = inputs_of(batch, self.backbone.spec).to(self.backbone.device)
        several = [inputs.with_target(divided(batch, as_labels(target, batch), self.backbone.spec)[2]) for target in targets]
        return self.backbone.each_target(several, self.request)

    def prefetch(self, following: Callable[[], Batch | None]) -> None:
        if self.request is not None and self.backbone.reads_ahead and (batch := following()) is not None:
            self.backbone.prefetch(inputs_of(batch, self.backbone.spec))


def ladder_config(method: LstRecipe, spec: BackboneSpec, vision: VisionConfig | None = None) -> LadderConfig:
    """Return the side network's configuration on this backbone, checked: "all" becomes the list of its blocks."""
    config = LadderConfig(
        design=method.design,
        reduction_factor=method.reduction_factor,
        side_layers=tuple(range(spec.depth)) if method.side_layers == "all" else method.side_layers,
        merge_last=method.merge_last,
        normalize_taps=method.normalize_taps,
        start_as_backbone=method.start_as_backbone,
        gate=method.gate,
        side_heads=method.side_heads,
        downsample_rank=method.downsample_rank,
        dropout=method.dropout,
        precision=method.precision,
        recompute=method.recompute,
        tap_storage=method.tap_storage,
        vision=vision,
        tail=None if method.tail is None else TailConfig(**dict(method.tail)),
    )
    config.validate(spec)
    return config


def build_side_network(
    method: LstRecipe, backbone: Backbone, seed: int, importance: WeightSource | None = None, config: LadderConfig | None = None
) -> SideNetwork:
    """Return a fresh side network on the CPU. The same seed gives the same weights on every rank.

    Args:
        importance: guides pruning where the recipe asks for Fisher information; None: weight magnitude.
        config: None: the recipe's, without images.
    """
    side = SideNetwork(backbone.spec, config or ladder_config(method, backbone.spec))
    initialize_random(side, seed=seed, weights=backbone.weight_source)
    if method.carves:
        initialize_by_pruning(side, backbone.weight_source, importance)
    side.beside(backbone)
    return side

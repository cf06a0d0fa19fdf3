"""recipe.method -> the side network that trains."""

from __future__ import annotations

from lst_scale.backbone.taps import Backbone, BackboneSpec
from lst_scale.recipe import LstRecipe
from lst_scale.side.config import LadderConfig
from lst_scale.side.initialize import initialize_by_pruning, initialize_random
from lst_scale.side.network import SideNetwork


def ladder_config(method: LstRecipe, spec: BackboneSpec) -> LadderConfig:
    """Return the side network's configuration on this backbone, checked: "all" becomes the list of its blocks."""
    every = range(min(spec.num_layers, spec.num_decoder_layers))
    config = LadderConfig(
        design=method.design,
        reduction_factor=method.reduction_factor,
        side_layers=tuple(every) if method.side_layers == "all" else method.side_layers,
        merge_last=method.merge_last,
        normalize_taps=method.normalize_taps,
        start_as_backbone=method.start_as_backbone,
        gate=method.gate,
        side_heads=method.side_heads,
        downsample_rank=method.downsample_rank,
        dropout=method.dropout,
        precision=method.precision,
    )
    config.validate(spec)
    return config


def build_side_network(method: LstRecipe, backbone: Backbone, seed: int) -> SideNetwork:
    """Return a fresh side network on the CPU. The same seed gives the same weights on every rank."""
    side = SideNetwork(backbone.spec, ladder_config(method, backbone.spec))
    initialize_random(side, seed=seed, weights=backbone.weight_source)
    if method.initialization == "pruning":
        initialize_by_pruning(side, backbone.weight_source)
    return side

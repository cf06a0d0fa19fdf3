"""The original release's names for our weights, so that its checkpoints load here and ours there.

encoder.visual_embedding.feat_embedding.0 <- encoder.visual_embedding.features.linear
encoder.side_first_downsample.weight      <- encoder.first_downsample.weight
encoder.side_block.I.layer...             <- encoder.blocks.I.layer...
encoder.side_gate_params.I                <- encoder.gates.I.alpha
encoder.final_side_layer_norm.weight      <- encoder.final_norm.weight
side_final_upsample.weight                <- upsample.weight
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from lst_scale.backbone.families import family_of
from lst_scale.backbone.taps import BackboneSpec
from lst_scale.errors import LadderError

# In order: the first that matches. Those of the adapter design's blocks come before those of narrow blocks.
_ADAPTER = r"^(encoder|decoder)\.blocks\.(\d+)\."
_RULES = (
    (r"^encoder\.visual_embedding\.features\.linear\.", "encoder.visual_embedding.feat_embedding.0."),
    (r"^encoder\.visual_embedding\.features\.norm\.", "encoder.visual_embedding.feat_embedding.1."),
    (r"^encoder\.visual_embedding\.boxes\.linear\.", "encoder.visual_embedding.absolute_vis_pos_embedding.0."),
    (r"^encoder\.visual_embedding\.boxes\.norm\.", "encoder.visual_embedding.absolute_vis_pos_embedding.1."),
    (r"^encoder\.visual_embedding\.image_order\.", "encoder.visual_embedding.img_order_embedding."),
    (_ADAPTER + r"gate\.alpha$", r"\1.block.\2.side_gate_params.0"),
    (_ADAPTER + r"(downsample|upsample)\.", r"\1.block.\2.side_\3."),
    (_ADAPTER + r"before\.layer_norm\.", r"\1.block.\2.side_ladder_module.0.layer_norm."),
    (_ADAPTER + r"before\.(down|up)\.", r"\1.block.\2.side_ladder_module.0.adapter_layer.adapters.t.\3_sampler."),
    (_ADAPTER + r"cross\.", r"\1.block.\2.side_ladder_module.1."),
    (r"^encoder\.blocks\.(\d+)\.after\.layer_norm\.", r"encoder.block.\1.side_ladder_module.1.layer_norm."),
    (r"^decoder\.blocks\.(\d+)\.after\.layer_norm\.", r"decoder.block.\1.side_ladder_module.2.layer_norm."),
    (r"^encoder\.blocks\.(\d+)\.after\.(down|up)\.", r"encoder.block.\1.side_ladder_module.1.adapter_layer.adapters.t.\2_sampler."),
    (r"^decoder\.blocks\.(\d+)\.after\.(down|up)\.", r"decoder.block.\1.side_ladder_module.2.adapter_layer.adapters.t.\2_sampler."),
    (r"^(encoder|decoder)\.first_downsample\.", r"\1.side_first_downsample."),
    (r"^(encoder|decoder)\.downsamples\.", r"\1.side_downsamples."),
    (r"^(encoder|decoder)\.blocks\.", r"\1.side_block."),
    (r"^(encoder|decoder)\.gates\.(\d+)\.alpha$", r"\1.side_gate_params.\2"),
    (r"^(encoder|decoder)\.final_norm\.", r"\1.final_side_layer_norm."),
    (r"^upsample\.", "side_final_upsample."),
    (r"^merge_gate\.alpha$", "side_gate_params_merge_last"),
)


def release_name(name: str) -> str:
    """Return the release's name of one of our parameters."""
    for pattern, replacement in _RULES:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    raise AssertionError(f"no release name for {name}")


def unused_gates(spec: BackboneSpec, ours: Iterable[str]) -> set[str]:
    """Return the release's gates that have no counterpart here: it makes one for every backbone block, with a side block or without."""
    every = {f"{ref.stack}.side_gate_params.{ref.index}" for ref in family_of(spec.model_type, "this backbone").blocks(spec)}
    return every - {release_name(name) for name in ours}


def from_release(weights: Mapping[str, Tensor], ours: Mapping[str, Tensor], spec: BackboneSpec) -> dict[str, Tensor]:
    """Return `weights` under our names after checking them against `ours` (name -> tensor of the right shape).

    The release's unused gates are passed over.

    Raises:
        LadderError: something is missing, is extra, or has another shape.
    """
    names = {release_name(name): name for name in ours}
    extra = weights.keys() - names.keys() - unused_gates(spec, ours)
    missing = [name for name in names if name not in weights]
    shapes = [
        f"{theirs} is {tuple(weights[theirs].shape)}, not {tuple(ours[name].shape)}"
        for theirs, name in names.items()
        if theirs in weights and weights[theirs].shape != ours[name].shape
    ]
    problems = [text for text in (_listed("missing", missing), _listed("unknown", extra), _listed("mis-shaped", shapes)) if text]
    if problems:
        ours_alone = all("side" in name or "visual_embedding" in name for name in extra)
        hint = "" if ours_alone else " (pass only the weights whose names contain 'side')"
        raise LadderError(f"these weights are not of this side network: {'; '.join(problems)}{hint}")
    return {name: weights[theirs] for theirs, name in names.items()}


def _listed(kind: str, names: Iterable[str]) -> str:
    found = sorted(names)
    if not found:
        return ""
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"{kind}: {', '.join(found[:3])}{more}"

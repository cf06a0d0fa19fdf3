"""What members need that train one after the other on the same taps."""

from __future__ import annotations

from collections.abc import Sequence

from lst_scale.backbone.taps import TapRequest, union
from lst_scale.backbone.weights.assemble import compute_dtype
from lst_scale.methods import request_of
from lst_scale.plan.depth import planned
from lst_scale.plan.footprint import OPTIMIZER, TAPS, TRAINED, Footprint, Setting, worst_of
from lst_scale.recipe.schema import Recipe
from lst_scale.side.count import Shape

_EACH_KEEPS = (TRAINED, OPTIMIZER)


def together(members: Sequence[Recipe], shape: Shape, setting: Setting) -> Footprint:
    """Return what the step of the member that needs the most takes, beside the taps of all and everybody's weights and moments."""
    if len(members) == 1:
        return planned(members[0], shape, setting)
    # Learning rates and seeds take no room: members of one shape are run once.
    shapes = {member.method.model_dump_json(): member for member in members}
    found = {key: _beside_others_taps(planned(one, shape, setting), one, members, shape, setting) for key, one in shapes.items()}
    every = [found[member.method.model_dump_json()] for member in members]
    worst = max(every, key=lambda each: each.peak - sum(each.parts.get(part, 0) for part in _EACH_KEEPS))
    kept = {part: sum(each.parts.get(part, 0) for each in every) for part in _EACH_KEEPS if part in worst.parts}
    moments = {moment: parts | kept for moment, parts in worst.moments.items()}
    return worst_of(moments, kept=worst.kept, trainable=sum(each.trainable for each in every))


def shared_request(members: Sequence[Recipe], shape: Shape) -> TapRequest | None:
    """Return which taps serve all members; None: their method reads none."""
    requests = [request for each in members if (request := request_of(each, shape.spec)) is not None]
    return union(requests) if requests else None


def _beside_others_taps(found: Footprint, own: Recipe, members: Sequence[Recipe], shape: Shape, setting: Setting) -> Footprint:
    """Return a member's step with the taps that are there for other members, too."""
    shared, read = shared_request(members, shape), request_of(own, shape.spec)
    if shared is None or read is None or shared == read:
        return found
    # What a member reads in a form of its own is a copy.
    among = _bytes_of(read, own, shape, setting) if shared.storage == read.storage else 0
    more = _bytes_of(shared, own, shape, setting) - among
    moments = {moment: parts | {TAPS: parts.get(TAPS, 0) + more} for moment, parts in found.moments.items()}
    return worst_of(moments, kept=found.kept + more, trainable=found.trainable)


def _bytes_of(request: TapRequest, recipe: Recipe, shape: Shape, setting: Setting) -> int:
    """Return the bytes of a micro-batch's taps on a rank; the embeddings of a target are there whatever is asked."""
    width, size = shape.spec.d_model, compute_dtype(recipe.backbone.precision).itemsize
    layer = {"exact": width * size, "bf16": width * 2, "int8": width + 4}[request.storage]
    source, target = setting.rows * setting.source, setting.rows * setting.target
    size_of_source = source * (len(request.layers) * layer + width * size) if request.source else 0
    return size_of_source + target * (len(request.layers) * layer + (width * size if request.target_final else 0))

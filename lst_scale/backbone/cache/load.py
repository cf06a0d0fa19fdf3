"""recipe.backbone and recipe.cache -> a backbone whose taps come from disk; the frozen model itself is loaded when a row is not there."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from lst_scale.backbone.cache.backbone import CachingBackbone
from lst_scale.backbone.cache.key import CacheKey
from lst_scale.backbone.cache.store import TapCache
from lst_scale.backbone.cache.wider import wider_caches
from lst_scale.backbone.placement.load import load_alone
from lst_scale.backbone.placement.meta import open_together
from lst_scale.backbone.taps import Backbone, BackboneSpec, Replica, TapRequest
from lst_scale.backbone.weights import assemble
from lst_scale.errors import BackboneError
from lst_scale.recipe.backbone import BackboneRecipe
from lst_scale.recipe.schema import CacheRecipe
from lst_scale.system import distributed
from lst_scale.system.assets import cache_folder
from lst_scale.system.distributed import World


def load_caching(
    recipe: BackboneRecipe,
    cache: CacheRecipe,
    world: World,
    request: Callable[[BackboneSpec], TapRequest],
    check: Callable[[Backbone], None],
    context: Sequence[int] = (),
) -> CachingBackbone:
    """Open the tap cache of this backbone; the backbone itself is loaded when a row is not in it, and then given to `check`.

    Args:
        context: token ids that the backbone has read before every row.

    Raises:
        BackboneError: the checkpoint can't be used, or its placement needs all ranks at once.
    """
    if not recipe.placement.each_rank_alone:
        raise distributed.same_everywhere(
            BackboneError(
                f"a tap cache needs a backbone that each rank runs by itself, which placement {recipe.placement.name} is not: "
                "write backbone.placement=streamed, or cache.enabled=false"
            )
        )
    opened = open_together(recipe, world)
    checkpoint, identity, model = opened.checkpoint, opened.identity, opened.model
    count = assemble.count_parameters(model, checkpoint)
    assemble.fill_ends(model, checkpoint, identity.precision, world.device)
    wanted = request(checkpoint.spec)
    key = CacheKey(
        fingerprint=identity.fingerprint,
        precision=identity.precision,
        layers=wanted.layers,
        decoder_final=wanted.target_final,
        d_model=checkpoint.spec.d_model,
        dtype=cache.dtype,
        target_only=not wanted.source,
        context=hashlib.sha256(repr(list(context)).encode()).hexdigest() if context else "",
    )
    root = Path(cache.folder).expanduser() if cache.folder is not None else cache_folder("taps")
    alone = World(rank=0, size=1, local_rank=world.local_rank, device=world.device)  # ranks load when they must, not together

    def load() -> Backbone:
        backbone = load_alone(recipe, alone)
        check(backbone)
        return backbone.after(context) if context else backbone

    return CachingBackbone(
        cache=TapCache(root, key, wider_caches(root, key)),
        spec=checkpoint.spec,
        identity=dataclasses.replace(identity, context=tuple(context)),
        head=checkpoint.family.head(model, checkpoint.spec),
        embedding_VD=checkpoint.family.embedding(model),
        weight_source=checkpoint.tensor,
        replica=Replica(index=world.rank, count=world.size),
        load=load,
        num_parameters=count,
        embedding_scale=checkpoint.family.embedding_scale(checkpoint.spec),
    )

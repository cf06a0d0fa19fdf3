"""A checkpoint whose files and shapes have been looked at, before any weight is loaded: where every placement starts and ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from lst_scale.backbone.placement.prefetch import Prefetcher
from lst_scale.backbone.placement.replicated import LocalBackbone
from lst_scale.backbone.spec import refuse_placement
from lst_scale.backbone.taps import BackboneIdentity, Replica
from lst_scale.backbone.weights import assemble
from lst_scale.backbone.weights import precision as precisions
from lst_scale.backbone.weights.checkpoint import Checkpoint, open_checkpoint
from lst_scale.errors import BackboneError
from lst_scale.recipe.backbone import BackboneRecipe
from lst_scale.system import distributed
from lst_scale.system.distributed import World

B = TypeVar("B", bound=LocalBackbone)


@dataclass(frozen=True, kw_only=True)
class MetaBackbone:
    """A checkpoint, and its model on the meta device, whose blocks a placement fills."""

    checkpoint: Checkpoint
    identity: BackboneIdentity
    model: Any


def open_alone(recipe: BackboneRecipe, ranks: int | None = None) -> MetaBackbone:
    """Look at every file and shape, and whether its matrices can be divided over so many ranks, without a word to other ranks.

    Raises:
        BackboneError: the checkpoint can't be used.
    """
    precisions.check(recipe.precision)
    checkpoint = open_checkpoint(recipe.checkpoint, recipe.revision)
    refuse_placement(checkpoint.spec, recipe.placement, ranks)
    model = assemble.empty_model(checkpoint)
    assemble.check_shapes(model, checkpoint)
    identity = BackboneIdentity(
        checkpoint=recipe.checkpoint, revision=recipe.revision, precision=recipe.precision, fingerprint=checkpoint.fingerprint()
    )
    return MetaBackbone(checkpoint=checkpoint, identity=identity, model=model)


def open_together(recipe: BackboneRecipe, world: World) -> MetaBackbone:
    """Look at every file and shape on all ranks, which must find one and the same checkpoint.

    Raises:
        BackboneError: the checkpoint can't be used, on any rank, or is another one somewhere.
    """
    opened = distributed.agree(world, lambda: open_alone(recipe, world.size))
    found = distributed.gather(opened.identity.fingerprint)
    different = [str(rank) for rank, fingerprint in enumerate(found) if fingerprint != found[0]]
    if different:
        raise distributed.same_everywhere(
            BackboneError(f"{recipe.checkpoint} on rank {', '.join(different)} differs from rank 0's: copy one checkpoint to all machines")
        )
    return opened


def finish(kind: Callable[..., B], opened: MetaBackbone, world: World, *, replica: Replica, conveyor: Prefetcher | None = None) -> B:
    """Return the backbone of this model, whose blocks are in place; its ends are filled here."""
    checkpoint, identity, model = opened.checkpoint, opened.identity, opened.model
    count = assemble.count_parameters(assemble.empty_model(checkpoint), checkpoint)
    assemble.fill_ends(model, checkpoint, identity.precision, world.device)
    return kind(model, checkpoint.spec, identity, checkpoint.tensor, count, replica=replica, conveyor=conveyor)

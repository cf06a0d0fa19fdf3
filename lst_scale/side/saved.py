"""A saved side network and its backbone: do they belong together?"""

from __future__ import annotations

from typing import Any

from lst_scale.backbone import as_backbone, load_backbone
from lst_scale.backbone.taps import Backbone, BackboneSpec
from lst_scale.errors import LadderError, fence
from lst_scale.side import files
from lst_scale.side.network import SideNetwork


def join(saved: files.Saved, backbone: Any, *, allow_other_backbone: bool) -> tuple[Backbone, SideNetwork]:
    """Return the backbone, loaded by its recorded name where none is given, and the side network with its weights, on the CPU.

    Raises:
        LadderError: the backbone is not the one that the side network was trained on.
    """
    frozen = as_backbone(backbone) if backbone is not None else _load(saved)
    if frozen.identity.fingerprint != saved.identity.fingerprint and not allow_other_backbone:
        raise LadderError(
            f"{saved.folder} was trained on {saved.identity.checkpoint} with fingerprint {saved.identity.fingerprint[:12]}, this backbone "
            f"({frozen.identity.checkpoint}) has {frozen.identity.fingerprint[:12]}: give the same weights or allow_other_backbone=True"
        )
    with fence(LadderError, f"{saved.folder / files.CONFIG} is damaged"):
        side = SideNetwork(_same_shape(frozen.spec, saved), saved.config)
    files.load_weights(side, saved)
    frozen = _after_the_same(frozen, saved, allow_other_backbone=allow_other_backbone)
    return frozen, side


def _after_the_same(backbone: Backbone, saved: files.Saved, *, allow_other_backbone: bool) -> Backbone:
    """Return a backbone that has read before every row what it had read when the side network was trained."""
    wanted, found = saved.identity.context, backbone.identity.context
    if wanted == found or (found and allow_other_backbone):
        return backbone
    if found:
        raise LadderError(
            f"{saved.folder} was trained after another context than the {len(found)} tokens that this backbone goes on from: "
            "give the backbone without a context, or allow_other_backbone=True"
        )
    return backbone.after(wanted)


def _same_shape(spec: BackboneSpec, saved: files.Saved) -> BackboneSpec:
    """Return `spec`, or name the numbers in which it differs from the backbone that the side network stood beside."""
    theirs = saved.spec.architecture
    differ = [f"{name} {value} instead of {theirs.get(name)}" for name, value in spec.architecture.items() if value != theirs.get(name)]
    if differ:
        raise LadderError(f"{saved.folder} does not fit this backbone, which has {', '.join(differ)}: give one of its own architecture")
    return spec


def _load(saved: files.Saved) -> Backbone:
    return load_backbone(saved.identity.checkpoint, revision=saved.identity.revision, precision=saved.identity.precision)

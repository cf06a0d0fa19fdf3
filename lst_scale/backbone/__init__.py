"""The frozen backbone, forward only. `taps.py` is the boundary; everything else here is one way of standing behind it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lst_scale.backbone.taps import Backbone


def as_backbone(model: Any) -> Backbone:
    """Return `model` itself when it is a backbone, or a T5 or mT5, live or named and then in float32, frozen behind the boundary."""
    if isinstance(model, str | Path):
        return load_backbone(str(model), revision=None, precision="fp32")
    from lst_scale.backbone import taps
    from lst_scale.backbone.placement.replicated import LocalBackbone

    if isinstance(model, taps.Backbone):
        return model
    return LocalBackbone.wrap(model)


def load_backbone(checkpoint: str, *, revision: str | None, precision: str) -> Backbone:
    """Load a checkpoint by name on the device of this process: CUDA when there is one."""
    import torch

    from lst_scale.backbone.placement.replicated import LocalBackbone

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return LocalBackbone.load(checkpoint, precision=precision, device=device, revision=revision)

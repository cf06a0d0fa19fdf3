"""Where adapters live in the model: one module that holds a ladder for each of them."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lst_scale.backbone.taps import Backbone
from lst_scale.errors import LadderError
from lst_scale.side.config import LadderConfig
from lst_scale.side.model import LadderModel

MERGE_REASON = (
    "a ladder can't be merged: it is a network beside the backbone that reads its states, no change of the backbone's weights; "
    "write unload() for the plain model, or keep the adapter"
)


class LadderLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """The ladders of all adapters, beside one frozen backbone, which is no submodule of any."""

    adapter_layer_names = ("ladder_side",)

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self._frozen = (backbone,)
        self.ladder_side = nn.ModuleDict()

    def add(self, adapter_name: str, config: LadderConfig) -> None:
        """Add a fresh side network, whose weights start at random (seed 0)."""
        self.ladder_side[adapter_name] = LadderModel(self._frozen[0], config)

    @property
    def active(self) -> LadderModel:
        """The ladder that answers."""
        names: Any = self.active_adapters
        ladder = self.ladder_side[names[0]]
        assert isinstance(ladder, LadderModel)
        return ladder

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise LadderError(MERGE_REASON)

    def unmerge(self) -> None:
        raise LadderError(MERGE_REASON)

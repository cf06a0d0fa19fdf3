"""Ladder side tuning as a PEFT method: `get_peft_model(model, LadderPeftConfig(...))`. Laid out like `peft/tuners/shadow`."""

from lst_scale.peft.config import LadderPeftConfig
from lst_scale.peft.convert import adapter_from_side_network, side_network_from_adapter
from lst_scale.peft.layer import LadderLayer
from lst_scale.peft.model import LadderTuner
from lst_scale.peft.register import register_ladder

register_ladder(LadderPeftConfig, LadderTuner)

__all__ = ["LadderLayer", "LadderPeftConfig", "LadderTuner", "adapter_from_side_network", "side_network_from_adapter"]

"""The last blocks of a decoder-only model as a model of their own: transformers', whose input are the states before them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lst_scale.backbone.families.llama.model import config_of, fill_buffers, run
from lst_scale.backbone.families.llama.spec import LlamaSpec

BLOCKS = "model.layers."


class LlamaTail:
    """What the design "tail" needs of a decoder-only model."""

    def tail(self, spec: LlamaSpec, first: int) -> Any:
        """What a configuration says of each block is cut as the blocks are; states have been scaled when they were embedded."""
        whole = config_of(spec).to_dict()
        each = {name: whole[name][first:] for name in ("layer_types", "no_rope_layers") if whole.get(name) is not None}
        scale = {"embedding_multiplier": 1.0} if "embedding_multiplier" in whole else {}
        config = config_of(spec, num_hidden_layers=spec.num_layers - first, **each, **scale)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        model.model.embed_tokens, model.lm_head = nn.Identity(), nn.Identity()
        with torch.device("cpu"):  # wherever the rest is made: frequencies are not read from a file
            fill_buffers(model, config)
        return model

    def tail_name(self, name: str, first: int) -> str:
        number, found, rest = name.removeprefix(BLOCKS).partition(".")
        return f"{BLOCKS}{int(number) + first}.{rest}" if found and name.startswith(BLOCKS) else name

    def run_tail(self, model: Any, hidden_BTD: Tensor, mask_BS: Tensor, cache: Any | None) -> Tensor:
        return run(model, hidden_BTD, mask_BS, cache)

"""Ladders of every kind, and how they generate."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from helpers.tiny import batch
from lst_scale import LadderModel

LADDERS: dict[str, dict[str, Any]] = {
    "two layers": {"side_layers": (0, 2)},
    "last layer only": {"side_layers": (2,)},
    "merge_last": {"side_layers": (1, 2), "merge_last": True},
    "cross attention": {"design": "cross_attention", "side_layers": (0, 2)},
    "adapter": {"design": "adapter", "side_layers": (0, 2), "gate": "per_channel"},
    "fewer heads": {"side_layers": (0, 2), "side_heads": 2, "downsample_rank": 3, "gate": "none"},
}
NUM_NEW = 7


def source(num_rows: int = 4) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in batch(num_rows).items() if name != "labels"}


def generate(model: LadderModel, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    ids: Tensor = model.generate(**inputs, max_new_tokens=NUM_NEW, **options)
    return ids

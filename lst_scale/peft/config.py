"""The config of a ladder in PEFT's words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from peft.config import PeftConfig

from lst_scale.errors import LadderError
from lst_scale.peft.register import ladder_type
from lst_scale.side.config import GATE_TEMPERATURE, LadderConfig


@dataclass
class LadderPeftConfig(PeftConfig):  # type: ignore[misc]
    """A ladder side network as an adapter.

    Its fields are PEFT's own and those of `lst_scale.side.config.LadderConfig`, which says what they mean, without `vision` and `tail`.

    Raises:
        LadderError: a value that no ladder can have; names what to write instead.
    """

    design: str = field(default="transformer", metadata={"help": "transformer, cross_attention, adapter or pointwise"})
    reduction_factor: int = field(default=8, metadata={"help": "the side network's widths are the backbone's divided by it"})
    side_layers: Sequence[int] | str = field(default="all", metadata={"help": "0-based backbone blocks with a side block, or all"})
    merge_last: bool = False
    normalize_taps: bool | None = None
    start_as_backbone: bool = False
    gate: str = "learnable"
    side_heads: int | None = None
    downsample_rank: int | None = None
    gate_temperature: float = GATE_TEMPERATURE
    dropout: float | None = None
    precision: str = "fp32"
    recompute: bool = True
    tap_storage: str = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = ladder_type()
        if self.design == "tail":
            raise LadderError("design tail is LoRA among adapters: write peft's LoraConfig with layers_to_transform")
        checked = self.ladder.side_layers
        self.side_layers = checked if isinstance(checked, str) else list(checked)

    @property
    def ladder(self) -> LadderConfig:
        """The same design as our harness writes it."""
        return LadderConfig(**{name: getattr(self, name) for name in _DESIGN})

    @classmethod
    def of(cls, config: LadderConfig, **peft: Any) -> LadderPeftConfig:
        """Return the config of a design; `peft` are PEFT's own fields.

        Raises:
            LadderError: a design with images, which no PEFT model takes, or a tail.
        """
        if config.design == "tail":
            raise LadderError(
                "a side network of design tail is no ladder among adapters, but LoRA: write it with adapter_from_side_network"
            )
        if config.vision is not None:
            raise LadderError("a side network with vision is no PEFT adapter, whose models take text: load it with LadderModel")
        return cls(**{name: getattr(config, name) for name in _DESIGN}, **peft)


_DESIGN = tuple(entry.name for entry in fields(LadderConfig) if entry.name not in ("vision", "tail"))

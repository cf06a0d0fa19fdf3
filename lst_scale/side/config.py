"""What a side network looks like, apart from the backbone it stands beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from operator import index

from lst_scale.backbone.taps import BackboneSpec
from lst_scale.errors import LadderError, did_you_mean

DESIGNS = ("transformer",)
PRECISIONS = ("fp32", "bf16")
GATE_TEMPERATURE = 0.1  # the paper's, for every gate


@dataclass(frozen=True, kw_only=True)
class LadderConfig:
    """The design of a side network (Sung et al. 2022, section 3).

    Args:
        design: "transformer": the backbone's block class at 1/r of its widths, fed through gates.
        reduction_factor: r; divides d_model, d_ff and d_kv. The number of heads stays.
        side_layers: 0-based backbone blocks that have a side block, in both stacks, ascending.
        merge_last: mix the backbone's final decoder state into the output through one more gate.
        normalize_taps: RMS-normalise every block's tap before its downsample, without a learned scale (the downsample has one). A
            pretrained T5's states grow with depth and a few channels dominate them; QST (Zhang et al., ACL 2024) normalises after
            the downsample for the same reason. Not in the paper, hence off.
        gate_temperature: T in mu = sigmoid(alpha / T).
        dropout: the side network's dropout rate; None takes the backbone's.
        precision: "fp32", or "bf16" for autocast; weights are float32 in both.
    """

    design: str = "transformer"
    reduction_factor: int = 8
    side_layers: Sequence[int]
    merge_last: bool = False
    normalize_taps: bool = False
    gate_temperature: float = GATE_TEMPERATURE
    dropout: float | None = None
    precision: str = "fp32"

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "side_layers", tuple(index(layer) for layer in self.side_layers))
        except TypeError:
            raise LadderError(f"side_layers {self.side_layers!r} must be a list of block numbers, such as [1, 3, 5]") from None
        if type(self.reduction_factor) is not int:
            raise LadderError(f"reduction_factor {self.reduction_factor!r} must be a whole number, such as 8")
        if self.design not in DESIGNS:
            raise LadderError(f"design {self.design!r} is unknown.{did_you_mean(self.design, DESIGNS)}")
        if self.precision not in PRECISIONS:
            raise LadderError(f"side network precision {self.precision!r} is unknown: write fp32 or bf16 (fp16 overflows in T5)")
        layers = self.side_layers
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0:
            raise LadderError(f"side_layers {list(layers)} must be 0-based block numbers, ascending, each once, at least one")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise LadderError(f"dropout {self.dropout} must be at least 0 and below 1")
        if not self.gate_temperature > 0:
            raise LadderError(f"gate_temperature {self.gate_temperature} must be above 0")

    def validate(self, spec: BackboneSpec) -> None:
        """Refuse what does not fit this backbone, naming what would."""
        r = self.reduction_factor
        common = gcd(spec.d_model, spec.d_ff, spec.d_kv)
        if r < 1 or common % r:
            valid = [str(n) for n in range(1, common + 1) if common % n == 0]
            raise LadderError(
                f"reduction_factor {r} must divide d_model {spec.d_model}, d_ff {spec.d_ff} and d_kv {spec.d_kv}: "
                f"write one of {', '.join(valid)}"
            )
        depth = min(spec.num_layers, spec.num_decoder_layers)
        if self.side_layers[-1] >= depth:
            raise LadderError(f"side_layers names block {self.side_layers[-1]}, but this backbone has blocks 0 to {depth - 1}")

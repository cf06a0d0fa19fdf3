"""What a side network looks like, apart from the backbone it stands beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from operator import index
from typing import Literal

from lst_scale.backbone.spec import BackboneSpec, refuse_misfit
from lst_scale.errors import LadderError, did_you_mean
from lst_scale.side.tail_config import TailConfig
from lst_scale.side.vision_config import VisionConfig

DESIGNS = ("transformer", "cross_attention", "adapter", "pointwise", "tail")
GATES = ("learnable", "per_channel", "fixed", "none")
PRECISIONS = ("fp32", "bf16")
TAP_STORAGES = ("exact", "bf16", "int8")
NOT_OF_A_TAIL = ("reduction_factor", "merge_last", "start_as_backbone", "gate", "side_heads", "downsample_rank")
NOTHING_AFTER = "side_layers names block {layer}, after which there is nothing to run again: write an earlier one"
GATE_TEMPERATURE = 0.1  # the paper's, for every gate


@dataclass(frozen=True, kw_only=True)
class LadderConfig:
    """The design of a side network (Sung et al. 2022, section 3).

    Args:
        design: "transformer": the backbone's block class at 1/r of its widths, fed through gates. "cross_attention": the same, fed by
            an attention to the taps. "adapter": adapters at full width with gates; r gives the bottleneck d_model / r. "pointwise", beside
            a decoder-only model: no attention, each position of the answer reads its own taps alone. "tail", beside a decoder-only model:
            the backbone's last blocks run again on the states before them, with low-rank updates, which are all that trains.
        reduction_factor: r; divides d_model, d_ff and d_kv. The number of heads stays.
        side_layers: 0-based backbone blocks that have a side block, in both stacks, ascending; "all", until a backbone says how many
            there are. Of the tail one block: those after it are run again.
        merge_last: mix the backbone's final decoder state into the output through one more gate.
        start_as_backbone: with merge_last (which beside a decoder-only model need not be written), add the upsampled side state to the
            backbone's final state without a gate, from an upsample of zeros: the first prediction is the backbone's own (PAC,
            arXiv 2408.10746; QST, READ and SHERL have it in some form).
        gate: "learnable" (the paper's scalar), "per_channel" (QST), "fixed" (always half), "none" (plain sum, PAC).
        side_heads: attention heads of side blocks; None: the backbone's. Score maps do not shrink with r, but they do with this.
        downsample_rank: two narrower linears, d -> rank -> d/r, for each downsample (QST); None: one.
        normalize_taps: RMS-normalise every block's tap before its downsample, without a learned scale (the downsample has one). A
            pretrained T5's states grow with depth and a few channels dominate them; QST (Zhang et al., ACL 2024) normalises after
            the downsample for the same reason. Not in the paper; None, until a backbone says: off beside a T5, on beside a T5Gemma and
            a decoder-only model, which without it is lost (3.5 points on SmolLM2). With vision, words and image tokens as they enter, too.
        gate_temperature: T in mu = sigmoid(alpha / T).
        recompute: keep only the taps and the side state between blocks for the backward pass, and run each side block again there. Exact
            in the gradient; a side block is small, its attention maps and dropout masks are not.
        tap_storage: how taps are held until the backward pass: "exact" (as computed), "bf16", or "int8" with one scale a position.
            Packed as the backbone makes them, so what is read forward and what the downsample's gradient is made of are the same: the
            gradient is exact for taps that are off by at most 1/254 of a position's largest value.
        dropout: the side network's dropout rate; None takes the backbone's.
        precision: "fp32", or "bf16" for autocast; weights are float32 in both.
        tail: of the design of that name; None: as `TailConfig` is.
        vision: how image tokens enter the side network beside the source's text; None: text only.
    """

    design: str = "transformer"
    reduction_factor: int = 8
    side_layers: Sequence[int] | Literal["all"]
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
    vision: VisionConfig | None = None
    tail: TailConfig | None = None

    def __post_init__(self) -> None:
        self._check_layers()
        if isinstance(self.tail, Mapping):  # as a saved one reads back
            vars(self)["tail"] = TailConfig(**self.tail)
        if isinstance(self.vision, Mapping):  # as a saved one reads back
            vars(self)["vision"] = VisionConfig(**self.vision)
        if type(self.reduction_factor) is not int:
            raise LadderError(f"reduction_factor {self.reduction_factor!r} must be a whole number, such as 8")
        if self.design not in DESIGNS:
            raise LadderError(f"design {self.design!r} is unknown.{did_you_mean(self.design, DESIGNS)}")
        if self.gate not in GATES:
            raise LadderError(f"gate {self.gate!r} is unknown.{did_you_mean(self.gate, GATES)}")
        self._check_switches()
        if self.precision not in PRECISIONS:
            raise LadderError(f"side network precision {self.precision!r} is unknown: write fp32 or bf16 (fp16 overflows in T5)")
        if self.tap_storage not in TAP_STORAGES:
            raise LadderError(f"tap_storage {self.tap_storage!r} is unknown.{did_you_mean(self.tap_storage, TAP_STORAGES)}")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise LadderError(f"dropout {self.dropout} must be at least 0 and below 1")
        if not self.gate_temperature > 0:
            raise LadderError(f"gate_temperature {self.gate_temperature} must be above 0")

    def _check_layers(self) -> None:
        if self.side_layers == "all":
            return
        try:
            layers = vars(self)["side_layers"] = tuple(index(layer) for layer in self.side_layers)  # type: ignore[arg-type]  # frozen from here on
        except TypeError:
            raise LadderError(f'side_layers {self.side_layers!r} must be a list of block numbers, such as [1, 3, 5], or "all"') from None
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0:
            raise LadderError(f"side_layers {list(layers)} must be 0-based block numbers, ascending, each once, at least one")

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks that have a side block, by number."""
        assert not isinstance(self.side_layers, str), "ask `on` a backbone first how many all are"
        return tuple(self.side_layers)

    def on(self, spec: BackboneSpec) -> LadderConfig:
        """Return the same with every block by number, and all that a kind of backbone decides."""
        return replace(
            self,
            side_layers=tuple(range(spec.depth)) if self.side_layers == "all" else self.side_layers,
            normalize_taps=(spec.large_states and self.design != "tail") if self.normalize_taps is None else self.normalize_taps,
            merge_last=self.merge_last or (self.start_as_backbone and spec.one_stack),
        )

    def _check_tail(self) -> None:
        if self.design != "tail":
            if self.tail is not None:
                raise LadderError(f"tail has no effect on design {self.design}: remove it, or write design tail")
            return
        vars(self)["tail"] = self.tail or TailConfig()
        if self.side_layers == "all" or len(self.side_layers) != 1:
            raise LadderError("design tail reads one block and runs those after it again: write side_layers as one block, such as [23]")
        for name in NOT_OF_A_TAIL:
            value, default = getattr(self, name), _DEFAULTS[name]
            if value != default:
                raise LadderError(f"{name} {value!r} has no effect on design tail, which runs the backbone's own blocks: remove it")

    def _check_switches(self) -> None:
        self._check_tail()
        if self.start_as_backbone and self.design == "adapter":
            raise LadderError("start_as_backbone needs an upsample that starts at zero, which design adapter lacks: choose another design")
        if self.vision is not None and self.design != "transformer":
            raise LadderError(f"design {self.design} reads no images: write design transformer, or leave vision out")
        if self.design == "cross_attention" and self.gate != "learnable":
            raise LadderError(f"gate {self.gate} has no effect on design cross_attention, which has no gates: remove it")
        if self.design == "pointwise" and self.side_heads is not None:
            raise LadderError("side_heads has no effect on design pointwise, which has no attention: remove it")
        if self.design == "adapter" and self.downsample_rank is not None:
            raise LadderError("downsample_rank has no effect on design adapter, which does not downsample taps: remove it")
        for name in ("side_heads", "downsample_rank"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise LadderError(f"{name} {value!r} must be a whole number of at least 1")

    def validate(self, spec: BackboneSpec) -> None:
        """Refuse what does not fit this backbone, naming what would."""
        if self.start_as_backbone and not self.merge_last:
            raise LadderError("start_as_backbone has no effect without merge_last: write merge_last=true too")
        what = f"design {self.design} stands beside"
        if spec.one_stack and self.design in ("cross_attention", "adapter"):
            raise LadderError(f"{what} an encoder-decoder: beside a {spec.model_type} write design transformer")
        if not spec.one_stack and self.design in ("pointwise", "tail"):
            raise LadderError(
                f"design {self.design} stands beside a decoder-only model: beside a {spec.model_type} write design transformer"
            )
        if spec.one_stack and self.vision is not None:
            raise LadderError(f"images stand beside an encoder's text, which a {spec.model_type} has not: choose a T5, or leave vision out")
        refuse_misfit(spec, self.reduction_factor, self.layers, self.side_heads)
        if self.design == "tail" and self.layers[0] == spec.depth - 1:
            raise LadderError(NOTHING_AFTER.format(layer=self.layers[0]))


_DEFAULTS = {entry.name: entry.default for entry in fields(LadderConfig)}

"""What the package must know of a backbone's shape. Each family adds the numbers of its own; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, ClassVar

from lst_scale.errors import BackboneError, LadderError
from lst_scale.recipe.backbone import Placement, TensorParallel


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """The numbers that every family has. Instances are of a family's own subclass, found by `model_type`."""

    one_stack: ClassVar[bool] = False  # the same blocks run source and target
    served: ClassVar[bool] = True  # whether `lst-scale serve` can answer for it
    large_states: ClassVar[bool] = False  # such that a ladder is lost unless taps are normalised

    model_type: str
    vocab_size: int
    d_model: int
    d_ff: int
    num_heads: int
    dropout_rate: float
    pad_token_id: int
    eos_token_id: int
    decoder_start_token_id: int

    @property
    def depth(self) -> int:
        """How many blocks can have a side block."""
        raise NotImplementedError

    @property
    def cache_layers(self) -> int:
        """How many layers of a cache of keys and values the backbone fills."""
        raise NotImplementedError

    def with_depth(self, depth: int) -> BackboneSpec | None:
        """Return the spec of a model of this kind with so many blocks; None where depth is not one number."""
        raise NotImplementedError

    @property
    def widths(self) -> Mapping[str, int]:
        """What a side network's reduction factor must divide."""
        raise NotImplementedError

    def side_width(self, reduction_factor: int) -> int:
        """Return how many channels a side network's states have."""
        return self.d_model // reduction_factor

    @property
    def divided(self) -> Mapping[str, int]:
        """What tensor parallelism deals out, by what messages call it: a size of groups must divide each."""
        return {"heads": self.num_heads, "feed-forward channels": self.d_ff}

    @property
    def indivisible(self) -> str | None:
        """Why tensor parallelism can't divide a block's matrices; None: it can."""
        return None

    @property
    def architecture(self) -> Mapping[str, Any]:
        """What a side network can't do without: it fits a backbone whose values are the same."""
        raise NotImplementedError


def refuse_placement(spec: BackboneSpec, placement: Placement, ranks: int | None = None) -> None:
    """Refuse a placement that this kind of model can't have: tensor parallelism where its matrices can't be divided.

    Args:
        ranks: how many there are; None: not known yet, and a size that the placement leaves open is not looked at.

    Raises:
        BackboneError: it can't; the message says what can.
    """
    if not isinstance(placement, TensorParallel):
        return
    if spec.indivisible is not None and placement.size != 1:
        raise BackboneError(
            f"a {spec.model_type} can't be divided over ranks ({spec.indivisible}): "
            "write backbone.placement=zero3 or backbone.placement=streamed, not tensor_parallel"
        )
    size = placement.size or ranks
    possible = [t for t in range(1, gcd(*spec.divided.values()) + 1) if all(count % t == 0 for count in spec.divided.values())]
    if size is not None and size not in possible:
        *others, last = (f"{count} {name}" for name, count in spec.divided.items())
        raise BackboneError(
            f"{', '.join(others)} and {last} can't be divided over {size} ranks: "
            f"backbone.placement.size can be {', '.join(map(str, possible))}"
        )


def refuse_misfit(spec: BackboneSpec, reduction_factor: int, side_layers: Sequence[int], side_heads: int | None = None) -> None:
    """Refuse a side network that does not fit a backbone, naming what would: a factor that divides its widths, blocks and heads it has.

    Raises:
        LadderError: it does not fit.
    """
    common = gcd(*spec.widths.values())
    if reduction_factor < 1 and not spec.widths:
        raise LadderError(f"reduction_factor {reduction_factor} must be 1 or more, such as 8")
    if reduction_factor < 1 or common % reduction_factor:
        valid = [str(n) for n in range(1, common + 1) if common % n == 0]
        *others, last = (f"{name} {value}" for name, value in spec.widths.items())
        raise LadderError(
            f"reduction_factor {reduction_factor} must divide {', '.join(others)} and {last}: write one of {', '.join(valid)}"
        )
    if side_layers and side_layers[-1] >= spec.depth:
        raise LadderError(f"side_layers names block {side_layers[-1]}, but this backbone has blocks 0 to {spec.depth - 1}")
    if side_heads is not None and side_heads > spec.num_heads:
        raise LadderError(
            f"side_heads {side_heads} is more than the {spec.num_heads} heads of this backbone: write {spec.num_heads} or fewer"
        )

"""What a recipe says of the backbone: which checkpoint, in which precision, and how it is placed. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from lst_scale.recipe import decode
from lst_scale.recipe.decode import Count, Section
from lst_scale.system.names import PathText

QUANTIZED = ("int8", "nf4")  # precisions in which layers run forward only
FP16_REASON = "fp16 is refused, since T5 overflows in it (past 65504): write bf16, which has the range of fp32"


def _refuse_fp16(value: Any) -> Any:
    if value in ("fp16", "float16", "half"):
        raise ValueError(FP16_REASON)
    return value


NotFp16 = BeforeValidator(_refuse_fp16)  # of any precision in which T5 computes


class _Placement(Section):
    """What every placement says of itself, for the cache, the methods and the planner."""

    each_rank_alone: ClassVar[bool] = True  # a rank runs its backbone without the others, so it may leave out a pass that it remembers
    trains_inside: ClassVar[bool] = False  # something may be trained within the backbone

    def shards(self, ranks: int) -> int:
        """Return among how many ranks each matrix is divided."""
        return 1

    def resident(self, blocks: Sequence[int], ranks: int) -> int:
        """Return the most bytes of blocks on a rank at a time, given each block's as the rank holds it."""
        return sum(blocks)


class Replicated(_Placement):
    """One copy a rank."""

    trains_inside = True
    name: Literal["replicated"]  # the whole backbone on every rank


class TensorParallel(_Placement):
    """Every matrix divided over groups of `size` consecutive ranks (DeepSpeed inference, AutoTP)."""

    each_rank_alone = False

    name: Literal["tensor_parallel"]  # divided within blocks
    size: Count | None = None  # None: all ranks
    across_nodes: bool = False  # whether a group may span machines
    deepspeed: PathText = "inference"  # a file of ds_configs/, or a path

    def shards(self, ranks: int) -> int:
        return self.size or ranks


class Zero3(_Placement):
    """Every block divided over all ranks and gathered just before it runs."""

    each_rank_alone = False
    name: Literal["zero3"]  # divided and gathered

    def resident(self, blocks: Sequence[int], ranks: int) -> int:
        return -(-sum(blocks) // ranks) + 2 * max(blocks)  # its share, the block that runs and the one that comes


class Streamed(_Placement):
    """Blocks in host memory or on disk; two on the device, the next one copied while one runs."""

    name: Literal["streamed"]  # brought block by block
    source: Literal["host", "disk"] = "host"  # where the blocks are
    folder: PathText | None = None  # of the block files for source: disk; None: ~/.cache/lst_scale/blocks

    @model_validator(mode="after")
    def _folder_needs_disk(self) -> Streamed:
        if self.folder is not None and self.source != "disk":
            raise ValueError(f"folder has no effect on source {self.source}: remove it or write source: disk")
        return self

    def resident(self, blocks: Sequence[int], ranks: int) -> int:
        return 2 * max(blocks)  # the block that runs and the one that comes


PLACEMENTS: dict[str, type[Section]] = {
    "replicated": Replicated,
    "tensor_parallel": TensorParallel,
    "zero3": Zero3,
    "streamed": Streamed,
}

if TYPE_CHECKING:
    Placement = Replicated | TensorParallel | Zero3 | Streamed
else:
    Placement = decode.tagged(**PLACEMENTS)


class ContextRecipe(Section):
    """What stands before every row. A decoder-only backbone runs it once, and every row goes on from it; elsewhere it begins each row."""

    text: Annotated[str, Field(min_length=1)] | None = None  # such as a system prompt; an empty line follows
    # so many training rows with their answers, as many of each label as can be; they are left out of training
    examples: Annotated[int, Field(ge=1, le=1000)] | None = None
    draw: Annotated[int, Field(ge=0, lt=2**32)] | None = None  # which of the rows; None: 0. Draws differ in what they are worth: try some

    @model_validator(mode="after")
    def _says_something(self) -> ContextRecipe:
        if self.text is None and self.examples is None:
            raise ValueError("a context is a text, or examples, or both: write text: ... or examples: 8")
        if self.text is not None and not self.text.strip():
            raise ValueError("text is empty: write it, or remove it")
        if self.draw is not None and self.examples is None:
            raise ValueError("draw has no effect without examples: write examples: 8, or remove it")
        return self


class BackboneRecipe(Section):
    checkpoint: PathText  # a name of the hub, a folder, or embedded:tiny-t5
    revision: PathText | None = None  # of the hub's
    precision: Annotated[Literal["fp32", "bf16", "int8", "nf4"], NotFp16] = "bf16"  # in which it is held
    max_quantization_error: float | None = Field(default=None, gt=0)  # the largest accepted error of taps; None: the precision's own
    placement: Placement = Replicated(name="replicated")  # how it is held, by name or with its settings
    context: ContextRecipe | None = None  # what it has read before every row; None: nothing

    @model_validator(mode="after")
    def _threshold_needs_quantization(self) -> BackboneRecipe:
        if self.max_quantization_error is not None and self.precision in ("fp32", "bf16"):
            raise ValueError(f"max_quantization_error has no effect on precision {self.precision}: remove it or write int8 or nf4")
        return self
